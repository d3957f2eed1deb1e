"""Does a video fit device and host? Told before anything is compiled.

The estimates count weights, caches and what is made, and take the temporaries
of a pass from a formula, see `pass_temporaries`.
"""

# B videos, F frames, H W height and width, h w latent rows and columns,
# C channels

import dataclasses
import math
import os
import pathlib
import re

import jax
import jax.numpy as jnp

from hiar_jax.models import splash
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
    latents: of the whole video, where it is not a stream.
    prompts: keys and values of the prompts that it keeps.
  """

  weights: int
  caches: int
  temporaries: int
  latents: int = 0
  prompts: int = 0

  @property
  def total(self) -> int:
    return sum(dataclasses.astuple(self))

  def __str__(self) -> str:
    parts = ', '.join(
      f'{name} {value / _GB:.3g}' for name, value in vars(self).items() if value
    )
    return f'{self.total / _GB:.3g} GB ({parts})'


def weights_bytes(params: dict, model: WanConfig) -> int:
  """Of arrays, or of their shapes; twice where sampling unstacks them."""
  size = sum(
    math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(params)
  )
  is_stacked = not isinstance(params.get('layers'), tuple)
  return 2 * size if model.is_unrolled and is_stacked else size


def past_bytes(model: WanConfig, config: RolloutConfig, batch_size: int) -> int:
  """Of the keys and values of one past."""
  slots = config.past_frames * model.tokens_per_frame
  numbers = 2 * model.num_layers * batch_size * slots * model.dim
  if config.past_dtype is None:
    return numbers * jnp.dtype(model.dtype).itemsize
  # Beside the 8 bits a float32 scale for each token and head.
  return numbers + 4 * numbers // model.head_dim


def window_bytes(
  model: WanConfig, config: RolloutConfig, batch_size: int
) -> int:
  """Of the keys and values of all frames that a block sees."""
  tokens = splash.padded(config.window * model.tokens_per_frame)
  width = jnp.dtype(model.dtype).itemsize
  return 2 * model.num_layers * batch_size * tokens * model.dim * width


def prompt_bytes(model: WanConfig, batch_size: int) -> int:
  """Of the keys and values of a prompt."""
  width = jnp.dtype(model.dtype).itemsize
  return 2 * model.num_layers * batch_size * model.text_len * model.dim * width


def seen_bytes(model: WanConfig, config: RolloutConfig, batch_size: int) -> int:
  """Of the keys and values that one layer of a pass sees."""
  tokens = batch_size * config.window * model.tokens_per_frame
  return 2 * tokens * model.dim * jnp.dtype(model.dtype).itemsize


def new_bytes(model: WanConfig, config: RolloutConfig, batch_size: int) -> int:
  """Of the keys and values that a pass over a block returns."""
  tokens = batch_size * config.frames_per_block * model.tokens_per_frame
  width = jnp.dtype(model.dtype).itemsize
  return 2 * model.num_layers * tokens * model.dim * width


def pass_temporaries(
  model: WanConfig, config: RolloutConfig, batch_size: int
) -> int:
  """Of one pass over a block.

  With T tokens in the block, W in the window, width D, feed-forward width E, H
  heads, N layers and b bytes a number they are taken to be

    T (8 D + 2 E) 4    a layer's activations, in float32
    2 W D b            keys and values that a layer sees
    2 H Q W 4          scores and their softmax: none of a flash kernel, which
                       float32 has none of on GPUs; Q = 256, or T where
                       attention holds all
    2 N T D b          its keys and values, see `new_bytes`

  docs/gpu.md holds it to what the compiler takes.
  """
  queries = config.frames_per_block * model.tokens_per_frame
  tokens = batch_size * queries
  window = config.window * model.tokens_per_frame
  width = jnp.dtype(model.dtype).itemsize
  if model.attention != 'xla':
    chunked = model.attention == 'chunked' or width == 4
    queries = min(queries, 256) if chunked else 0
  return (
    tokens * (8 * model.dim + 2 * model.ffn_dim) * 4
    + seen_bytes(model, config, batch_size)
    + 2 * batch_size * model.num_heads * queries * window * 4
    + new_bytes(model, config, batch_size)
  )


def in_place_temporaries(
  model: WanConfig, config: RolloutConfig, batch_size: int
) -> int:
  """Of one pass that writes its window where it lies.

  T (8 D + E) b: a layer's activations in the dtype of the passes; see
  `pass_temporaries`. Such passes are those of a kernel, which holds no scores.
  """
  tokens = batch_size * config.frames_per_block * model.tokens_per_frame
  width = jnp.dtype(model.dtype).itemsize
  return tokens * (8 * model.dim + model.ffn_dim) * width


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
    + (f'; {_STREAM}' if 2 * need.latents > need.total else '')
  )


_STREAM = (
  'a stream (--stream, `pipe.stream`) is of any length in constant memory'
)


def check_host(
  latents_shape: tuple[int, ...], frames_shape: tuple[int, ...]
) -> None:
  """Refuses videos that the host has no room for.

  A call holds its latents and, while the blocks are joined, its frames twice.

  Args:
    latents_shape: (B, F, h, w, C), float32.
    frames_shape: (B, F, H, W, 3), uint8.

  Raises:
    ValueError: telling what is needed, what there is, and what needs less.
  """
  latents, frames = 4 * math.prod(latents_shape), 2 * math.prod(frames_shape)
  room = host_bytes()
  if max(latents + frames, 2 * latents) <= room:
    return
  count = f'{frames_shape[0]} videos' if frames_shape[0] > 1 else 'a video'
  raise ValueError(
    f'{count} of {frames_shape[1]} frames would take about '
    f"{(latents + frames) / _GB:,.1f} GB of the host's memory "
    f'(latents {latents / _GB:,.1f}, frames {frames / _GB:,.1f}), and '
    f'{room / _GB:,.1f} GB are free; shorter or fewer videos need less, and '
    + _STREAM
  )


def host_bytes() -> int:
  """Bytes of memory that this program may still take, as far as that is told.

  Of a container it is the limit, whatever is taken of it.
  """
  room = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  if available := re.search(r'MemAvailable: *(\d+) kB', _text('/proc/meminfo')):
    room = int(available[1]) * 1024
  limits = (_text(file).strip() for file in _CONTAINER_LIMITS)
  return min([room, *(int(text) for text in limits if text.isdecimal())])


# Of cgroups, version 2 and 1.
_CONTAINER_LIMITS = (
  '/sys/fs/cgroup/memory.max',
  '/sys/fs/cgroup/memory/memory.limit_in_bytes',
)


def _text(path: str) -> str:
  """Of a file; empty where the system has no such file."""
  try:
    return pathlib.Path(path).read_text()
  except OSError:
    return ''
