"""The one place that calls the network: levels in, flows and x0 out."""

# B batch, F frames, h w latent rows and columns, C channels, L text tokens

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax import noise_schedule
from hiar_jax.models.config import WanConfig
from hiar_jax.models.kv_cache import KV, KVCache, Picked
from hiar_jax.models.transformer import TextKV, WanTransformer
from hiar_jax.models.window import Window


@functools.partial(jax.jit, static_argnames='size')
def _unstack(tree, *, size):
  return tuple(jax.tree.map(lambda a, i=i: a[i], tree) for i in range(size))


@dataclasses.dataclass(frozen=True)
class Denoiser:
  """A network size as pure functions of its parameters.

  Student, teacher, critic and EMA are parameter trees under these functions.
  """

  config: WanConfig

  @property
  def _module(self) -> WanTransformer:
    return WanTransformer(self.config)

  def init(self, key: jax.Array) -> dict:
    """Random float32 parameters; the head is zero, so the flow is too."""
    states = jnp.zeros((1, self.config.text_len, self.config.text_dim))
    variables = self._module.init(key, states, method='initialise')
    return variables['params']

  def unstack_layers(self, params: dict) -> dict:
    """Gives every layer arrays of its own, if all of them are unrolled.

    XLA for CPUs would else copy each layer's weights out of their stack in
    every program: at the size `medium` of benchmarks/pipeline.py a block of
    shared context has 61 MB of temporaries then, and 22 without. All methods
    take both forms.

    Args:
      params: from `init`, or read from a file; unstacked ones stay so.

    Returns:
      The parameters with a tuple of trees under 'layers'; where the layers are
      scanned, `params` as they are.
    """
    layers = params['layers']
    if not self.config.is_unrolled or isinstance(layers, tuple):
      return params
    return {
      **params,
      'layers': _unstack(layers, size=self.config.num_layers),
    }

  def project_text(self, params: dict, states_BLD: jax.Array) -> TextKV:
    """Text encoder states [B, L, text_dim] to cross-attention K/V, once."""
    chex.assert_shape(states_BLD, (None, None, self.config.text_dim))
    return self._module.apply(
      {'params': params}, states_BLD, method='project_text'
    )

  def flow(
    self,
    params: dict,
    x_BFhwC: jax.Array,
    sigma: jax.Array | float,
    text: TextKV,
    *,
    positions_F: jax.Array | None = None,
    past: KV | KVCache | Picked | Window | None = None,
    past_frames: jax.Array | None = None,
    frame_mask: np.ndarray | jax.Array | None = None,
    same_frames: tuple[int, int] | None = None,
  ) -> tuple[jax.Array, Any]:
    """Predicted flow v = eps - x0 and the K/V of the frames.

    Args:
      params: of the network.
      x_BFhwC: noisy latents.
      sigma: level, scalar, [B or 1] or [B or 1, F or 1].
      text: K/V of the prompts.
      positions_F: absolute frame indices; default: those that follow `past`,
        or 0..F-1.
      past: see WanTransformer.
      past_frames: see WanTransformer.
      frame_mask: see WanTransformer.
      same_frames: see WanTransformer.
    """
    # The network itself compares rows, columns and channels with its sizes.
    chex.assert_rank(x_BFhwC, 5)
    sigma = jnp.asarray(sigma, jnp.float32)
    sigma = sigma.reshape(sigma.shape + (1,) * (2 - sigma.ndim))
    layers = params.get('layers')
    if positions_F is None:
      first = (
        past.position if isinstance(past, (KVCache, Picked, Window)) else 0
      )
      positions_F = first + jnp.arange(x_BFhwC.shape[1], dtype=jnp.int32)
    return self._module.apply(
      {'params': params},
      x_BFhwC,
      noise_schedule.TIMESTEPS * sigma,
      text,
      positions_F,
      past,
      past_frames,
      frame_mask,
      same_frames,
      layers if isinstance(layers, tuple) else None,
    )

  def x0(
    self,
    params: dict,
    x_BFhwC: jax.Array,
    sigma: jax.Array,
    text: TextKV,
    **kwargs: Any,
  ) -> jax.Array:
    """Predicted clean latents; arguments as in `flow`."""
    flow, _ = self.flow(params, x_BFhwC, sigma, text, **kwargs)
    return noise_schedule.flow_to_x0(x_BFhwC, flow, sigma)

  def guided_flow(
    self,
    params: dict,
    x_BFhwC: jax.Array,
    sigma: jax.Array,
    text: TextKV,
    null_text: TextKV,
    scale: float,
  ) -> jax.Array:
    """The flow under guidance, see `guide`.

    Both run as one batch, in which a sample's two stand side by side, so that
    samples stay on their devices.
    """
    sigma = jnp.broadcast_to(
      jnp.asarray(sigma, jnp.float32).reshape(-1, 1), (x_BFhwC.shape[0], 1)
    )

    def pairs(cond, uncond):
      pair = jnp.stack([cond, jnp.broadcast_to(uncond, cond.shape)], 2)
      return pair.reshape(pair.shape[0], -1, *pair.shape[3:])

    flow, _ = self.flow(
      params,
      jnp.repeat(x_BFhwC, 2, axis=0),
      jnp.repeat(sigma, 2, axis=0),
      jax.tree.map(pairs, text, null_text),
    )
    flow = flow.reshape(-1, 2, *flow.shape[1:])
    return guide(flow[:, 0], flow[:, 1], scale)


def guide(cond: jax.Array, uncond: jax.Array, scale: float) -> jax.Array:
  """Classifier-free guidance, uncond + scale (cond - uncond).

  `scale` is the usual convention: 1 is no guidance; the DMD papers'
  "cond + 3 (cond - uncond)" is scale 4.

  Source: Ho & Salimans 2022 (arXiv:2207.12598).
  """
  return uncond + scale * (cond - uncond)
