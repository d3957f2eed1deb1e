"""FLOPs of a distillation, modelled from those of its passes."""

from hiar_jax.models import flops
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
  critic      rollout + exit pass + critic

  The rollout is counted with its mean exit step: 2 (S - 1) / 2 passes a block
  before the recorded sweep's 2, at the full window, because the cache's empty
  slots are computed too.

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
  block = flops.forward_flops(student, config.frames_per_block, config.window)
  leave = flops.forward_flops(student, frames, frames + num_frames)
  score = flops.forward_flops(steps.critic.config, frames, frames)
  parts = {'rollout': (config.num_steps + 1) * num_blocks * block}
  if part == 'critic':
    parts['exit pass'] = leave
    parts['critic'] = flops.trained(steps.critic.config, recompute) * score
  else:
    parts['exit pass'] = flops.trained(student, recompute) * leave
    parts['fake score'] = score
    parts['real score'] = 2 * flops.forward_flops(teacher, frames, frames)
    if steps.config.forward_kl_weight:
      whole = flops.forward_flops(student, num_frames, num_frames)
      parts['forward KL'] = flops.trained(student, recompute) * whole
  return {name: batch_size * count for name, count in parts.items()}


def distillation_iteration(
  steps: training_steps.Distillation, batch_size: int, num_blocks: float
) -> float:
  """Of a mean iteration: a critic step, and a part of a generator step."""

  def total(part):
    return sum(distillation_flops(steps, part, batch_size, num_blocks).values())

  return total('critic') + total('generator') / steps.config.generator_every
