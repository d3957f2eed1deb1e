"""A stream's blocks made block-first on one device: one past, S + 1 passes.

The loop of `rollout.block_first`, cut into one program a block. The past is
clean, so the latents that its keys are of can be kept beside them (a thousandth
of their size): when the prompt changes they may be committed anew, as if those
frames had been made for it. LongLive (arXiv:2509.22622) calls that recaching,
and was trained with it.
"""

# B batch, F frames, f frames per block, S denoising steps, M prompts in the
# bank, h w latent rows and columns, C channels

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from hiar_jax import rollout
from hiar_jax.models.kv_cache import KVCache
from hiar_jax.models.transformer import TextKV
from hiar_jax.rollout import Sampler
from hiar_jax.sampling import meshes


@flax.struct.dataclass
class BlockState:
  """What is held between blocks.

  Attributes:
    past: keys and values of the window.
    kept: the latents that they are of, [B, slots, h, w, C], by the same slots.
    origin: int32 scalar, position of the video's first frame.
  """

  past: KVCache
  kept: jax.Array
  origin: jax.Array

  def keep(self, past: KVCache, x_BFhwC: jax.Array) -> 'BlockState':
    """After frames whose keys `past` has besides."""
    kept = self.kept
    for i in range(x_BFhwC.shape[1] if self.past.slots else 0):
      slot, is_kept = self.past.slot_of(self.past.frames + i)
      frame = x_BFhwC[:, i : i + 1]
      old = jax.lax.dynamic_slice_in_dim(kept, slot, 1, axis=1)
      frame = jnp.where(is_kept, frame, old)
      kept = jax.lax.dynamic_update_slice_in_dim(kept, frame, slot, axis=1)
    return BlockState(past, kept, self.origin)


def begin(sampler: Sampler, initial: jax.Array | None) -> BlockState:
  """Before the first block.

  Args:
    sampler: the verbs.
    initial: clean latents [B, F, h, w, C] that come first.
  """
  past = sampler.empty_past()
  shape = sampler.config.block_shape(sampler.denoiser.config)
  kept = jnp.zeros((sampler.batch, past.slots, *shape[1:]), jnp.float32)
  state = BlockState(past, kept, past.origin)
  if initial is None:
    return state
  return state.keep(sampler.anchor(past, initial), initial)


@functools.partial(
  jax.jit,
  static_argnames=('engine', 'is_first'),
  donate_argnames='state',
)
def run_block(
  params: dict,
  bank: TextKV,
  slots_tS: jax.Array,
  keys_B: jax.Array,
  state: BlockState,
  block: jax.Array,
  *,
  engine: Any,
  is_first: bool = False,
) -> tuple[BlockState, jax.Array]:
  """The next block, [B, f, h, w, C], and the state after it.

  Args:
    params: of the network.
    bank: prompts, [M, N, B, ...].
    slots_tS: int32 [1, 1], the prompt in it that the block uses.
    keys_B: one noise key per sample.
    state: from `begin`.
    block: its name, from 0.
    engine: a `streaming.Engine`.
    is_first: whether it is the first, which may have levels of its own.
  """
  text = jax.tree.map(lambda a: a[slots_tS[0, 0]], bank)
  config = engine.config.of_block(0 if is_first else 1)
  sampler = Sampler(engine.denoiser, params, text, config)
  noise = rollout.named_noise(
    keys_B, config.block_shape(engine.denoiser.config)
  )
  x, past = rollout.sweep(
    *(sampler, noise, noise(0, block)[None], block[None], state.past),
    first_step=0,
    num_steps=config.num_steps,
  )
  state = meshes.lay_out(state.keep(past, x[0]), engine.mesh)
  return state, meshes.lay_out(x[0], engine.mesh)


def recached_alone(count: int, engine: Any) -> int:
  """Frames before the first whole block of those that `recache` takes.

  Args:
    count: that are kept.
    engine: a `streaming.Engine`.
  """
  return count % engine.config.frames_per_block


@functools.partial(
  jax.jit, static_argnames=('alone', 'engine'), donate_argnames='state'
)
def recache(
  params: dict,
  text: TextKV,
  state: BlockState,
  count: jax.Array,
  *,
  alone: int,
  engine: Any,
) -> BlockState:
  """The past as if its frames had been made for another prompt.

  Its frames are committed anew, block by block from the oldest that is kept,
  the newest whole; each sees those before it that are kept, and no others. One
  program serves any number of whole blocks.

  Args:
    params: of the network.
    text: the other prompt, [N, B, ...].
    state: its pasts hold `count` frames; donated.
    count: int32 scalar, at most the slots of the past.
    alone: `recached_alone`.
    engine: a `streaming.Engine`.
  """
  config, before = engine.config.of_block(1), state.past
  sampler = Sampler(engine.denoiser, params, text, config)
  sink, slots, size = before.sink, before.slots, config.frames_per_block
  if not slots:
    return state
  frames = state.kept
  if slots > sink:
    # The oldest of the ring is where the next frame would be written.
    oldest = (before.frames - sink) % (slots - sink)
    oldest = jnp.where(count == slots, oldest, 0)
    ring = jnp.roll(frames[:, sink:], -oldest, axis=1)
    frames = jnp.concatenate([frames[:, :sink], ring], 1)
  own = jnp.arange(slots)
  first = before.position - count
  positions = first + own
  if config.positions == 'absolute':
    positions = jnp.where(own < sink, state.origin + own, positions)

  def commit(past: KVCache, start: Any, length: int) -> KVCache:
    def cut(a: jax.Array, axis: int) -> jax.Array:
      return jax.lax.dynamic_slice_in_dim(a, start, length, axis)

    _, kv = engine.denoiser.flow(
      *(params, cut(frames, 1), jnp.float32(config.context_level), text),
      positions_F=cut(positions, 0),
      past=past,
    )
    return past.write(kv)

  past = sampler.empty_past()
  if alone:
    past = commit(past, 0, alone)
  past = jax.lax.fori_loop(
    *(0, (count - alone) // size),
    lambda block, past: commit(past, alone + block * size, size),
    past,
  )
  kept = jnp.where((own < count)[:, None, None, None], frames, 0)
  # Counted from the oldest that is kept; where the next frame comes is as
  # before.
  past = dataclasses.replace(past, origin=first)
  return meshes.lay_out(BlockState(past, kept, state.origin), engine.mesh)
