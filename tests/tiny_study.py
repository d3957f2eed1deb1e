"""A study so small that all of it takes a minute; a config file for programs.

hiar-jax study --config=tests/tiny_study.py:study,/tmp/tiny
"""

import pathlib

import ml_collections

from hiar_jax.configs import drifting, study

_FILE = pathlib.Path(__file__).resolve()


def get_config(arguments: str) -> ml_collections.ConfigDict:
  """'PHASE,ROOT': a phase of the drifting world, or 'study'."""
  phase, root = arguments.split(',')
  if phase != 'study':
    return _phase(phase, pathlib.Path(root))
  c = study.get_config()
  c.dir = f'{root}/study'
  c.train = _phase('distill', pathlib.Path(root))
  c.before = (
    (f'train --config={_FILE}:teacher,{root}', c.train.teacher_weights),
    (f'trajectories --config={_FILE}:distill,{root}', ''),
    (f'train --config={_FILE}:student_start,{root}', c.train.student_weights),
  )
  c.scenes, c.parts = 3, 2
  c.lengths, c.given = (4, 8), ((1, 8),)
  c.order = ('codec', 'teacher', 'start', 'A', 'B', 'D')
  c.seeds = (0, 1)
  c.picture.update(dict(kind=(8, 0), arms=('A', 'B')))
  return c


def _phase(phase, root):
  c = drifting.get_config(phase)
  c.workdir = str(root / phase)
  c.codec.path, c.codec.num_videos = str(root / 'codec.npz'), 8
  c.model.update(dict(dim=16, ffn_dim=16, num_layers=1, unroll=1, freq_dim=8))
  c.world.num_frames = 12
  c.iterations, c.batch_size = 2, 2
  c.log_every = c.checkpoint_every = 1
  if phase == 'teacher':
    c.start_weights = ''
    return c
  c.rollout.window = 12
  c.teacher_weights = str(root / 'teacher' / 'weights.safetensors')
  c.trajectories.update(
    dict(
      dir=str(root / 'trajectories'),
      num=4,
      num_frames=12,
      shard_size=4,
      batch_size=2,
      num_steps=4,
    )
  )
  if phase == 'student_start':
    return c
  c.student_weights = str(root / 'student_start' / 'weights.safetensors')
  c.rollout_blocks = (4, 4)
  c.distill.loss_blocks = 4
  return c
