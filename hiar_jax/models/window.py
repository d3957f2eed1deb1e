"""All that a block sees, itself included, in arrays that are written in place.

A `KVCache` is read and not written by the network, which puts own and past keys
beside each other in every layer of every pass: a kernel wants them in one
array, and for 1.3B that moves 12 GB a pass. Here the own keys are written where
the block's frames will lie, over those that leave the window with it, and the
kernel is given the array and a length. Each layer has an array of its own: of
a stack it would have to be cut out.

So a pass hands the arrays back, and the caller goes on with those (`keep`) and
lets go of the ones before. Until `write` says that the block counts, the next
pass writes over it.
"""

# N layers, B batch, S tokens of the window, T own tokens, H heads, K head width

import dataclasses
import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from hiar_jax.models import splash
from hiar_jax.models.config import WanConfig
from hiar_jax.models.kv_cache import KV


@flax.struct.dataclass
class Window:
  """Keys and values of the frames that a block sees, as a ring of slots.

  Attributes:
    k: keys after RoPE, [B, S, H, K] of each layer: the slots, and what a kernel
      for TPUs wants beyond them, see `splash.padded`.
    v: values, likewise.
    frames: int32 scalar, frames that count, written since the start.
    origin: int32 scalar, position of the first frame.
    slots: frames that a block sees, itself included.
    sink: slots that keep the first frames; the others are the ring.
    tokens_per_frame: tokens in a slot.
    run: frames that lie in slots beside each other, wherever they begin: blocks
      begin at multiples of it.
  """

  k: tuple[jax.Array, ...]
  v: tuple[jax.Array, ...]
  frames: jax.Array
  origin: jax.Array
  slots: int = flax.struct.field(pytree_node=False)
  sink: int = flax.struct.field(pytree_node=False)
  tokens_per_frame: int = flax.struct.field(pytree_node=False)
  run: int = flax.struct.field(pytree_node=False)

  @property
  def position(self) -> jax.Array:
    """Absolute index of the next frame."""
    return self.origin + self.frames

  def layer(self, index: int, num_frames: int) -> 'WindowLayer':
    """What a layer is given in a pass over so many next frames."""
    assert num_frames % self.run == 0, (num_frames, self.run)
    starts = self.frames + jnp.arange(0, num_frames, self.run)
    ring = self.slots - self.sink
    slots = self.sink + (starts - self.sink) % ring
    slots = jnp.where(starts < self.sink, starts, slots)
    seen = jnp.minimum(self.frames + num_frames, self.slots)
    return WindowLayer(
      self.k[index],
      self.v[index],
      slots * self.tokens_per_frame,
      seen * self.tokens_per_frame,
      self.run * self.tokens_per_frame,
    )

  def keep(self, written: 'Written') -> 'Window':
    """The same frames, in the arrays that a pass has handed back."""
    return dataclasses.replace(self, k=written.k, v=written.v)

  def write(
    self, written: 'Written', live: jax.Array | bool = True
  ) -> 'Window':
    """After a pass whose frames count; with `live` False they do not."""
    frames = self.frames + jnp.where(live, written.num_frames, 0)
    return dataclasses.replace(self.keep(written), frames=frames)


@flax.struct.dataclass
class Written:
  """A window's arrays after a pass over its next frames.

  Attributes:
    k: keys of each layer, the own ones among them.
    v: values.
    num_frames: of the pass.
  """

  k: tuple[jax.Array, ...]
  v: tuple[jax.Array, ...]
  num_frames: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class WindowLayer:
  """The part of a layer.

  Attributes:
    k: keys, [B, S, H, K].
    v: values.
    starts: int32 [runs], tokens where the runs of the own frames begin.
    length: int32 scalar, tokens that are seen, a prefix.
    run: tokens of a run.
  """

  k: jax.Array
  v: jax.Array
  starts: jax.Array
  length: jax.Array
  run: int = flax.struct.field(pytree_node=False)

  def write(self, new: KV) -> 'WindowLayer':
    """With the own keys and values, [B, T, H, K]."""
    return dataclasses.replace(
      self, k=self._put(self.k, new.k), v=self._put(self.v, new.v)
    )

  def own(self) -> KV:
    """The own keys and values, [B, T, H, K], once they are written."""
    return KV(self._take(self.k), self._take(self.v))

  def _put(self, buffer: jax.Array, new: jax.Array) -> jax.Array:
    for i in range(len(self.starts)):
      part = new[:, i * self.run : (i + 1) * self.run].astype(buffer.dtype)
      start: list[Any] = [0, self.starts[i], 0, 0]
      buffer = jax.lax.dynamic_update_slice(buffer, part, start)
    return buffer

  def _take(self, buffer: jax.Array) -> jax.Array:
    cut = functools.partial(
      jax.lax.dynamic_slice_in_dim, buffer, slice_size=self.run, axis=1
    )
    parts = [cut(self.starts[i]) for i in range(len(self.starts))]
    return jnp.concatenate(parts, 1) if len(parts) > 1 else parts[0]


def init_window(
  config: WanConfig,
  batch: int,
  slots: int,
  frames_per_block: int,
  *,
  sink: int = 0,
  origin: Any = 0,
  given: int = 0,
) -> Window:
  """An empty window.

  Args:
    config: of the network.
    batch: samples.
    slots: frames that a block sees, itself included.
    frames_per_block: of the blocks.
    sink: frames, the first ones, that are kept for ever.
    origin: position of the first frame.
    given: frames that come before the first block.

  Raises:
    ValueError: if the sink leaves no room for a block.
  """
  if not 0 <= sink <= slots - frames_per_block:
    raise ValueError(
      f'sink={sink} frames do not fit into a past of '
      f'{slots - frames_per_block} frames (window minus one block)'
    )
  tokens = splash.padded(slots * config.tokens_per_frame)
  shape = (batch, tokens, config.num_heads, config.head_dim)

  def buffers() -> tuple[jax.Array, ...]:
    return tuple(
      jnp.zeros(shape, config.dtype) for _ in range(config.num_layers)
    )

  return Window(
    k=buffers(),
    v=buffers(),
    frames=jnp.zeros((), jnp.int32),
    origin=jnp.asarray(origin, jnp.int32),
    slots=slots,
    sink=sink,
    tokens_per_frame=config.tokens_per_frame,
    run=math.gcd(frames_per_block, sink, slots - sink, given),
  )
