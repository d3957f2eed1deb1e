"""The small world: 64x64 videos of one moving shape, trained in two hours.

  python launch/train.py --config=configs/bouncing.py:teacher
  python launch/make_trajectories.py --config=configs/bouncing.py
  python launch/train.py --config=configs/bouncing.py:student_start
  python launch/train.py --config=configs/bouncing.py:distill
  python launch/generate.py --config=configs/bouncing.py --prompt "..."

`configs/bouncing.py:self_forcing` is the block-first baseline, trained by the
same program.
"""

import ml_collections

PHASES = ('teacher', 'student_start', 'distill', 'self_forcing')


def get_config(phase: str = 'distill') -> ml_collections.ConfigDict:
  """The config of a phase; what several phases share is the same in all."""
  if phase not in PHASES:
    raise ValueError(f'phase {phase!r} is not one of {PHASES}')
  c = ml_collections.ConfigDict()
  c.name = 'bouncing'
  c.phase = 'distill' if phase == 'self_forcing' else phase
  c.seed = 0
  c.workdir = f'runs/bouncing/{phase}'

  c.world = ml_collections.ConfigDict(dict(height=64, width=64, num_frames=21))
  c.world_seed = 1
  c.text = dict(dim=64, length=16)
  c.codec = dict(
    path='runs/bouncing/codec.npz', channels=16, num_videos=512, seed=0
  )
  c.model = dict(
    dim=128,
    ffn_dim=512,
    num_heads=4,
    num_layers=4,
    latent_height=8,
    latent_width=8,
    channels=16,
    freq_dim=64,
    text_dim=64,
    text_len=16,
  )
  c.schedule = dict(shift=5.0, indices=(1000, 750, 500, 250))
  c.rollout = dict(
    frames_per_block=3, window=21, sink=0, stepping='sde', context='matched'
  )
  c.order = 'step_first'

  c.iterations = 2500
  c.batch_size = 16
  c.log_every = 20
  c.checkpoint_every = 100
  c.ema_decay = 0.998
  c.ema_start = 0
  c.optimiser = dict(
    name='muon',
    learning_rate=3e-3,
    b1=0.9,
    b2=0.99,
    weight_decay=0.01,
    clip_norm=1.0,
    warmup=50,
    decay_to=0.02,
  )
  if phase == 'teacher':
    c.caption_dropout = 0.1
    c.timestep_shift = 3.0
  return c
