"""HiAR at full size on one device: adapters beside one frozen Wan2.1-T2V-1.3B.

It is the teacher, and the base of student and critic. Prompts and trajectories
are those of hiar_1_3b, with the 1.3B weights alone:

  hiar-jax convert --weights Wan2.1-T2V-1.3B --out weights/wan2.1_1.3b
  hiar-jax encode prompts --config=hiar_1_3b:prompts
  hiar-jax trajectories --config=hiar_1_3b:trajectories
  hiar-jax train --config=hiar_1_3b_lora:student_start
  hiar-jax train --config=hiar_1_3b_lora:distill
  hiar-jax export --config=hiar_1_3b_lora:distill --out=hiar

The last phase also leaves runs/hiar_1_3b_lora/distill/lora.safetensors, which
ComfyUI and diffusers read. Does it fit:

  hiar-jax plan --config=hiar_1_3b_lora --topology h100:1x1x1 --part=training

Rank, rates and the batch are ours: the paper (arXiv:2603.08703) trains all
parameters, with 64 samples an update.
"""

import dataclasses

import ml_collections

from hiar_jax.configs import hiar_1_3b
from hiar_jax.models import lora
from hiar_jax.models.config import WanConfig

PHASES = ('student_start', 'distill')
_RUNS = 'runs/hiar_1_3b_lora'


def get_config(phase: str = 'distill') -> ml_collections.ConfigDict:
  """The config of a phase; what several phases share is the same in all."""
  if phase not in PHASES:
    raise ValueError(f'phase {phase!r} is not one of {PHASES}')
  c = hiar_1_3b.get_config(phase)
  c.name = 'hiar_1_3b_lora'
  c.workdir = f'{_RUNS}/{phase}'
  c.lora = dict(rank=64, alpha=64.0, targets=lora.DEFAULT_TARGETS)
  # One and the same, so it is read and held once.
  base = 'weights/wan2.1_1.3b'
  c.teacher_weights = c.critic_weights = c.student_weights = base
  c.teacher.model = dataclasses.asdict(WanConfig.wan_1_3b(attention='auto'))
  c.student = dict(dtype='bfloat16', placement='divided')
  # One sample at a time.
  c.batch_size = 8
  if phase == 'distill':
    c.student_lora = f'{_RUNS}/student_start/lora.safetensors'
    c.distill.microbatches = 8
    c.critic_optimiser.learning_rate = 1e-5
  else:
    c.microbatches = 8
  c.optimiser.learning_rate = 5e-5
  return c
