"""The D passes of a rollout's exit step, which alone carry gradient.

All blocks' at once, or one after the other: then only one block's activations
are held, and the network is read once for each.
"""

# B batch, R recorded blocks, f frames per block, F = R * f

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax import noise_schedule, rollout
from hiar_jax.rollout import Sampler
from hiar_jax.training.record import Record

WAYS = ('parallel', 'blocks')
PAST_GRADIENTS = ('detached', 'straight_through')


def parallel(
  sampler: Sampler, record: Record, *, past_gradient: str
) -> jax.Array:
  """The exit step's D passes of the recorded blocks, as one forward.

  Args:
    sampler: of the rollout; the gradient flows to its parameters and text.
    record: of `rollout.record_rollout`.
    past_gradient: 'detached': the past carries no gradient (the papers).
      'straight_through': the past has the committed values and the gradient of
      the exit step's own K/V (what the public code does, spec 9).

  Returns:
    x0, [B, R * f, h, w, C].

  Raises:
    ValueError: for an unknown past_gradient.
  """
  flow_BFhwC = flow(sampler, record, past_gradient)
  levels = _per_frame(record.levels, sampler)
  x = rollout.join_blocks(record.inputs)
  return noise_schedule.flow_to_x0(x, flow_BFhwC, levels)


def flow(sampler: Sampler, record: Record, past_gradient: str) -> jax.Array:
  """Flow of the recorded blocks, see `parallel`."""
  if past_gradient not in PAST_GRADIENTS:
    raise ValueError(
      f'past_gradient {past_gradient!r} is not one of {PAST_GRADIENTS}'
    )
  x = rollout.join_blocks(record.inputs)
  seen, same = record.seen, None
  if past_gradient == 'straight_through':
    same = seen.same_frames
  flow_BFhwC, _ = sampler.denoiser.flow(
    sampler.params,
    x,
    _per_frame(record.levels, sampler),
    sampler.text,
    positions_F=record.position + jnp.arange(x.shape[1], dtype=jnp.int32),
    past=record.keys,
    past_frames=record.num_keys,
    frame_mask=seen.mask(),
    same_frames=same,
  )
  return flow_BFhwC


def one_block(sampler: Sampler, record: Record, block: int) -> jax.Array:
  """x0 of one of the blocks, as in `parallel` with a detached past.

  The gradient of all is the sum of the blocks'. Each lets go of its activations
  before the next where they are terms of a loss (microbatches.py).

  Args:
    sampler: see `parallel`.
    record: see there.
    block: which of the R, static.

  Returns:
    [B, f, h, w, C].
  """
  size = sampler.config.frames_per_block
  own = slice(block * size, (block + 1) * size)
  mask = record.seen.mask()[own]
  num_own = record.inputs.shape[0] * size
  mask = np.concatenate([mask[:, own], mask[:, num_own:]], 1)
  x, level = record.inputs[block], record.levels[block]
  flow_BfhwC, _ = sampler.denoiser.flow(
    sampler.params,
    x,
    level,
    sampler.text,
    positions_F=record.position
    + jnp.arange(own.start, own.stop, dtype=jnp.int32),
    past=record.keys,
    past_frames=record.num_keys,
    frame_mask=mask,
  )
  return noise_schedule.flow_to_x0(x, flow_BfhwC, level)


def _per_frame(levels_b, sampler):
  """Levels of blocks to levels of frames, [1, F]."""
  return jnp.repeat(levels_b, sampler.config.frames_per_block)[None]
