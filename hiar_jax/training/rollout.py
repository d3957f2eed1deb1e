"""Self-rollouts for training: made without gradient, left at one exit step.

The gradient-free pass runs every block up to the exit step and records, per
block, the input of its D pass there and the K/V committed for later blocks.
Given those, the exit step's D passes no longer depend on each other: they are
one parallel forward over all blocks, and only that one carries gradient. Its
values are those of the serial loop.

Sources: Self-Forcing (arXiv:2506.08009) for the block-first order, HiAR
(arXiv:2603.08703, section 3.2) for the step-first order.
"""

# B batch, b blocks, f frames per block, F frames, N layers, S steps,
# h w latent rows and columns, C channels

import functools

import flax.struct
import jax
import jax.numpy as jnp

from hiar_jax import noise_schedule, rollout
from hiar_jax.models import attention
from hiar_jax.models.kv_cache import KV
from hiar_jax.rollout import Noise, Sampler

PAST_GRADIENTS = ('detached', 'straight_through')
TRAINING_ORDERS = ('step_first', 'block_first')
BLOCK_FIRST_CONTEXTS = ('clean', 'matched')


@flax.struct.dataclass
class Record:
  """What the gradient-free pass leaves, per block.

  Attributes:
    inputs: of the exit step's D pass, [b, B, f, h, w, C].
    levels: of those inputs, [b].
    x0: estimates of that pass, [b, B, f, h, w, C].
    context: committed K/V, [b, N, B, f * P, H, K].
  """

  inputs: jax.Array
  levels: jax.Array
  x0: jax.Array
  context: KV


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
    exit_step: int in 0..S-1, may be traced: one program serves all. For
      'block_first' also one step per block, [b].
    order: 'step_first' or 'block_first'.
    past_gradient: 'detached': the past carries no gradient (the papers).
      'straight_through': the past has the committed values and the gradient of
      the exit step's own K/V (what the public code does, spec 9).
    grad_blocks: only these last blocks carry gradient; None = all.
    initial: clean latents that come first.
    block_first_context: what a block leaves to later ones in that order.
      'clean': its x0 at level 0 (Self-Forcing). 'matched': its next level after
      the exit, which is x0 at level 0 after the last step (HiAR's block-first
      ablation).

  Returns:
    [B, b * f, h, w, C], given frames excluded.

  Raises:
    ValueError: naming the argument that does not fit.
  """
  if order not in TRAINING_ORDERS:
    raise ValueError(f'order {order!r} is not one of {TRAINING_ORDERS}')
  if past_gradient not in PAST_GRADIENTS:
    raise ValueError(
      f'past_gradient {past_gradient!r} is not one of {PAST_GRADIENTS}'
    )
  if block_first_context not in BLOCK_FIRST_CONTEXTS:
    raise ValueError(
      f'block_first_context {block_first_context!r} is not one of '
      f'{BLOCK_FIRST_CONTEXTS}'
    )
  grad_blocks = num_blocks if grad_blocks is None else grad_blocks
  if not 0 < grad_blocks <= num_blocks:
    raise ValueError(f'grad_blocks={grad_blocks} is not in 1..{num_blocks}')
  frozen = _without_gradient(sampler)
  past, anchors = frozen.empty_past(), []
  if initial is not None:
    past, anchors = frozen.anchor(past, initial)
  if order == 'block_first':
    make_record = functools.partial(
      _record_block_first, clean=block_first_context == 'clean'
    )
  elif sampler.config.context == 'shared':
    make_record = _record_shared
  else:
    make_record = _record_step_first
  record = make_record(frozen, noise, num_blocks, exit_step, past)
  record = jax.lax.stop_gradient(record)
  flow = _exit_pass(
    sampler,
    record,
    anchors,
    grad_blocks,
    straight_through=past_gradient == 'straight_through',
  )
  first = num_blocks - grad_blocks
  levels = _per_frame(record.levels[first:], sampler)
  x0 = noise_schedule.flow_to_x0(
    rollout.join_blocks(record.inputs[first:]), flow, levels
  )
  if first:
    x0 = jnp.concatenate([rollout.join_blocks(record.x0[:first]), x0], 1)
  return x0


def cached_flow(
  sampler: Sampler, x_BFhwC: jax.Array, step: int, *, past_gradient: str
) -> jax.Array:
  """Flow of given noisy frames, each block seeing its own clean estimates.

  The 'cached' attention mode of the forward KL: block b is denoised at t_step
  with the past of the student's x0 of earlier blocks at level 0.

  Args:
    sampler: as above.
    x_BFhwC: all frames at level t_step; a multiple of a block.
    step: static.
    past_gradient: as in `training_rollout`.
  """
  frozen = _without_gradient(sampler)
  size = sampler.config.frames_per_block
  batch, num_frames = x_BFhwC.shape[:2]
  x = x_BFhwC.reshape(batch, num_frames // size, size, *x_BFhwC.shape[2:])

  def one_block(past, x):
    flow, _ = frozen.denoise(x, past, step)
    x0 = noise_schedule.flow_to_x0(x, flow, frozen.levels[step])
    kv = frozen.commit_kv(x0, past, jnp.zeros(()))
    return past.write(kv), Record(x, frozen.levels[step], x0, kv)

  _, record = jax.lax.scan(
    one_block, frozen.empty_past(), jnp.moveaxis(x, 1, 0)
  )
  record = jax.lax.stop_gradient(record)
  return _exit_pass(
    sampler,
    record,
    [],
    x.shape[1],
    straight_through=past_gradient == 'straight_through',
  )


def _without_gradient(sampler: Sampler) -> Sampler:
  return Sampler(
    sampler.denoiser,
    jax.lax.stop_gradient(sampler.params),
    jax.lax.stop_gradient(sampler.text),
    sampler.config,
  )


def _record_step_first(sampler, noise, num_blocks, exit_step, past):
  """Sweeps up to the exit step, then one recorded sweep."""
  blocks = jnp.arange(num_blocks)

  def one_step(step, x):
    x, _ = rollout.sweep(
      sampler, noise, x, blocks, past, first_step=step, num_steps=1
    )
    return x

  x = rollout.initial_blocks(noise, blocks)
  x = jax.lax.fori_loop(0, exit_step, one_step, x)

  def one_block(past, xs):
    x, block = xs
    flow, _ = sampler.denoise(x, past, exit_step)
    x_next, x0 = sampler.advance(x, flow, noise, exit_step, block)
    context, level = rollout.context_of(sampler, x_next, x0, exit_step + 1)
    kv = sampler.commit_kv(context, past, level)
    return past.write(kv), Record(x, sampler.levels[exit_step], x0, kv)

  return jax.lax.scan(one_block, past, (x, blocks))[1]


def _record_block_first(sampler, noise, num_blocks, exit_step, past, *, clean):
  """Every block to its exit step; what it is there is its context."""
  blocks = jnp.arange(num_blocks)
  exits = jnp.broadcast_to(jnp.asarray(exit_step), (num_blocks,))

  def one_block(past, xs):
    block, exit_step = xs

    def one_step(step, x):
      flow, _ = sampler.denoise(x, past, step)
      return sampler.advance(x, flow, noise, step, block)[0]

    x = jax.lax.fori_loop(0, exit_step, one_step, noise(0, block))
    flow, _ = sampler.denoise(x, past, exit_step)
    x_next, x0 = sampler.advance(x, flow, noise, exit_step, block)
    context, level = x0, jnp.zeros(())
    if not clean:
      context, level = x_next, sampler.levels[exit_step + 1]
    kv = sampler.commit_kv(context, past, level)
    return past.write(kv), Record(x, sampler.levels[exit_step], x0, kv)

  return jax.lax.scan(one_block, past, (blocks, exits))[1]


def _record_shared(sampler, noise, num_blocks, exit_step, past):
  """Whole shared-context rollout: its context of a step is the next step's."""
  size = sampler.config.num_steps
  pasts = jax.tree.map(lambda a: jnp.stack([a] * size), past)

  def one_block(pasts, block):
    _, pasts, parts = rollout.shared_block(sampler, noise, pasts, block)
    x, x0, kv = jax.tree.map(lambda a: a[exit_step], parts)
    return pasts, Record(x, sampler.levels[exit_step], x0, kv)

  return jax.lax.scan(one_block, pasts, jnp.arange(num_blocks))[1]


def _per_frame(levels_b, sampler):
  """Levels of blocks to levels of frames, [1, F]."""
  return jnp.repeat(levels_b, sampler.config.frames_per_block)[None]


def _exit_pass(sampler, record, anchors, grad_blocks, *, straight_through):
  """The D passes of the last `grad_blocks` blocks as one forward: their flow.

  Queries are the blocks' noisy tokens; keys their own tokens and the recorded
  context of earlier blocks, which is constant (but see straight_through).
  """
  config = sampler.config
  num_blocks = record.levels.shape[0]
  size = config.frames_per_block
  num_grad = grad_blocks * size
  tokens = sampler.denoiser.config.tokens_per_frame
  num_anchors = sum(kv.k.shape[2] for kv in anchors) // tokens
  total = num_anchors + num_blocks * size

  def sequence(context_bNBTHK, *parts):
    # [b, N, B, T, ...] to [N, B, b * T, ...], given frames before.
    x = jnp.moveaxis(context_bNBTHK, 0, 2)
    x = x.reshape(*x.shape[:2], -1, *x.shape[4:])
    return jnp.concatenate([*parts, x], 2)

  past = jax.tree.map(sequence, record.context, *anchors)
  mask = attention.own_then_past_mask(
    total,
    size,
    window=config.window,
    sink=config.sink,
    first=num_anchors % size,
    rows=num_grad,
  )
  first = num_blocks - grad_blocks
  flow, _ = sampler.denoiser.flow(
    sampler.params,
    rollout.join_blocks(record.inputs[first:]),
    _per_frame(record.levels[first:], sampler),
    sampler.text,
    positions_F=total - num_grad + jnp.arange(num_grad),
    past=past,
    frame_mask=mask,
    straight_through=straight_through,
  )
  return flow
