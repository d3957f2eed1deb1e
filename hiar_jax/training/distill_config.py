"""The numbers of a distillation."""

import dataclasses

from hiar_jax.training import exit_pass, losses
from hiar_jax.training import rollout as training_rollout

CUT_STARTS = ('reencoded', 'as_made')
FORWARD_KL_ATTENTION = ('bidirectional', 'block_causal', 'cached')


@dataclasses.dataclass(frozen=True)
class DistillConfig:
  """The distillation's numbers; defaults are the paper's.

  Attributes:
    order: of the training rollout, 'step_first' (HiAR) or 'block_first'
      (Self-Forcing).
    past_gradient: see `exit_pass`; the forward KL's mode 'cached' keeps to it
      as well.
    exit_pass: 'parallel' (all blocks' D passes as one) or 'blocks' (one after
      the other, for less memory; with a 'detached' past alone).
    block_first_context: see `training_rollout`; of no meaning to 'step_first'.
    loss_blocks: the losses see the last blocks of a rollout, and if it is
      longer their first block carries none.
    cut_start: the first latent of that cut. 'reencoded': all before it is
      decoded, and the last of those pixel frames is encoded as the first of a
      video, which is how critic and teacher know videos to begin (the public
      code); needs a codec. 'as_made': as it is.
    guidance: of the teacher, usual convention (4 = "cond + 3 (cond - uncond)").
    critic_guidance: of the critic in the reverse KL, same convention; 1 is none
      (the public code's fake_guidance_scale is one less).
    timestep_shift: warps the uniform timestep of both score losses.
    min_level: lower clamp of that level.
    max_level: upper clamp.
    forward_kl_weight: of the forward KL; 0 leaves it out.
    forward_kl_steps: K, it is applied to the first K steps.
    forward_kl_target: see losses.FORWARD_KL_TARGETS.
    forward_kl_attention: 'bidirectional' (the paper), 'block_causal' (its
      code) or 'cached'.
    generator_every: critic updates per generator update.
    ema_decay: of the student's average.
    ema_start: critic updates before it starts.
    microbatches: parts that a batch is taken in, one after the other, to need
      less memory; their gradients are averaged and make one update. Each leaves
      its rollouts at an exit step of its own.
  """

  order: str = 'step_first'
  past_gradient: str = 'detached'
  exit_pass: str = 'parallel'
  block_first_context: str = 'clean'
  loss_blocks: int = 7
  cut_start: str = 'reencoded'
  guidance: float = 4.0
  critic_guidance: float = 1.0
  timestep_shift: float = 5.0
  min_level: float = 0.02
  max_level: float = 0.98
  forward_kl_weight: float = 0.1
  forward_kl_steps: int = 1
  forward_kl_target: str = 'velocity'
  forward_kl_attention: str = 'bidirectional'
  generator_every: int = 5
  ema_decay: float = 0.99
  ema_start: int = 200
  microbatches: int = 1

  def __post_init__(self):
    for name, allowed in (
      ('order', training_rollout.TRAINING_ORDERS),
      ('past_gradient', exit_pass.PAST_GRADIENTS),
      ('block_first_context', training_rollout.BLOCK_FIRST_CONTEXTS),
      ('exit_pass', exit_pass.WAYS),
      ('cut_start', CUT_STARTS),
      ('forward_kl_target', losses.FORWARD_KL_TARGETS),
      ('forward_kl_attention', FORWARD_KL_ATTENTION),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(
          f'{name}={getattr(self, name)!r} is not one of {allowed}'
        )
    if self.exit_pass == 'blocks' and self.past_gradient != 'detached':
      raise ValueError(
        f"exit_pass='blocks' goes with past_gradient='detached', not with "
        f'{self.past_gradient!r}: a block has no gradient of later ones then'
      )
    for name in (
      'loss_blocks',
      'forward_kl_steps',
      'generator_every',
      'microbatches',
    ):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} is below 1')
    if not 0 <= self.min_level < self.max_level <= 1:
      raise ValueError(
        f'min_level={self.min_level}, max_level={self.max_level} are not '
        'rising within 0..1'
      )
