"""What a rollout without gradient leaves for its exit pass.

Given that, the exit step's D passes no longer depend on each other.
"""

# B batch, b blocks, R recorded blocks, f frames per block

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.models import attention
from hiar_jax.models.kv_cache import KV, KVCache
from hiar_jax.rollout import RolloutConfig


@dataclasses.dataclass(frozen=True)
class Seen:
  """How the keys of an exit pass lie, and which of its blocks sees which.

  They are the ring itself, in the order of frames, as long as nothing in it
  had to be overwritten. Else they are the context of the R - 1 blocks that a
  later one sees, then what the ring held when the first of the R came: its
  sink, and the others newest first, so that each block sees a prefix of them.

  Attributes:
    config: of the rollout.
    blocks: R.
    before: frames before these blocks; None: not known, at least one block.
  """

  config: RolloutConfig
  blocks: int
  before: int | None

  def __post_init__(self):
    if self.before is None and self.config.sink > self.config.frames_per_block:
      raise ValueError(
        f'sink={self.config.sink} is more than a block of '
        f'{self.config.frames_per_block} frames: rollouts of several lengths '
        'in one program need it to be full after their first block'
      )

  @property
  def kept(self) -> int:
    """Frames of the blocks themselves that a later one sees."""
    return (self.blocks - 1) * self.config.frames_per_block

  @property
  def in_ring(self) -> bool:
    if self.before is None:
      return False
    return self.before + self.kept <= self.config.past_frames

  @property
  def same_frames(self) -> tuple[int, int]:
    """Where the context of the blocks themselves lies."""
    start = (self.before or 0) if self.in_ring else 0
    return start, start + self.kept

  def mask(self) -> np.ndarray:
    """bool [R f, R f + frames of the keys]: who sees whom."""
    config, size = self.config, self.config.frames_per_block
    own, before = self.blocks * size, self.before
    if before is None:  # As if the ring were full.
      before = -(-(config.past_frames + config.sink) // size + 1) * size
    mask = attention.own_then_past_mask(
      before + own,
      size,
      window=config.window,
      sink=config.sink,
      first=before % size,
      rows=own,
    )
    if self.in_ring:
      return mask[:, : own + before + self.kept]
    sink = min(config.sink, before)
    others = min(config.past_frames, before) - sink
    order = [
      *range(before, before + self.kept),
      *range(sink),
      *range(before - 1, before - 1 - others, -1),
    ]
    return np.concatenate([mask[:, :own], mask[:, own:][:, order]], 1)

  def keys(self, ring: KVCache, own: KVCache, older: KVCache) -> KV:
    """The keys.

    Args:
      ring: after these blocks.
      own: their context, one after the other.
      older: the ring when the first of them came.
    """
    if self.in_ring:
      return KV(ring.k, ring.v)
    others = older.slots - older.sink
    newest = older.frames - 1 - jnp.arange(others) - older.sink
    slots = jnp.concatenate(
      [jnp.arange(older.sink), older.sink + newest % max(others, 1)]
    )

    def join(own, ring):
      by_frame = (*ring.shape[:2], -1, older.tokens_per_frame, *ring.shape[3:])
      ordered = jnp.take(ring.reshape(by_frame), slots, axis=2)
      return jnp.concatenate([own, ordered.reshape(ring.shape)], 2)

    return KV(join(own.k, older.k), join(own.v, older.v))


@flax.struct.dataclass
class Record:
  """What the gradient-free pass leaves of a rollout's last R blocks.

  Attributes:
    inputs: of the exit step's D passes, [R, B, f, h, w, C].
    levels: of those inputs, [R].
    x0: estimates of those passes, [R, B, f, h, w, C].
    x0_before: of the blocks before them, [b, B, f, h, w, C]; if their number
      was not known, unused ones come after them.
    num_before: how many of those there are.
    keys: K/V that the blocks see.
    num_keys: of those, frames that are there; None: all.
    position: of the first frame of the R blocks.
    seen: how the keys lie.
  """

  inputs: jax.Array
  levels: jax.Array
  x0: jax.Array
  x0_before: jax.Array
  num_before: jax.Array
  keys: KV
  num_keys: jax.Array | None
  position: jax.Array
  seen: Seen = flax.struct.field(pytree_node=False)
