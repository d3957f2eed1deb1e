"""The small world: 64x64 videos of one moving shape.

  hiar-jax train --config=bouncing:codec_start
  hiar-jax train --config=bouncing:codec
  hiar-jax encode videos --config=bouncing:teacher_start
  hiar-jax train --config=bouncing:teacher_start
  hiar-jax train --config=bouncing:teacher
  hiar-jax encode videos --config=bouncing:teacher_last
  hiar-jax train --config=bouncing:teacher_last
  hiar-jax trajectories --config=bouncing
  hiar-jax train --config=bouncing:student_start
  hiar-jax train --config=bouncing:distill
  hiar-jax generate --config=bouncing --prompt "..."

All of it small, in minutes: configs/bouncing_smoke.py.
`configs/bouncing.py:self_forcing` is the block-first baseline, trained by the
same program.
"""

import dataclasses

import ml_collections

from hiar_jax.training.loop_config import LoopConfig

PHASES = (
  'codec_start',
  'codec',
  'teacher_start',
  'teacher',
  'teacher_last',
  'student_start',
  'distill',
  'self_forcing',
)
_RUNS = 'runs/bouncing'


def get_config(phase: str = 'distill') -> ml_collections.ConfigDict:
  """The config of a phase; what several phases share is the same in all."""
  if phase not in PHASES:
    raise ValueError(f'phase {phase!r} is not one of {PHASES}')
  c = ml_collections.ConfigDict()
  c.name = 'bouncing'
  c.phase = {
    'self_forcing': 'distill',
    'codec_start': 'codec',
    'teacher_start': 'teacher',
    'teacher_last': 'teacher',
  }.get(phase, phase)
  c.workdir = f'{_RUNS}/{phase}'
  c.seed = 0

  c.world = dict(
    height=64,
    width=64,
    num_frames=81,
    small_radius=(9.0, 10.5),
    slow_speed=(0.3, 0.45),
    fast_speed=(0.75, 1.0),
    free_caption_rate=0.25,
  )
  c.world_seed = 1
  c.prompts = dict(source='bouncing')
  c.measures = 'bouncing'  # Of sampled videos.
  c.text = dict(dim=64, length=16)
  c.negative_prompt = ''
  c.codec = dict(path=f'{_RUNS}/codec/weights.safetensors')
  c.vae = dict(
    base_dim=16,
    z_dim=8,
    dim_mult=(1, 2, 3),
    num_res_blocks=1,
    temporal_downsample=(True, True),
    patch_size=2,
    mean=(0.0,) * 8,
    std=(1.0,) * 8,
  )
  c.model = dict(
    dim=128,
    ffn_dim=512,
    num_heads=2,
    num_layers=4,
    unroll=4,
    latent_height=8,
    latent_width=8,
    channels=8,
    freq_dim=64,
    text_dim=64,
    text_len=16,
  )
  c.batch_size = 8
  c.log_every = 20
  c.checkpoint_every = 200
  # What does not change the result: checkpoints kept, services, samples.
  c.loop = dataclasses.asdict(LoopConfig())
  if phase in ('codec_start', 'codec'):
    return _codec(c, phase)
  if phase in ('teacher_start', 'teacher'):
    return _teacher(c, phase)
  c.world_seed = 5
  if phase == 'teacher_last':
    return _teacher(c, phase)

  c.schedule = dict(shift=5.0, indices=(1000, 750, 500, 250))
  c.rollout = dict(
    frames_per_block=3, window=21, sink=0, stepping='ode', context='matched'
  )
  c.teacher_weights = f'{_RUNS}/teacher_last/weights.safetensors'
  c.trajectories = dict(
    dir=f'{_RUNS}/trajectories',
    num=1024,
    num_frames=21,
    shard_size=32,
    batch_size=8,
    seed=1,
    num_steps=24,
    shift=5.0,
    guidance=3.0,
    points='student',
  )
  c.generate = dict(order='step_first', fps=16.0)
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


def _codec(c, phase):
  c.ema_decay = 0.995
  c.clips = dict(source='bouncing', num_frames=9, crop=32)
  c.codec_training = dict(kl_weight=1e-3, start_weights='')
  if phase == 'codec_start':
    c.iterations = 7000
    c.optimiser = _muon(1e-2, 3e-3, warmup=50)
    return c
  # A layer sees frames before it, 70 in all; in short clips most are padding.
  c.iterations = 1000
  c.batch_size = 2
  c.clips.num_frames = 73
  c.codec_training.start_weights = f'{_RUNS}/codec_start/weights.safetensors'
  c.optimiser = _muon(3e-3, 1e-3, warmup=20)
  return c


def _teacher(c, phase):
  c.iterations = 7500
  c.start_weights = ''
  c.videos = dict(source='bouncing')
  c.caption_dropout = 0.1
  c.latents = dict(
    dir=f'{_RUNS}/latents', num=6144, shard_size=256, batch_size=8
  )
  c.timestep_shift = 2.5
  c.ema_decay = 0.999
  c.optimiser = _muon(1e-2, 2.5e-3, warmup=100)
  if phase == 'teacher':  # Goes on, with other noise.
    c.iterations = 5500
    c.seed = 1
    c.start_weights = f'{_RUNS}/teacher_start/weights.safetensors'
    c.optimiser = _muon(6e-3, 1.5e-3, warmup=100)
  if phase == 'teacher_last':  # With other videos, and more of its noise.
    c.iterations = 3400
    c.seed = 3
    c.start_weights = f'{_RUNS}/teacher/weights.safetensors'
    c.latents.update(dir=f'{_RUNS}/latents_last', num=2560)
    c.timestep_shift = 3.0
    c.optimiser = _muon(5e-3, 1.5e-3, warmup=50)
  return c


def _student_start(c):
  c.iterations = 1400
  c.start_context = 'matched'
  c.ema_decay = 0.98
  c.optimiser = _muon(2e-3, 1e-3, warmup=20)
  return c


def _distill(c, phase):
  c.iterations = 240
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
