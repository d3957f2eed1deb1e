"""HiAR at full size: Wan2.1-T2V-1.3B, 480x832 pixels, four steps.

hiar-jax plan --config=hiar_1_3b --topology v5e:2x2
hiar-jax plan --config=hiar_1_3b --topology v5p:4x4x4 \\
  --part=training
"""

import dataclasses

import ml_collections

from hiar_jax.models.config import WanConfig


def get_config() -> ml_collections.ConfigDict:
  """The published student's sizes and schedule (arXiv:2603.08703)."""
  c = ml_collections.ConfigDict()
  c.name = 'hiar_1_3b'
  c.seed = 0
  # Scores of 4680 x 32,760 for 12 heads would fill an accelerator.
  c.model = dataclasses.asdict(WanConfig.wan_1_3b(attention='auto'))
  c.schedule = dict(shift=5.0, indices=(1000, 750, 500, 250))
  c.rollout = dict(
    frames_per_block=3, window=21, sink=0, stepping='sde', context='matched'
  )
  c.generate = dict(order='step_first', fps=16.0)
  # One stage to a chip of four.
  c.plan = dict(topology='v5e:2x2', batch_size=1, weights_dtype='bfloat16')
  _distillation(c)
  return c


def _distillation(c):
  """The paper's training of this student, with the larger teacher."""
  c.phase = 'distill'
  c.iterations = 20_000
  c.batch_size = 64
  c.rollout_blocks = (7, 7)
  c.teacher_weights = 'weights/wan2.1_14b'
  c.critic_weights = 'weights/wan2.1_1.3b'
  c.teacher = dict(
    model=dataclasses.asdict(WanConfig.wan_14b(attention='auto')),
    dtype='bfloat16',
  )
  adamw = dict(name='adamw', b1=0.0, b2=0.999, weight_decay=0.01)
  adamw |= dict(clip_norm=10.0)
  c.optimiser = adamw | dict(learning_rate=2e-6)
  c.critic_optimiser = adamw | dict(learning_rate=3e-7)
  c.distill = dict(
    order='step_first',
    past_gradient='detached',
    guidance=4.0,
    forward_kl_weight=0.1,
    forward_kl_steps=1,
    forward_kl_target='velocity',
    forward_kl_attention='bidirectional',
    generator_every=5,
    ema_decay=0.99,
    ema_start=200,
    microbatches=1,
  )
  c.trajectories = dict(
    num_steps=48, shift=8.0, guidance=6.0, points='student', batch_size=64
  )
  # One sample to a chip of 64, parameters divided over all of them.
  c.mesh = dict(data=1, fsdp=-1, tensor=1, context=1)
