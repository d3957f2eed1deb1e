"""The small world: 64x64 videos of one moving shape.

  python launch/train.py --config=configs/bouncing.py:teacher
  python launch/make_trajectories.py --config=configs/bouncing.py
  python launch/train.py --config=configs/bouncing.py:student_start
  python launch/train.py --config=configs/bouncing.py:distill
  python launch/generate.py --config=configs/bouncing.py --prompt "..."

`configs/bouncing.py:self_forcing` is the block-first baseline, trained by the
same program.
"""

import dataclasses

import ml_collections

from hiar_jax.loop_config import LoopConfig

PHASES = ('teacher', 'student_start', 'distill', 'self_forcing')
_RUNS = 'runs/bouncing'


def get_config(phase: str = 'distill') -> ml_collections.ConfigDict:
  """The config of a phase; what several phases share is the same in all."""
  if phase not in PHASES:
    raise ValueError(f'phase {phase!r} is not one of {PHASES}')
  c = ml_collections.ConfigDict()
  c.name = 'bouncing'
  c.phase = 'distill' if phase == 'self_forcing' else phase
  c.workdir = f'{_RUNS}/{phase}'
  c.seed = 0

  c.world = dict(height=64, width=64, num_frames=21)
  c.world_seed = 1
  c.text = dict(dim=64, length=16)
  c.codec = dict(
    path=f'{_RUNS}/codec.npz',
    channels=16,
    whitening=0.5,
    num_videos=512,
    seed=0,
  )
  c.model = dict(
    dim=128,
    ffn_dim=512,
    num_heads=2,
    num_layers=4,
    unroll=4,
    latent_height=8,
    latent_width=8,
    channels=16,
    freq_dim=64,
    text_dim=64,
    text_len=16,
  )
  c.batch_size = 8
  c.log_every = 20
  c.checkpoint_every = 200
  # What does not change the result: checkpoints kept, services, samples.
  c.loop = dataclasses.asdict(LoopConfig())
  if phase == 'teacher':
    return _teacher(c)

  c.schedule = dict(shift=5.0, indices=(1000, 750, 500, 250))
  c.rollout = dict(
    frames_per_block=3, window=21, sink=0, stepping='ode', context='matched'
  )
  c.teacher_weights = f'{_RUNS}/teacher/weights.safetensors'
  c.trajectories = dict(
    dir=f'{_RUNS}/trajectories',
    num=1024,
    shard_size=32,
    batch_size=8,
    seed=1,
    num_steps=24,
    shift=5.0,
    guidance=2.0,
    points='student',
  )
  c.generate = dict(order='step_first', fps=12.0)
  if phase == 'student_start':
    return _student_start(c)
  return _distill(c, phase)


def _muon(learning_rate: float, adam_learning_rate: float, warmup: int):
  return dict(
    name='muon',
    learning_rate=learning_rate,
    adam_learning_rate=adam_learning_rate,
    b1=0.9,
    b2=0.99,
    weight_decay=0.01,
    clip_norm=1.0,
    warmup=warmup,
    decay_to=0.02,
  )


def _teacher(c):
  c.iterations = 12000
  c.caption_dropout = 0.1
  c.timestep_shift = 2.5
  c.ema_decay = 0.999
  c.optimiser = _muon(1e-2, 2.5e-3, warmup=100)
  return c


def _student_start(c):
  c.iterations = 800
  c.start_context = 'matched'
  c.ema_decay = 0.98
  c.optimiser = _muon(2e-3, 1e-3, warmup=20)
  return c


def _distill(c, phase):
  c.iterations = 450
  c.rollout_blocks = (7, 7)
  c.student_weights = f'{_RUNS}/student_start/weights.safetensors'
  adamw = dict(name='adamw', b1=0.0, b2=0.99, weight_decay=0.01, warmup=10)
  c.optimiser = adamw | dict(learning_rate=2e-4, clip_norm=10.0)
  c.critic_optimiser = adamw | dict(learning_rate=2e-4, clip_norm=10.0)
  c.distill = dict(
    order='step_first',
    past_gradient='detached',
    guidance=2.0,
    forward_kl_weight=2.0,
    forward_kl_steps=4,
    forward_kl_target='velocity',
    forward_kl_attention='bidirectional',
    generator_every=3,
    ema_decay=0.95,
    ema_start=60,
  )
  if phase == 'self_forcing':
    c.distill.order = 'block_first'
    c.generate.order = 'block_first'
    c.distill.forward_kl_weight = 0.0
  return c
