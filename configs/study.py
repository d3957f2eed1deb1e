"""The study: the paper's claims on the drifting world, from zero.

  hiar-jax study --config=study

trains teacher, trajectories and start if they are not there, then every arm
with every seed, makes its videos, measures them and writes the report. Kill it
and start it again: it goes on. What the arms are is said beside them.
"""

import ml_collections

from hiar_jax.configs import drifting

_RUNS = 'runs/study'


def get_config() -> ml_collections.ConfigDict:
  """What is trained before the arms, the arms, and what is measured of them."""
  c = ml_collections.ConfigDict()
  c.dir = _RUNS
  c.train = drifting.get_config('distill')
  teacher_start = drifting.get_config('teacher').start_weights
  # What the arms share, by the first file that is missing.
  c.before = (
    ('train --config=drifting:teacher_start', teacher_start),
    ('train --config=drifting:teacher', c.train.teacher_weights),
    ('trajectories --config=drifting', ''),
    ('train --config=drifting:student_start', c.train.student_weights),
  )
  c.scenes = 64
  c.seed = 0  # Of the videos' noise.
  c.parts = 5  # Of the shortest videos' curves; longer ones have three times.
  # Blocks of a video: 1x, 4x, 16x the training's.
  c.lengths = (5, 20, 80)
  # Blocks of the truth that a video begins with, and its blocks in all.
  c.given = ((1, 20),)
  c.order = (
    *(
      'codec',
      'teacher',
      'start',
      'A',
      'D',
      'C',
      'B',
      'H',
      'I',
      'Ds',
      'G',
      'E',
    ),
    *('F2', 'F4', 'W', 'J'),
  )
  c.seeds = (0, 1, 2)
  c.arms = _arms()
  # Columns of the tables: key, heading, style, what it is.
  c.columns = (
    ('identity.overlap', 'quality', '.3f', "overlap with the prompt's shape"),
    ('identity.semantic', 'semantic', '.3f', 'shape and kind of motion right'),
    ('identity.motion', 'px/frame', '.2f', 'median speed of the shape'),
    ('statistics.sharpness', 'sharp', '.0f', 'variance of the Laplacian'),
    ('statistics.drift', 'drift', '.3f', 'slopes over five segments'),
    ('identity.hue', 'hue', '.1f', "the shape's, degrees off"),
    ('identity.gradient', 'gradient', '.3f', "the ground's two hues, off"),
    ('identity.texture', 'texture', '.3f', 'correlation, 1 is the same'),
    ('identity.size', 'size', '.2f', '|log2| of the ratio'),
    ('identity.speed', 'speed', '.2f', '|log2| of the ratio'),
  )
  c.curves = (
    ('hue', 'hue of the shape, degrees off'),
    ('gradient', "the ground's two hues, off"),
    ('texture', 'texture, correlation'),
    ('overlap', "overlap with the prompt's shape"),
    ('motion', 'px per frame'),
    ('size', 'size, |log2| of the ratio'),
    ('sharpness', 'sharpness, |log2| of the ratio'),
    ('saturation', 'saturation of the shape, |log2| of the ratio'),
  )
  # Arms beside each other in charts, four at most.
  c.charts = (
    ('A', 'B', 'C', 'D'),
    ('D', 'E', 'F2', 'F4'),
    ('D', 'G', 'H', 'J'),
    ('D', 'Ds', 'I', 'W'),
  )
  # Of curves.svg: blocks of a video and given ones, arms, curves.
  c.picture = dict(
    kind=(80, 0),
    arms=('A', 'B', 'C', 'D'),
    curves=('gradient', 'hue', 'texture', 'motion'),
  )
  # Every arm minus this one, scene by scene.
  c.against = 'D'
  c.paper = (
    ('A', dict(quality=0.829, dynamic=0.542, drift=0.355)),
    ('B', dict(quality=0.767, dynamic=0.512, drift=0.309)),
    ('C', dict(quality=0.839, dynamic=0.445, drift=0.218)),
    ('D', dict(quality=0.846, dynamic=0.686, drift=0.257)),
    ('E', dict(quality=0.828, dynamic=0.625, drift=0.271)),
    ('F2', dict(quality=0.835, dynamic=0.693, drift=0.296)),
    ('F4', dict(quality=0.813, dynamic=0.691, drift=0.306)),
    ('G', dict(quality=0.799, drift=0.184)),
  )
  return c


def _arms():
  """What each arm changes.

  train: of config.train, over the arm `as` if it has one; missing: the arm is
    not trained, and has the weights of `weights`.
  run: how its videos are made, where not as it was trained.
  seeds: how many of config.seeds it is trained with.
  """
  block_first = dict(
    distill=dict(order='block_first'), generate=dict(order='block_first')
  )
  no_forward = dict(distill=dict(forward_kl_weight=0.0))

  def forward(**changes):
    return dict(distill={f'forward_kl_{k}': v for k, v in changes.items()})

  return dict(
    codec=dict(says='true videos, encoded and decoded', run='codec', seeds=1),
    teacher=dict(says='the teacher, both ways in time', run='teacher', seeds=1),
    start=dict(says='the start, block-first', run='block_first', seeds=1),
    A=dict(
      says='Self-Forcing: block-first, clean context, no forward KL',
      train=(block_first, no_forward),
      seeds=3,
    ),
    B=dict(
      says='A run step-first, not retrained',
      weights='A',
      run='step_first',
      seeds=3,
    ),
    C=dict(says='HiAR without forward KL', train=(no_forward,), seeds=3),
    D=dict(says='HiAR: forward KL bidirectional, K = 1', train=(), seeds=3),
    E=dict(
      says='D, forward KL block-causal',
      train=(forward(attention='block_causal'),),
      seeds=1,
    ),
    F2=dict(says='D, K = 2', train=(forward(steps=2),), seeds=1),
    F4=dict(says='D, K = 4', train=(forward(steps=4),), seeds=1),
    W=dict(
      says='D, forward KL of weight 1',
      train=(forward(weight=1.0),),
      seeds=1,
    ),
    G=dict(
      says='D, context at t_j',
      train=(dict(rollout=dict(context='input')),),
      seeds=1,
    ),
    H=dict(
      says='D, ODE for SDE',
      train=(dict(rollout=dict(stepping='ode')),),
      seeds=1,
    ),
    I=dict(
      says='D, shared context, trained as such',
      train=(dict(rollout=dict(context='shared')),),
      seeds=1,
    ),
    Ds=dict(
      says='D run with shared context',
      weights='D',
      run='step_first:shared',
      seeds=3,
    ),
    J=dict(
      says='D, straight-through past gradient',
      train=(dict(distill=dict(past_gradient='straight_through')),),
      seeds=1,
    ),
  )
