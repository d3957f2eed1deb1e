"""Pure training steps: (state, batch, key) -> (state, metrics).

A batch holds `text` [B, L, text_dim] and what its phase adds. Keys are made
from (seed, iteration) by the host loop; nothing random lives in the state.
"""

# B batch, F frames, h w latent rows and columns, C channels

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hiar_jax import losses
from hiar_jax import noise_schedule
from hiar_jax import train_state
from hiar_jax.denoiser import Denoiser

Metrics = dict[str, jax.Array]
Step = Callable[[Any, dict, jax.Array], tuple[Any, Metrics]]


def _regress(state, loss_fn, optimiser, ema_decay):
  """One update of a RegressionState by the gradient of `loss_fn`."""
  loss, grads = jax.value_and_grad(loss_fn)(state.net.params)
  net = state.net.update(grads, optimiser)
  # A young average follows closely, or it would remember the initial weights.
  age = state.iteration.astype(jnp.float32)
  decay = jnp.minimum(ema_decay, (1 + age) / (10 + age))
  state = train_state.RegressionState(
    iteration=state.iteration + 1,
    net=net,
    ema=train_state.ema_update(state.ema, net.params, decay),
  )
  return state, {'loss': loss, 'grad_norm': optax.global_norm(grads)}


def teacher_step(
  denoiser: Denoiser,
  optimiser: optax.GradientTransformation,
  *,
  timestep_shift: float,
  ema_decay: float,
) -> Step:
  """Flow matching on videos, one level per sample (bidirectional network).

  The batch's `latents` are [B, F, h, w, C].
  """

  def step(state, batch, key):
    x0 = batch['latents']
    noise_key, level_key = jax.random.split(key)
    eps = jax.random.normal(noise_key, x0.shape)
    # Stratified: one draw per 1/B of the range lowers the loss's variance.
    size = x0.shape[0]
    u = (jnp.arange(size) + jax.random.uniform(level_key, (size,))) / size
    sigma = noise_schedule.warp_timestep(u, timestep_shift)
    x = noise_schedule.add_noise(x0, eps, sigma)

    def loss_fn(params):
      text = denoiser.project_text(params, batch['text'])
      flow, _ = denoiser.flow(params, x, sigma, text)
      return losses.flow_matching(flow, x0, eps)

    return _regress(state, loss_fn, optimiser, ema_decay)

  return step
