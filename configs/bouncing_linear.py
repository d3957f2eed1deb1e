"""The small world behind a linear codec, which is fitted in seconds.

  hiar-jax train --config=bouncing_linear:teacher

and from there on the phases of `configs/bouncing.py`. A latent frame is one
frame of pixels: videos of 21 frames, in which objects move 2.5 times as far
from one to the next. No weights of it come with the package.
"""

import ml_collections

from hiar_jax.configs import bouncing

PHASES = ('teacher', 'student_start', 'distill', 'self_forcing')
_RUNS = 'runs/bouncing_linear'
_CHANNELS = 16


def get_config(phase: str = 'distill') -> ml_collections.ConfigDict:
  """The config of a phase; what several phases share is the same in all."""
  if phase not in PHASES:
    raise ValueError(f'phase {phase!r} is not one of {PHASES}')
  c = bouncing.get_config('teacher_start' if phase == 'teacher' else phase)
  c.name = 'bouncing_linear'
  c.workdir = f'{_RUNS}/{phase}'
  c.world = dict(height=64, width=64, num_frames=21)
  del c.vae
  c.codec = dict(
    path=f'{_RUNS}/codec.npz',
    channels=_CHANNELS,
    whitening=0.5,
    num_videos=512,
    videos=dict(source='bouncing', seed=0),
  )
  c.model.channels = _CHANNELS
  if phase == 'teacher':
    c.iterations = 12000
    del c.latents
    return c
  c.generate.fps = 12.0
  c.teacher_weights = f'{_RUNS}/teacher/weights.safetensors'
  c.trajectories.update(
    dict(dir=f'{_RUNS}/trajectories', num=1024, num_frames=21, guidance=2.0)
  )
  if phase == 'student_start':
    c.iterations = 800
    return c
  c.iterations = 450
  c.student_weights = f'{_RUNS}/student_start/weights.safetensors'
  return c
