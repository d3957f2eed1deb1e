"""Does a video fit the device? Told before anything is compiled.

The estimates count weights and caches, and take the temporaries of a pass from
a formula, see `pass_temporaries`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from hiar_jax.models.config import WanConfig
from hiar_jax.rollout import RolloutConfig

_GB = 1e9


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one device that making a video needs, decoding left out.

  Attributes:
    weights: of the network.
    caches: of the pasts that the device holds.
    temporaries: of the passes that it makes at a time.
  """

  weights: int
  caches: int
  temporaries: int

  @property
  def total(self) -> int:
    return self.weights + self.caches + self.temporaries

  def __str__(self) -> str:
    parts = ', '.join(
      f'{name} {value / _GB:.3g}' for name, value in vars(self).items()
    )
    return f'{self.total / _GB:.3g} GB ({parts})'


def weights_bytes(params: dict, model: WanConfig) -> int:
  """Of arrays, or of their shapes; twice where sampling unstacks them."""
  size = sum(
    math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(params)
  )
  return 2 * size if model.is_unrolled else size


def past_bytes(model: WanConfig, config: RolloutConfig, batch_size: int) -> int:
  """Of the keys and values of one past."""
  slots = config.past_frames * model.tokens_per_frame
  width = jnp.dtype(model.dtype).itemsize
  return 2 * model.num_layers * batch_size * slots * model.dim * width


def pass_temporaries(
  model: WanConfig, config: RolloutConfig, batch_size: int
) -> int:
  """Of one pass over a block.

  With T tokens in the block, W in the window, width D, feed-forward width E, H
  heads, N layers and b bytes a number they are taken to be

    T (8 D + 2 E) 4    a layer's activations, in float32
    2 H Q W 4          scores and their softmax, Q = T, or 256 of them where
                       attention does not hold all
    2 N T D b          its keys and values
  """
  queries = config.frames_per_block * model.tokens_per_frame
  tokens = batch_size * queries
  if model.attention != 'xla':
    queries = min(queries, 256)
  window = config.window * model.tokens_per_frame
  width = jnp.dtype(model.dtype).itemsize
  return (
    tokens * (8 * model.dim + 2 * model.ffn_dim) * 4
    + 2 * batch_size * model.num_heads * queries * window * 4
    + 2 * model.num_layers * tokens * model.dim * width
  )


def account(device: jax.Device) -> dict[str, int]:
  """What a device reports of its memory; empty where it keeps no account."""
  return device.memory_stats() or {}


def check_fits(
  need: Memory, model: WanConfig, config: RolloutConfig, device: jax.Device
) -> None:
  """Refuses what a device has no room for.

  XLA may make do with fewer temporaries than the formula says, so half of them
  are forgiven. A device that keeps no account of its memory, such as a CPU,
  refuses nothing.

  Args:
    need: of the device.
    model: sizes of the network, for the message.
    config: how blocks are denoised, likewise.
    device: on which the weights are.

  Raises:
    ValueError: telling what is needed, what there is, and what needs less.
  """
  stats = account(device)
  if 'bytes_limit' not in stats:
    return
  # Such as a text encoder that is kept.
  others = max(stats.get('bytes_in_use', 0) - need.weights, 0)
  room = stats['bytes_limit'] - others
  if need.total - need.temporaries // 2 <= room:
    return
  taken = f', {others / _GB:.3g} GB of them taken by others' if others else ''
  raise ValueError(
    f'the video needs about {need} of memory, and {device.device_kind} has '
    f'{stats["bytes_limit"] / _GB:.3g} GB{taken}; fewer videos at a time, a '
    f'shorter window than {config.window} frames, or smaller frames than '
    f'{model.latent_height}x{model.latent_width} latents need less'
  )
