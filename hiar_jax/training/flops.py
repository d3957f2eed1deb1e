"""FLOPs of a distillation, modelled from those of its passes."""

import numpy as np

from hiar_jax import rollout
from hiar_jax.models import attention, flops, lora
from hiar_jax.models.config import WanConfig
from hiar_jax.training import steps as training_steps


def distillation_flops(
  steps: training_steps.Distillation,
  part: str,
  batch_size: int,
  num_blocks: float,
  recompute: bool = False,
) -> dict[str, float]:
  """Of one step of a network, by what they are for, all devices together.

  generator   rollout + exit pass + fake score + real score + forward KL
  critic      rollout + critic

  The rollout is counted with its mean exit step; the last block is not
  committed. Of every pass what it sees, and neither empty slots of the cache
  nor what masks hide.

  Args:
    steps: networks and numbers.
    part: 'generator' or 'critic'.
    batch_size: videos.
    num_blocks: blocks of a rollout; may be a mean.
    recompute: see `flops.trained`.
  """
  student, teacher = steps.student.config, steps.teacher.config
  config = steps.rollout
  num_frames = num_blocks * config.frames_per_block
  loss_blocks = min(num_blocks, steps.config.loss_blocks)
  frames = loss_blocks * config.frames_per_block
  leave = _masked(
    student,
    attention.own_then_past_mask(
      round(num_frames), **_blocks(config), rows=round(frames)
    ),
  )
  score = flops.forward_flops(steps.critic.config, frames, frames)
  guided = 1 if steps.config.critic_guidance == 1.0 else 2
  parts = {'rollout': _rollout(steps, num_blocks)}
  if part == 'critic':
    parts['critic'] = trained(
      steps.critic.config, frames, score, steps.adapters, recompute
    )
  else:
    parts['exit pass'] = trained(
      student, frames, leave, steps.adapters, recompute
    )
    parts['fake score'] = guided * score
    parts['real score'] = 2 * flops.forward_flops(teacher, frames, frames)
    if steps.config.forward_kl_weight:
      parts['forward KL'] = _forward_kl(steps, num_blocks, recompute)
  return {name: batch_size * count for name, count in parts.items()}


def distillation_iteration(
  steps: training_steps.Distillation, batch_size: int, num_blocks: float
) -> float:
  """Of a mean iteration: a critic step, and a part of a generator step."""

  def total(part):
    return sum(distillation_flops(steps, part, batch_size, num_blocks).values())

  return total('critic') + total('generator') / steps.config.generator_every


def student_start_flops(
  model: WanConfig,
  config: rollout.RolloutConfig,
  num_frames: int,
  context: str,
  adapters: lora.LoRAConfig | None = None,
) -> float:
  """Of one trained sample of the student's start, see `student_start_step`."""
  blocks = _blocks(config)
  one = _masked(model, attention.block_causal_mask(num_frames, **blocks))
  frames = num_frames
  if context == 'matched':  # The context's pass, and one after it.
    one += _masked(model, attention.own_then_past_mask(num_frames, **blocks))
    frames *= 2
  return trained(model, frames, one, adapters)


def trained(
  model: WanConfig,
  frames: float,
  one: float,
  adapters: lora.LoRAConfig | None,
  recompute: bool = False,
) -> float:
  """A forward pass of so many frames that costs `one`, and its gradient.

  Of adapters: without the gradients of the matrices that stay, which cost as
  much as their products; their own few products are not counted.
  """
  total = flops.trained(model, recompute) * one
  if adapters is not None:
    total -= flops.pass_flops(model, frames, 0).linear
  return total


def _rollout(steps, num_blocks):
  """Of a rollout to its mean exit step."""
  num_steps = steps.rollout.num_steps
  denoised = committed = (num_steps + 1) / 2
  if steps.config.order == 'block_first':
    committed = 1
  elif steps.rollout.context == 'shared':  # Always to its end.
    denoised, committed = num_steps, 1
  return _swept(steps, num_blocks, denoised, committed)


def _swept(steps, num_blocks, denoised, committed):
  """Of blocks that are denoised and, but for the last, committed so often."""
  config, model = steps.rollout, steps.student.config
  frames = max(1, round(num_blocks)) * config.frames_per_block
  mask = attention.block_causal_mask(frames, **_blocks(config))
  seen = mask.sum(1)[:: config.frames_per_block]
  passes = np.full(len(seen), denoised + committed)
  passes[-1] = denoised
  return sum(
    flops.forward_flops(model, config.frames_per_block, float(count)) * times
    for count, times in zip(seen, passes, strict=True)
  ) * (num_blocks / len(seen))


def _forward_kl(steps, num_blocks, recompute):
  student, config = steps.student.config, steps.rollout
  num_frames = round(num_blocks * config.frames_per_block)
  with_gradient = lambda one: trained(
    student, num_frames, one, steps.adapters, recompute
  )
  mode = steps.config.forward_kl_attention
  if mode == 'bidirectional':
    return with_gradient(flops.forward_flops(student, num_frames, num_frames))
  blocks = _blocks(config)
  if mode == 'block_causal':
    mask = attention.block_causal_mask(num_frames, **blocks)
    return with_gradient(_masked(student, mask))
  mask = attention.own_then_past_mask(num_frames, **blocks)
  swept = _swept(steps, num_blocks, denoised=1, committed=1)
  return swept + with_gradient(_masked(student, mask))


def _blocks(config: rollout.RolloutConfig) -> dict[str, int]:
  return dict(
    frames_per_block=config.frames_per_block,
    window=config.window,
    sink=config.sink,
  )


def _masked(model: WanConfig, frame_mask: np.ndarray) -> float:
  seen = flops.seen_frames(frame_mask)
  return flops.forward_flops(model, len(frame_mask), seen)
