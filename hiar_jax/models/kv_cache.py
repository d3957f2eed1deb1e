"""The past: keys and values of earlier blocks, as a ring of frame slots.

Attention does not care about the order of its keys (they carry their position
from RoPE), so nothing is ever moved: the first `sink` frames keep their slots
for ever, all others share the rest as a ring. A block of frames is written
once, by the rollout; the network only reads.

A sink's distance from the newest frame grows without end, beyond all that a
network was trained on. Where it is `bounded`, the network reads the sink's keys
as if its frames came right before the oldest of the ring: rotated by the
difference, which is exact, as the angles of RoPE add up.

Keys and values may be held in 8 bits (`quantised`): they are brought there as
they are written, and back, a layer at a time, as they are read.
"""

# N layers, B batch, S past tokens, T new tokens, H heads, K head width

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from hiar_jax.models import quantised
from hiar_jax.models.config import WanConfig


@flax.struct.dataclass
class KV:
  """Keys (after RoPE) and values of some tokens, [N, B, T, H, K] each."""

  k: Any
  v: Any


@flax.struct.dataclass
class Rows:
  """Where a network finds the keys and values of its layers.

  Not cut out: it would be a copy, 5.2 GB for every pass of 1.3B. Nor reshaped:
  XLA for CPUs would copy what a branch takes.

  Attributes:
    kv: [N, B, S, H, K] each, or [L, N, B, S, H, K] of L caches.
    lead: indices before that of the layer, int32 scalars.
    filled: int32 scalar, frames that are there; a prefix of the slots.
  """

  kv: KV
  lead: tuple[jax.Array, ...]
  filled: jax.Array


@flax.struct.dataclass
class KVCache:
  """A window of past frames.

  Attributes:
    k: keys after RoPE, [N, B, S, H, K] with S = slots * tokens_per_frame; a
      `quantised.Stored` of that shape where they are in 8 bits.
    v: values, same shape.
    frames: int32 scalar, frames written since the start.
    origin: int32 scalar, position of the first frame.
    sink: slots that keep the first frames.
    tokens_per_frame: tokens in a slot.
    bounded: the sink's positions follow the ring's.
  """

  k: jax.Array | quantised.Stored
  v: jax.Array | quantised.Stored
  frames: jax.Array
  origin: jax.Array
  sink: int = flax.struct.field(pytree_node=False)
  tokens_per_frame: int = flax.struct.field(pytree_node=False)
  bounded: bool = flax.struct.field(pytree_node=False, default=False)

  @property
  def slots(self) -> int:
    return self.k.shape[-3] // self.tokens_per_frame

  @property
  def position(self) -> jax.Array:
    """Absolute index of the next frame."""
    return self.origin + self.frames

  @property
  def filled(self) -> jax.Array:
    """Number of frames that are there; they are a prefix of the slots."""
    return jnp.minimum(self.frames, self.slots)

  def emptied(self) -> 'KVCache':
    """The same buffers with no frame that is there; none is written anew."""
    return dataclasses.replace(self, frames=jnp.zeros_like(self.frames))

  @property
  def rows(self) -> Rows:
    """What a network reads."""
    return Rows(KV(self.k, self.v), (), self.filled)

  @property
  def sink_shift(self) -> jax.Array | None:
    """Frames by which the sink is to be read later than it was; None: none."""
    if not self.bounded or not self.sink:
      return None
    return jnp.maximum(self.frames - self.slots, 0)

  def slot_of(self, index: Any) -> tuple[jax.Array, jax.Array | bool]:
    """Slot of a frame, and whether there is one."""
    ring = self.slots - self.sink
    if ring:
      in_ring = self.sink + (index - self.sink) % ring
      return jnp.where(index < self.sink, index, in_ring), True
    return jnp.minimum(index, self.sink - 1), index < self.sink

  def write(self, new: KV, live: jax.Array | bool = True) -> 'KVCache':
    """Returns the cache with the K/V of the next frames written.

    Args:
      new: K/V of a whole number of frames that follow those written before.
        With more frames than the ring holds, the last ones stay.
      live: bool scalar; False leaves everything as it is. Cheaper than a
        choice between two caches: only the written slots are looked at.
    """
    k, v = self.k, self.v
    new = self._in_stored_form(new)
    for i in range(self._num_frames(new)):
      slot, kept = self.slot_of(self.frames + i)
      k = self._put(k, new.k, i, slot, live & kept)
      v = self._put(v, new.v, i, slot, live & kept)
    return self._grown(k, v, new, live)

  def write_each(self, new: KV, live_L: jax.Array | None = None) -> 'KVCache':
    """`write` for L caches stacked on a leading axis of every array.

    What a `vmap` of `write` gives, without the scatter that slots of their own
    would make of it: that is slow on CPUs and copies the caches.

    Args:
      new: K/V [L, N, B, T, H, K].
      live_L: bool [L], as in `write`; None: all True.
    """
    k, v = self.k, self.v
    new = self._in_stored_form(new)
    for i in range(self._num_frames(new)):
      for each in range(k.shape[0]):
        live = True if live_L is None else live_L[each]
        slot, kept = self.slot_of(self.frames[each] + i)
        k = self._put(k, new.k, i, slot, live & kept, each)
        v = self._put(v, new.v, i, slot, live & kept, each)
    return self._grown(k, v, new, True if live_L is None else live_L)

  def _in_stored_form(self, new: KV) -> KV:
    if not isinstance(self.k, quantised.Stored):
      return new
    kind = quantised.kind_of(self.k.dtype)
    assert kind is not None
    return KV(*(quantised.store(x, kind) for x in (new.k, new.v)))

  def _num_frames(self, new: KV) -> int:
    num_frames, rest = divmod(new.k.shape[-3], self.tokens_per_frame)
    assert not rest, 'K/V of a part of a frame'
    return num_frames

  def _grown(self, k: Any, v: Any, new: Any, live: Any) -> 'KVCache':
    frames = self.frames + jnp.where(live, self._num_frames(new), 0)
    return dataclasses.replace(self, k=k, v=v, frames=frames)

  def _put(self, buffer, new, i, slot, live, each=None):
    """Frame i of `new` into a slot of the buffer, or of its entry `each`."""
    if not self.slots:
      return buffer
    if isinstance(buffer, quantised.Stored):
      put = lambda buffer, new: self._put(buffer, new, i, slot, live, each)
      return jax.tree.map(put, buffer, new)
    size = self.tokens_per_frame
    if each is not None:
      new = new[each : each + 1]
    frame = jax.lax.slice_in_dim(new, i * size, (i + 1) * size, axis=-3)
    frame = frame.astype(buffer.dtype)
    start = [0] * buffer.ndim
    start[-3] = slot * size
    if each is not None:
      start[0] = each
    if live is not True:
      old = jax.lax.dynamic_slice(buffer, start, frame.shape)
      frame = jnp.where(live, frame, old)
    return jax.lax.dynamic_update_slice(buffer, frame, start)


@flax.struct.dataclass
class Picked:
  """One of several caches, read where it lies.

  Attributes:
    caches: stacked on a leading axis of every array.
    index: int32 scalar, which of them.
  """

  caches: KVCache
  index: jax.Array

  @property
  def slots(self) -> int:
    return self.caches.slots

  @property
  def position(self) -> jax.Array:
    """Absolute index of the next frame."""
    return self._own(self.caches.position)

  @property
  def rows(self) -> Rows:
    """What a network reads."""
    kv = KV(self.caches.k, self.caches.v)
    return Rows(kv, (self.index,), self._own(self.caches.filled))

  @property
  def sink(self) -> int:
    return self.caches.sink

  @property
  def sink_shift(self) -> jax.Array | None:
    """See KVCache."""
    shift_L = self.caches.sink_shift
    return None if shift_L is None else self._own(shift_L)

  def cut_out(self) -> KVCache:
    """The cache by itself: a copy, unless XLA sees that it need not be."""
    return jax.tree.map(self._own, self.caches)

  def _own(self, a_L: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(a_L, self.index, keepdims=False)


def init_cache(
  config: WanConfig,
  batch: int,
  slots: int,
  sink: int = 0,
  origin: int = 0,
  bounded: bool = False,
  kind: str | None = None,
) -> KVCache:
  """An empty cache of `slots` frames, `sink` of them kept for ever.

  The first frame will have the position `origin`; see there for `bounded`. In 8
  bits of a `kind` of quantised.KINDS; None: in the dtype of the passes.

  Raises:
    ValueError: if the sink is larger than the cache.
  """
  if not 0 <= sink <= slots:
    raise ValueError(
      f'sink={sink} frames do not fit into a past of {slots} frames '
      '(window minus one block)'
    )
  shape = (
    config.num_layers,
    batch,
    slots * config.tokens_per_frame,
    config.num_heads,
    config.head_dim,
  )

  def buffer() -> jax.Array | quantised.Stored:
    if kind is None:
      return jnp.zeros(shape, config.dtype)
    return quantised.empty(shape, kind)

  # Two buffers: jit refuses to donate one buffer twice.
  return KVCache(
    k=buffer(),
    v=buffer(),
    frames=jnp.zeros((), jnp.int32),
    origin=jnp.asarray(origin, jnp.int32),
    sink=sink,
    tokens_per_frame=config.tokens_per_frame,
    bounded=bounded,
  )
