"""The drifting world: 24x24 videos of what only the context can carry on.

  hiar-jax train --config=drifting:teacher_start
  hiar-jax train --config=drifting:teacher
  hiar-jax trajectories --config=drifting
  hiar-jax train --config=drifting:student_start
  hiar-jax train --config=drifting:distill
  hiar-jax generate --config=drifting --prompt="a disc gliding" \
    --weights=runs/drifting/distill/weights.safetensors

The codec, principal components of 8x8 patches, is fitted to the first videos
when there is none yet. `hiar-jax study` trains its arms from this config.
"""

import dataclasses

import ml_collections

from hiar_jax.training.loop_config import LoopConfig

PHASES = (
  'teacher_start',
  'teacher',
  'student_start',
  'distill',
  'self_forcing',
)
_RUNS = 'runs/drifting'
_CHANNELS = 16
_FRAMES = 15


def get_config(phase: str = 'distill') -> ml_collections.ConfigDict:
  """The config of a phase; what several phases share is the same in all."""
  if phase not in PHASES:
    raise ValueError(f'phase {phase!r} is not one of {PHASES}')
  c = ml_collections.ConfigDict()
  c.name = 'drifting'
  c.phase = {'self_forcing': 'distill', 'teacher_start': 'teacher'}.get(
    phase, phase
  )
  c.workdir = f'{_RUNS}/{phase}'
  c.seed = 0

  # Softer and fewer than could be: what a network of this size learns in an
  # hour of one processor.
  c.world = dict(
    height=24,
    width=24,
    num_frames=_FRAMES,
    radius=(4.6, 6.2),
    orbit=(3.0, 5.0),
    period=(8.0, 13.0),
    edge=2.5,
    shapes=('disc', 'triangle'),
  )
  c.world_seed = 1
  c.prompts = dict(source='drifting')
  c.measures = 'drifting'  # Of sampled videos.
  c.text = dict(dim=32, length=4)
  c.negative_prompt = ''
  c.codec = dict(
    path=f'{_RUNS}/codec.npz',
    channels=_CHANNELS,
    whitening=0.5,
    num_videos=1024,
    videos=dict(source='drifting', seed=0),
  )
  c.model = dict(
    dim=96,
    ffn_dim=384,
    num_heads=2,
    num_layers=4,
    unroll=4,
    latent_height=3,
    latent_width=3,
    channels=_CHANNELS,
    patch=(1, 1),
    freq_dim=64,
    text_dim=32,
    text_len=4,
  )
  c.batch_size = 8
  c.log_every = 50
  c.checkpoint_every = 250
  # What does not change the result: checkpoints kept, services, samples.
  c.loop = dataclasses.asdict(LoopConfig())
  if phase in ('teacher_start', 'teacher'):
    return _teacher(c, phase)

  c.schedule = dict(shift=5.0, indices=(1000, 750, 500, 250))
  c.rollout = dict(
    frames_per_block=3,
    window=_FRAMES,
    sink=0,
    stepping='sde',
    context='matched',
  )
  c.teacher_weights = f'{_RUNS}/teacher/weights.safetensors'
  c.trajectories = dict(
    dir=f'{_RUNS}/trajectories',
    num=512,
    num_frames=_FRAMES,
    shard_size=32,
    batch_size=16,
    seed=1,
    num_steps=24,
    shift=5.0,
    guidance=2.0,
    points='student',
  )
  c.generate = dict(order='step_first', fps=8.0)
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


def _teacher(c, phase):
  c.iterations = 4500
  c.start_weights = ''
  c.videos = dict(source='drifting')
  c.caption_dropout = 0.1
  c.timestep_shift = 2.5
  c.ema_decay = 0.999
  c.optimiser = _muon(1e-2, 2.5e-3, warmup=100)
  if phase == 'teacher':  # Goes on, with other noise.
    c.iterations = 10000
    c.seed = 1
    c.start_weights = f'{_RUNS}/teacher_start/weights.safetensors'
    c.optimiser = _muon(6e-3, 1.5e-3, warmup=100)
  return c


def _student_start(c):
  c.iterations = 1000
  c.start_context = 'random'
  c.ema_decay = 0.98
  c.optimiser = _muon(2e-3, 1e-3, warmup=20)
  return c


def _distill(c, phase):
  c.iterations = 480
  c.rollout_blocks = (5, 5)
  c.student_weights = f'{_RUNS}/student_start/weights.safetensors'
  adamw = dict(name='adamw', b1=0.0, b2=0.99, weight_decay=0.01, warmup=10)
  c.optimiser = adamw | dict(learning_rate=2e-4, clip_norm=10.0)
  c.critic_optimiser = adamw | dict(learning_rate=2e-4, clip_norm=10.0)
  c.distill = dict(
    order='step_first',
    past_gradient='detached',
    loss_blocks=5,
    guidance=2.0,
    forward_kl_weight=0.1,
    forward_kl_steps=1,
    forward_kl_target='velocity',
    forward_kl_attention='bidirectional',
    generator_every=4,
    ema_decay=0.95,
    ema_start=80,
  )
  if phase == 'self_forcing':
    c.distill.order = 'block_first'
    c.generate.order = 'block_first'
    c.distill.forward_kl_weight = 0.0
  return c
