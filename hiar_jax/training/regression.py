"""Pure steps of the phases with one network: teacher and student start.

(state, batch, key) -> (state, metrics), as in training/steps.py, with the same
rule for updates that are not finite; their metric is `skipped`. Where adapters
are trained, a step takes the parameters that they belong to as `base`.
"""

# B batch, F frames, h w latent rows and columns, C channels

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hiar_jax import noise_schedule, rollout
from hiar_jax.denoiser import Denoiser
from hiar_jax.models import attention, lora
from hiar_jax.training import losses, microbatches

Step = Callable[..., tuple[Any, dict[str, jax.Array]]]


def _regress(
  state, loss_fn, whole, optimiser, ema_decay, num_parts, adapters, base
):
  """One update of a RegressionState by the gradient of `loss_fn`.

  Args:
    state: of the run.
    loss_fn: (params, part of `whole`) to a mean over its samples.
    whole: batch and draws, arrays with a leading axis of samples.
    optimiser: of the network.
    ema_decay: of its average.
    num_parts: see `microbatches`.
    adapters: what is trained of the network; None: all.
    base: parameters that adapters belong to.
  """

  def with_metrics(params, part, _):
    if adapters is not None:
      params = lora.join(base, params, adapters.scale)
    loss = loss_fn(params, part)
    return loss, {'loss': loss}

  grads, metrics = microbatches.gradient(
    *([with_metrics], state.net.params, whole, num_parts),
    in_place=adapters is None,
  )
  loss = metrics['loss']
  # A young average follows closely, or it would remember the initial weights.
  age = state.iteration.astype(jnp.float32)
  decay = jnp.minimum(ema_decay, (1 + age) / (10 + age))
  state, metrics = state.update(loss, grads, optimiser, decay)
  return state, {'loss': loss, **metrics}


def teacher_step(
  denoiser: Denoiser,
  optimiser: optax.GradientTransformation,
  *,
  timestep_shift: float,
  ema_decay: float,
  num_parts: int = 1,
  adapters: lora.LoRAConfig | None = None,
) -> Step:
  """Flow matching on videos, one level per sample (bidirectional network).

  The batch's `latents` are [B, F, h, w, C]; it is taken in `num_parts`
  microbatches.
  """

  def step(state, batch, key, base=None):
    x0 = batch['latents']
    noise_key, level_key = jax.random.split(key)
    eps = jax.random.normal(noise_key, x0.shape)
    # Stratified: one draw per 1/B of the range lowers the loss's variance.
    size = x0.shape[0]
    u = (jnp.arange(size) + jax.random.uniform(level_key, (size,))) / size
    sigma = noise_schedule.warp_timestep(u, timestep_shift)
    x = noise_schedule.add_noise(x0, eps, sigma)

    def loss_fn(params, part):
      x, sigma, states, x0, eps = part
      text = denoiser.project_text(params, states)
      flow, _ = denoiser.flow(params, x, sigma, text)
      return losses.flow_matching(flow, x0, eps)

    whole = (x, sigma, batch['text'], x0, eps)
    return _regress(
      *(state, loss_fn, whole, optimiser, ema_decay, num_parts),
      *(adapters, base),
    )

  return step


START_CONTEXTS = ('matched', 'random')


def student_start_step(
  denoiser: Denoiser,
  optimiser: optax.GradientTransformation,
  config: rollout.RolloutConfig,
  *,
  context: str,
  ema_decay: float,
  num_parts: int = 1,
  adapters: lora.LoRAConfig | None = None,
) -> Step:
  """ODE regression: trajectory points to the trajectory's end, causally.

  The causal network must name the final x0 of a teacher trajectory from one of
  its points. What a block sees of its past:

  'matched': the next point, as in a step-first rollout: the pass at step j
    reads the K/V of earlier blocks at level t_{j+1}. One step per sample.
  'random': every block is at its own random step. Level 0 is drawn too: there
    the answer is the input and the loss is 0, but later blocks learn to read
    clean context.

  The batch's `trajectory` is [B, S + 1, F, h, w, C] at the student's levels; it
  is taken in `num_parts` microbatches.

  Raises:
    ValueError: if the context is unknown.

  Source: CausVid (arXiv:2412.07772, section 4.2), with the clean level added;
  'matched' is the same regression under the context of HiAR
  (arXiv:2603.08703, section 3.1).
  """
  if context not in START_CONTEXTS:
    raise ValueError(f'context {context!r} is not one of {START_CONTEXTS}')
  levels = jnp.asarray(config.levels, jnp.float32)
  blocks = dict(
    frames_per_block=config.frames_per_block,
    window=config.window,
    sink=config.sink,
  )

  def matched_x0(params, trajectory, text, step):
    num_frames = trajectory.shape[2]
    # Not by pairs of indices: devices would sum up each other's samples.
    point = jax.vmap(lambda points, i: points[i])
    _, past = denoiser.flow(
      params,
      point(trajectory, step + 1),
      levels[step + 1][:, None],
      text,
      frame_mask=attention.block_causal_mask(num_frames, **blocks),
    )
    return denoiser.x0(
      params,
      point(trajectory, step),
      levels[step][:, None],
      text,
      positions_F=jnp.arange(num_frames),
      past=past,
      frame_mask=attention.own_then_past_mask(num_frames, **blocks),
    )

  def random_x0(params, trajectory, text, point):
    num_frames = trajectory.shape[2]
    point_BF = jnp.repeat(point, config.frames_per_block, axis=1)
    index = point_BF[:, None, :, None, None, None]
    x = jnp.take_along_axis(trajectory, index, axis=1)[:, 0]
    mask = attention.block_causal_mask(num_frames, **blocks)
    return denoiser.x0(params, x, levels[point_BF], text, frame_mask=mask)

  def draw(key, size, num_points, num_frames):
    """Each sample's step, or the points of its blocks."""
    if context == 'matched':
      return jax.random.randint(key, (size,), 0, num_points - 1)
    num_blocks = num_frames // config.frames_per_block
    return jax.random.randint(key, (size, num_blocks), 0, num_points)

  predict = {'matched': matched_x0, 'random': random_x0}[context]

  def step(state, batch, key, base=None):
    trajectory = batch['trajectory']

    def loss_fn(params, part):
      trajectory, states, drawn = part
      text = denoiser.project_text(params, states)
      x0 = predict(params, trajectory, text, drawn)
      return losses.regression(x0, trajectory[:, -1])

    whole = (trajectory, batch['text'], draw(key, *trajectory.shape[:3]))
    return _regress(
      *(state, loss_fn, whole, optimiser, ema_decay, num_parts),
      *(adapters, base),
    )

  return step
