"""The small world behind a learnt codec: 4 frames of pixels to a latent frame.

  python launch/train.py --config=configs/bouncing_vae.py:codec_start
  python launch/train.py --config=configs/bouncing_vae.py:codec
  python launch/encode_videos.py --config=configs/bouncing_vae.py:teacher

and from there on the phases of `configs/bouncing.py`. Videos have 81 frames,
21 of latents, and objects move at 0.4 of the speed for each frame of pixels.
"""

import ml_collections

from configs import bouncing

PHASES = ('codec_start', 'codec', *bouncing.PHASES)
_RUNS = 'runs/bouncing_vae'
_CHANNELS = 8


def get_config(phase: str = 'distill') -> ml_collections.ConfigDict:
  """The config of a phase; what several phases share is the same in all."""
  if phase not in PHASES:
    raise ValueError(f'phase {phase!r} is not one of {PHASES}')
  trains_codec = phase in ('codec_start', 'codec')
  c = bouncing.get_config('teacher' if trains_codec else phase)
  c.name = 'bouncing_vae'
  c.workdir = f'{_RUNS}/{phase}'
  c.world = dict(
    height=64,
    width=64,
    num_frames=81,
    slow_speed=(0.3, 0.45),
    fast_speed=(0.8, 1.1),
  )
  c.codec = dict(path=f'{_RUNS}/codec/weights.safetensors')
  c.vae = dict(
    base_dim=16,
    z_dim=_CHANNELS,
    dim_mult=(1, 2, 3),
    num_res_blocks=1,
    temporal_downsample=(True, True),
    patch_size=2,
    mean=(0.0,) * _CHANNELS,
    std=(1.0,) * _CHANNELS,
  )
  c.model.channels = _CHANNELS
  if trains_codec:
    return _codec(c, phase)
  if phase == 'teacher':
    c.iterations = 7500
    c.latents = dict(
      dir=f'{_RUNS}/latents', num=6144, shard_size=256, batch_size=8
    )
    return c
  c.generate.fps = 16.0
  c.teacher_weights = f'{_RUNS}/teacher/weights.safetensors'
  c.trajectories.dir = f'{_RUNS}/trajectories'
  if phase != 'student_start':
    c.student_weights = f'{_RUNS}/student_start/weights.safetensors'
  return c


def _codec(c, phase):
  del c.caption_dropout, c.timestep_shift
  c.phase = 'codec'
  c.ema_decay = 0.995
  c.codec_training = dict(
    crop=32, num_frames=9, kl_weight=1e-3, start_weights=''
  )
  if phase == 'codec_start':
    c.iterations = 7000
    c.optimiser.update(dict(adam_learning_rate=3e-3, warmup=50))
    return c
  # A layer sees frames before it, 70 in all; in short clips most are padding.
  c.iterations = 1000
  c.batch_size = 2
  c.codec_training.update(
    dict(
      num_frames=73, start_weights=f'{_RUNS}/codec_start/weights.safetensors'
    )
  )
  c.optimiser.update(
    dict(learning_rate=3e-3, adam_learning_rate=1e-3, warmup=20)
  )
  return c
