"""Self-rollouts for training: made without gradient, left at one exit step.

`record_rollout` runs every block up to the exit step, without gradient, and
records of the last blocks the input of their D pass there, its x0, and the K/V
that they see. Given those, the exit step's D passes no longer depend on each
other: `exit_pass` has them, and only they carry gradient. Their values are
those of the record.

A rollout may be longer than what is recorded, by a number of blocks that is not
known when it is compiled: one program serves all lengths.

Sources: Self-Forcing (arXiv:2506.08009) for the block-first order, HiAR
(arXiv:2603.08703, section 3.2) for the step-first order.
"""

# B batch, b blocks, R recorded blocks, f frames per block, F frames, N layers,
# S steps, h w latent rows and columns, C channels

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hiar_jax import noise_schedule, rollout
from hiar_jax.models import kv_cache
from hiar_jax.models.kv_cache import KVCache
from hiar_jax.rollout import Noise, Sampler
from hiar_jax.training import exit_pass
from hiar_jax.training.record import Record, Seen

TRAINING_ORDERS = ('step_first', 'block_first')
BLOCK_FIRST_CONTEXTS = ('clean', 'matched')


@dataclasses.dataclass(frozen=True)
class _Loop:
  """One order's way to its exit step, block by block.

  Attributes:
    carry: before the first block.
    block: (carry, block) -> (carry, (input, level, x0, K/V of the context));
      the last block of a rollout leaves no context.
    ring: what a block would see, from a carry.
  """

  carry: Any
  block: Callable[[Any, jax.Array], tuple[Any, tuple]]
  ring: Callable[[Any], KVCache] = lambda carry: carry


def training_rollout(
  sampler: Sampler,
  noise: Noise,
  num_blocks: int,
  exit_step: jax.Array,
  *,
  order: str,
  past_gradient: str,
  grad_blocks: int | None = None,
  initial: jax.Array | None = None,
  block_first_context: str = 'clean',
) -> jax.Array:
  """The student's x0 of all blocks at the exit step, differentiable.

  Args:
    sampler: network, parameters (the gradient flows to them and to the text
      projection) and config.
    noise: by name.
    num_blocks: blocks to make.
    exit_step: see `record_rollout`.
    order: see there.
    past_gradient: see `exit_pass.parallel`.
    grad_blocks: only these last blocks carry gradient; None = all.
    initial: clean latents that come first.
    block_first_context: see `record_rollout`.

  Returns:
    [B, b * f, h, w, C], given frames excluded.

  Raises:
    ValueError: naming the argument that does not fit.
  """
  grad_blocks = num_blocks if grad_blocks is None else grad_blocks
  if not 0 < grad_blocks <= num_blocks:
    raise ValueError(f'grad_blocks={grad_blocks} is not in 1..{num_blocks}')
  record = record_rollout(
    sampler,
    noise,
    grad_blocks,
    exit_step,
    order=order,
    block_first_context=block_first_context,
    initial=initial,
    before=num_blocks - grad_blocks,
  )
  x0 = exit_pass.parallel(sampler, record, past_gradient=past_gradient)
  return jnp.concatenate([rollout.join_blocks(record.x0_before), x0], 1)


def record_rollout(
  sampler: Sampler,
  noise: Noise,
  num_blocks: int,
  exit_step: jax.Array,
  *,
  order: str,
  block_first_context: str = 'clean',
  initial: jax.Array | None = None,
  before: jax.Array | int = 0,
  most_before: int | None = None,
) -> Record:
  """A rollout to its exit step, without gradient.

  Args:
    sampler: network, parameters and config.
    noise: by name.
    num_blocks: R, the last blocks, which are recorded.
    exit_step: int in 0..S-1, may be traced: one program serves all. For
      'block_first' also one step per block, [b].
    order: 'step_first' or 'block_first'.
    block_first_context: what a block leaves to later ones in that order.
      'clean': its x0 at level 0 (Self-Forcing). 'matched': its next level after
      the exit, which is x0 at level 0 after the last step (HiAR's block-first
      ablation).
    initial: clean latents that come first.
    before: blocks that are made before the recorded ones. It may be traced,
      with the largest one it can be, and is at least 1 then.
    most_before: that largest one; None: `before` is an int.

  Raises:
    ValueError: naming the argument that does not fit.
  """
  if order not in TRAINING_ORDERS:
    raise ValueError(f'order {order!r} is not one of {TRAINING_ORDERS}')
  if block_first_context not in BLOCK_FIRST_CONTEXTS:
    raise ValueError(
      f'block_first_context {block_first_context!r} is not one of '
      f'{BLOCK_FIRST_CONTEXTS}'
    )
  sampler = _without_gradient(sampler)
  past, given = sampler.empty_past(), 0
  if initial is not None:
    past, given = sampler.anchor(past, initial), initial.shape[1]
  most = before if most_before is None else most_before
  arguments = (sampler, noise, exit_step, past, before + num_blocks)
  if order == 'block_first':
    loop = _block_first(*arguments, most + num_blocks, block_first_context)
  elif sampler.config.context == 'shared':
    loop = _shared(*arguments)
  else:
    loop = _step_first(*arguments, most + num_blocks, given)
  return _record(
    sampler, loop, num_blocks, given, before, most, known=most_before is None
  )


def _record(sampler, loop, num_blocks, given, before, most, *, known):
  """Runs a loop: `before` blocks of at most `most`, then those recorded."""
  size = sampler.config.frames_per_block
  frames_before = given + size * before
  seen = Seen(sampler.config, num_blocks, frames_before if known else None)
  model = sampler.denoiser.config
  shape = (most, sampler.batch, *sampler.config.block_shape(model))

  def one_before(block, state):
    carry, x0s = state
    carry, (_, _, x0, _) = loop.block(carry, block)
    return carry, jax.lax.dynamic_update_index_in_dim(x0s, x0, block, 0)

  carry, x0_before = loop.carry, jnp.zeros(shape)
  if most:
    carry, x0_before = jax.lax.fori_loop(
      0, before, one_before, (carry, x0_before)
    )
  older = loop.ring(carry)
  slots = 0 if seen.in_ring else seen.kept
  own = kv_cache.init_cache(model, sampler.batch, slots)

  def one_block(state, i):
    carry, own = state
    carry, (*parts, kv) = loop.block(carry, before + i)
    return (carry, own.write(kv, live=i < num_blocks - 1)), parts

  (carry, own), (inputs, levels, x0) = jax.lax.scan(
    one_block, (carry, own), jnp.arange(num_blocks)
  )
  num_keys = None
  if not known:
    num_keys = seen.kept + jnp.minimum(older.frames, older.slots)
  record = Record(
    inputs=inputs,
    levels=levels,
    x0=x0,
    x0_before=x0_before,
    num_before=jnp.asarray(before, jnp.int32),
    keys=seen.keys(loop.ring(carry), own, older),
    num_keys=num_keys,
    position=sampler.origin + jnp.asarray(frames_before, jnp.int32),
    seen=seen,
  )
  return jax.lax.stop_gradient(record)


def cached_flow(
  sampler: Sampler,
  x_BFhwC: jax.Array,
  step: int | jax.Array,
  *,
  past_gradient: str,
) -> jax.Array:
  """Flow of given noisy frames, each block seeing its own clean estimates.

  The 'cached' attention mode of the forward KL: block b is denoised at t_step
  with the past of the student's x0 of earlier blocks at level 0.

  Args:
    sampler: as above.
    x_BFhwC: all frames at level t_step; a multiple of a block.
    step: may be traced.
    past_gradient: as in `exit_pass.parallel`.
  """
  frozen = _without_gradient(sampler)
  size = sampler.config.frames_per_block
  batch, num_frames = x_BFhwC.shape[:2]
  num_blocks = num_frames // size
  x = x_BFhwC.reshape(batch, num_blocks, size, *x_BFhwC.shape[2:])
  x = jnp.moveaxis(x, 1, 0).astype(jnp.float32)
  level = frozen.levels[step]

  def block(past, b):
    flow, _ = frozen.denoise(x[b], past, step)
    x0 = noise_schedule.flow_to_x0(x[b], flow, level)
    past, kv = _commit(frozen, past, x0, jnp.zeros(()), b < num_blocks - 1)
    return past, (x[b], level, x0, kv)

  loop = _Loop(frozen.empty_past(), block)
  record = _record(frozen, loop, num_blocks, 0, 0, 0, known=True)
  return exit_pass.flow(sampler, record, past_gradient)


def _without_gradient(sampler: Sampler) -> Sampler:
  return Sampler(
    sampler.denoiser,
    jax.lax.stop_gradient(sampler.params),
    jax.lax.stop_gradient(sampler.text),
    sampler.config,
    sampler.origin,
  )


def _commit(sampler, past, context, level, wanted):
  """The past after a block, and the block's K/V, if it is wanted."""
  kv = sampler.commit_kv(context, past, level, wanted)
  return past.write(kv, live=wanted), kv


# --- The orders. `total` blocks may be traced, and are at most `most`.


def _step_first(sampler, noise, exit_step, past, total, most, given):
  """Sweeps up to the exit step; then that step, block by block."""

  def one_block(x, past, step, b):
    flow, _ = sampler.denoise(x, past, step)
    x_next, x0 = sampler.advance(x, flow, noise, step, b)
    context, level = rollout.context_of(sampler, x_next, x0, step + 1, x)
    past, kv = _commit(sampler, past, context, level, b < total - 1)
    return past, x_next, x0, kv

  def one_step(step, state):
    def sweep(b, state):
      x, past = state
      past, x_next, _, _ = one_block(x[b], past, step, b)
      return jax.lax.dynamic_update_index_in_dim(x, x_next, b, 0), past

    x, used = jax.lax.fori_loop(0, total, sweep, state)
    # A new one for the last step would lie beside that of those before it; but
    # given frames may have left the ring.
    return x, past if given else used.emptied()

  x = rollout.initial_blocks(noise, jnp.arange(most))
  x, past = jax.lax.fori_loop(0, exit_step, one_step, (x, past))

  def block(past, b):
    past, _, x0, kv = one_block(x[b], past, exit_step, b)
    return past, (x[b], sampler.levels[exit_step], x0, kv)

  return _Loop(past, block)


def _block_first(sampler, noise, exit_step, past, total, most, context):
  """Every block to its exit step; what it is there is its context."""
  exits = jnp.broadcast_to(jnp.asarray(exit_step), (most,))

  def block(past, b):
    def one_step(step, x):
      flow, _ = sampler.denoise(x, past, step)
      return sampler.advance(x, flow, noise, step, b)[0]

    step = exits[b]
    x = jax.lax.fori_loop(0, step, one_step, noise(0, b))
    flow, _ = sampler.denoise(x, past, step)
    x_next, x0 = sampler.advance(x, flow, noise, step, b)
    left, level = x0, jnp.zeros(())
    if context == 'matched':
      left, level = x_next, sampler.levels[step + 1]
    past, kv = _commit(sampler, past, left, level, b < total - 1)
    return past, (x, sampler.levels[step], x0, kv)

  return _Loop(past, block)


def _shared(sampler, noise, exit_step, past, total):
  """Whole shared-context rollout: its context of a step is the next step's."""
  size = sampler.config.num_steps
  pasts = jax.tree.map(lambda a: jnp.stack([a] * size), past)

  def of_exit(tree):
    return jax.tree.map(lambda a: a[exit_step], tree)

  def block(pasts, b):
    _, pasts, parts = rollout.shared_block(
      sampler, noise, pasts, b, commit=b < total - 1
    )
    x, x0, kv = of_exit(parts)
    return pasts, (x, sampler.levels[exit_step], x0, kv)

  return _Loop(pasts, block, of_exit)
