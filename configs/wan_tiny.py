"""The pipeline of hiar_1_3b at a width of tens, for a release of that size.

  hiar-jax train --config=wan_tiny:student_start,FOLDER

and so on. FOLDER, by default the one that it is started in, has weights/ and
prompts.txt (and videos/ for the teacher) as for hiar_1_3b, and runs/ from the
first command on. Latent frames of 4x4, 6 of them in 2 blocks, two steps, one
device. The tests run it with random weights.
"""

import ml_collections

from hiar_jax.configs import hiar_1_3b, self_forcing_1_3b

PHASES = (*hiar_1_3b.PHASES, 'self_forcing')
_PATHS = (
  'workdir',
  'teacher_weights',
  'critic_weights',
  'trajectory_teacher_weights',
  'student_weights',
  'codec.folder',
  'prompts.path',
  'text.folder',
  'states.dir',
  'trajectories.dir',
  'start_weights',
  'videos.path',
  'latents.dir',
)


def get_config(arguments: str = 'distill') -> ml_collections.ConfigDict:
  """'phase' or 'phase,folder'; the folder is where paths begin."""
  phase, _, root = arguments.partition(',')
  if phase not in PHASES:
    raise ValueError(f'phase {phase!r} is not one of {PHASES}')
  if phase == 'self_forcing':
    c = self_forcing_1_3b.get_config()
  else:
    c = hiar_1_3b.get_config(phase)
  c.name = 'wan_tiny'
  for key in _PATHS:
    section, _, name = key.rpartition('.')
    holder = c.get(section, {}) if section else c
    if name not in holder:
      continue  # Of another phase.
    path = holder[name].replace('1_3b', 'tiny')
    holder[name] = f'{root}/{path}' if root else path
  c.model.update(
    dict(
      dim=24,
      ffn_dim=16,
      num_heads=2,
      num_layers=2,
      latent_height=4,
      latent_width=4,
      freq_dim=8,
      text_dim=16,
      text_len=512,
      dtype='float32',
      attention='xla',
    )
  )
  # A teacher of another size tells its own.
  del c.teacher.model
  c.text.dtype = 'float32'
  c.schedule.indices = (1000, 500)
  c.rollout.window = 6
  c.states.update(dict(shard_size=4, batch_size=4))
  c.trajectories.update(
    dict(num=8, shard_size=2, batch_size=2, num_frames=6, num_steps=4)
  )
  del c.mesh
  c.iterations = 6
  c.batch_size = 8
  c.log_every = 1
  c.checkpoint_every = 2
  # A step of AdamW is about as long as the learning rate.
  c.optimiser.learning_rate = 1e-3
  if phase == 'teacher':
    c.videos.update(dict(num_frames=11, height=8, width=8))
    c.latents.update(dict(shard_size=4, batch_size=2))
    c.optimiser.warmup = 0
  elif phase != 'student_start':
    c.rollout_blocks = (2, 2)
    c.critic_optimiser.learning_rate = 1e-3
    c.distill.update(dict(loss_blocks=2, ema_start=2))
  return c
