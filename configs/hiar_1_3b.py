"""HiAR at full size: Wan2.1-T2V-1.3B, 480x832 pixels, four steps.

From published weights and a file of prompts, one a line, to a student:

  hiar-jax convert --weights Wan2.1-T2V-1.3B --out weights/wan2.1_1.3b
  hiar-jax convert --weights Wan2.1-T2V-14B --out weights/wan2.1_14b
  hiar-jax encode prompts --config=hiar_1_3b:prompts
  hiar-jax trajectories --config=hiar_1_3b:trajectories
  hiar-jax train --config=hiar_1_3b:student_start
  hiar-jax train --config=hiar_1_3b:distill
  hiar-jax export --config=hiar_1_3b:distill --out=hiar

To fine-tune the teacher on captioned videos first (docs/training_data.md):

  hiar-jax encode videos --config=hiar_1_3b:teacher
  hiar-jax encode prompts --config=hiar_1_3b:teacher
  hiar-jax train --config=hiar_1_3b:teacher

On several hosts every one of them is started as docs/multihost.md says. Does it
fit, and how long at least:

  hiar-jax plan --config=hiar_1_3b --topology v5e:2x2
  hiar-jax plan --config=hiar_1_3b --topology v5p:4x4x4 --part=training

Numbers are the paper's (arXiv:2603.08703); those of the student's start and of
the teacher's fine-tuning, which it does not give, are marked.
"""

import dataclasses

import ml_collections

from hiar_jax.models.config import WanConfig
from hiar_jax.text import tokens
from hiar_jax.training.loop_config import LoopConfig

PHASES = ('prompts', 'trajectories', 'teacher', 'student_start', 'distill')
_RUNS = 'runs/hiar_1_3b'


def get_config(phase: str = 'distill') -> ml_collections.ConfigDict:
  """The config of a phase; what several phases share is the same in all."""
  if phase not in PHASES:
    raise ValueError(f'phase {phase!r} is not one of {PHASES}')
  c = ml_collections.ConfigDict()
  c.name = 'hiar_1_3b'
  c.phase = phase
  c.workdir = f'{_RUNS}/{phase}'
  c.seed = 0
  # Scores of 4680 x 32,760 for 12 heads would fill an accelerator.
  c.model = dataclasses.asdict(WanConfig.wan_1_3b(attention='auto'))
  c.schedule = dict(shift=5.0, indices=(1000, 750, 500, 250))
  c.rollout = dict(
    frames_per_block=3, window=21, sink=0, stepping='sde', context='matched'
  )
  c.generate = dict(order='step_first', fps=16.0)

  # Made by `hiar-jax convert`.
  c.teacher_weights = 'weights/wan2.1_14b'
  c.critic_weights = 'weights/wan2.1_1.3b'
  c.trajectory_teacher_weights = 'weights/wan2.1_1.3b'
  c.student_weights = 'weights/wan2.1_1.3b'
  # Until the folder is there, for plans.
  c.teacher = dict(
    model=dataclasses.asdict(WanConfig.wan_14b(attention='auto')),
    dtype='bfloat16',
    placement='divided',
  )
  c.trajectory_teacher = dict(dtype='bfloat16', placement='divided')
  c.codec = dict(folder='weights/wan2.1_1.3b')

  # One a line, or JSON lines with `prompt`.
  c.prompts = dict(source='file', path='prompts.txt')
  c.text = dict(encoder='umt5', folder='weights/wan2.1_1.3b')
  c.negative_prompt = tokens.WAN_NEGATIVE_PROMPT
  c.states = dict(dir=f'{_RUNS}/states', num=0, shard_size=4096, batch_size=64)
  # 8 at a time on every host.
  c.trajectories = dict(
    dir=f'{_RUNS}/trajectories',
    num=20_000,
    shard_size=64,
    batch_size=8,
    seed=1,
    num_frames=21,
    solver='euler',
    num_steps=48,
    shift=8.0,
    guidance=6.0,
    points='student',
    # True: all hosts sample together, for a teacher larger than one of them;
    # `mesh` in this section says how it is divided.
    together=False,
  )

  # One sample to a chip of 64, parameters divided over all of them.
  c.mesh = dict(data=1, fsdp=-1, tensor=1, context=1)
  c.batch_size = 64
  c.log_every = 10
  c.checkpoint_every = 100
  # What does not change the result: checkpoints kept, services, samples.
  c.loop = dataclasses.asdict(LoopConfig())
  # One stage to a chip of four.
  c.plan = dict(topology='v5e:2x2', batch_size=1, weights_dtype='bfloat16')
  if phase == 'teacher':
    return _teacher(c)
  if phase == 'student_start':
    return _student_start(c)
  return _distill(c)


def _teacher(c):
  del c.prompts
  # mp4 and others, with captions.jsonl or a text file beside each.
  c.videos = dict(
    source='folder', path='videos', fps=16, num_frames=81, height=480, width=832
  )
  c.latents = dict(dir=f'{_RUNS}/latents', num=0, shard_size=64, batch_size=8)
  c.states.dir = f'{_RUNS}/caption_states'
  c.start_weights = 'weights/wan2.1_1.3b'
  c.caption_dropout = 0.1
  # Ours: the paper trains no teacher.
  c.timestep_shift = 5.0
  c.iterations = 3000
  c.microbatches = 1
  c.optimiser = dict(
    name='adamw',
    learning_rate=1e-5,
    b1=0.9,
    b2=0.999,
    weight_decay=0.01,
    clip_norm=1.0,
    warmup=100,
  )
  c.ema_decay = 0.999
  return c


def _student_start(c):
  c.start_context = 'random'
  # Ours: the paper names neither.
  c.iterations = 3000
  c.microbatches = 1
  c.optimiser = dict(
    name='adamw',
    learning_rate=2e-6,
    b1=0.0,
    b2=0.999,
    weight_decay=0.01,
    clip_norm=10.0,
  )
  c.ema_decay = 0.99
  return c


def _distill(c):
  c.student_weights = f'{_RUNS}/student_start/weights.safetensors'
  c.iterations = 20_000
  c.rollout_blocks = (7, 7)
  adamw = dict(name='adamw', b1=0.0, b2=0.999, weight_decay=0.01)
  adamw |= dict(clip_norm=10.0)
  c.optimiser = adamw | dict(learning_rate=2e-6)
  c.critic_optimiser = adamw | dict(learning_rate=3e-7)
  c.distill = dict(
    order='step_first',
    past_gradient='detached',
    guidance=4.0,
    forward_kl_weight=0.1,
    forward_kl_steps=1,
    forward_kl_target='velocity',
    forward_kl_attention='bidirectional',
    generator_every=5,
    ema_decay=0.99,
    ema_start=200,
    exit_pass='parallel',
    microbatches=1,
  )
  return c
