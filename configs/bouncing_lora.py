"""The small world's student trained as adapters beside its teacher.

After the teacher and the trajectories of configs/bouncing.py:

  hiar-jax train --config=bouncing_lora:student_start
  hiar-jax train --config=bouncing_lora:distill
  hiar-jax generate --config=bouncing_lora:distill --prompt "..." \\
    --weights=runs/bouncing_lora/distill/weights.safetensors

The teacher's weights are read once: student and critic are adapters on them.
"""

import ml_collections

from hiar_jax.configs import bouncing
from hiar_jax.models import lora

PHASES = ('student_start', 'distill')
_RUNS = 'runs/bouncing_lora'


def get_config(phase: str = 'distill') -> ml_collections.ConfigDict:
  """The config of a phase; what several phases share is the same in all."""
  if phase not in PHASES:
    raise ValueError(f'phase {phase!r} is not one of {PHASES}')
  c = bouncing.get_config(phase)
  c.workdir = f'{_RUNS}/{phase}'
  c.lora = dict(rank=16, alpha=32.0, targets=lora.DEFAULT_TARGETS)
  c.student_weights = c.teacher_weights
  # Adapters are no matrices for Muon, and take larger steps than all weights.
  adamw = dict(name='adamw', b2=0.99, weight_decay=0.0)
  if phase == 'student_start':
    c.optimiser = adamw | dict(
      learning_rate=3e-3, b1=0.9, clip_norm=1.0, warmup=20, decay_to=0.02
    )
    return c
  c.student_lora = f'{_RUNS}/student_start/lora.safetensors'
  adamw |= dict(learning_rate=1e-3, b1=0.0, clip_norm=10.0, warmup=10)
  c.optimiser, c.critic_optimiser = dict(adamw), dict(adamw)
  return c
