"""What training at full size is lowered to for accelerators that are not here.

The programs of 1.3B with all 30 layers; nothing of their size is allocated.
"""

import re

import jax
import jax.numpy as jnp
import pytest

from hiar_jax import noise_schedule, rollout
from hiar_jax.denoiser import Denoiser
from hiar_jax.models import attention
from hiar_jax.models.config import WanConfig
from hiar_jax.training import distill_config, regression
from hiar_jax.training import state as training_state
from hiar_jax.training import steps as training_steps

MODEL = WanConfig.wan_1_3b(attention='auto')
STUDENT = Denoiser(MODEL)
ROLLOUT = rollout.RolloutConfig(
  levels=noise_schedule.warped_levels((1000, 750, 500, 250), 5.0)
)
OPTIMISER = training_state.make_optimiser(training_state.OptimiserConfig(), 10)
LATENTS = (21, MODEL.latent_height, MODEL.latent_width, MODEL.channels)
BLOCKS = 7


def array(*shape, dtype='float32'):
  return jax.ShapeDtypeStruct(shape, dtype)


def params():
  return jax.eval_shape(STUDENT.init, jax.random.key(0))


def net():
  return jax.eval_shape(
    lambda p: training_state.init_net(p, OPTIMISER), params()
  )


TEXT = array(1, MODEL.text_len, MODEL.text_dim)
TRAJECTORY = array(1, ROLLOUT.num_steps + 1, *LATENTS, dtype='float16')


def distillation_step(part, **numbers):
  steps = training_steps.Distillation(
    student=STUDENT,
    critic=STUDENT,
    teacher=STUDENT,
    student_optimiser=OPTIMISER,
    critic_optimiser=OPTIMISER,
    rollout=ROLLOUT,
    config=distill_config.DistillConfig(**numbers),
  )
  state = training_state.DistillState(
    iteration=array(dtype='int32'), student=net(), critic=net(), ema=params()
  )
  frozen = training_steps.Frozen(teacher=params(), negative_text=TEXT)
  batch = {'text': TEXT}
  if part == 'generator_step':
    batch |= {'trajectory': TRAJECTORY, 'trajectory_text': TEXT}
  key = jax.eval_shape(lambda: jax.random.key(0))

  def run(*arguments):
    return getattr(steps, part)(*arguments, num_blocks=BLOCKS)

  return run, (state, frozen, batch, key)


def start_step(context):
  step = regression.student_start_step(
    STUDENT, OPTIMISER, ROLLOUT, context=context, ema_decay=0.9
  )
  state = training_state.RegressionState(
    iteration=array(dtype='int32'), net=net(), ema=params()
  )
  batch = {'text': TEXT, 'trajectory': TRAJECTORY.update(dtype=jnp.float32)}
  return step, (state, batch, jax.eval_shape(lambda: jax.random.key(0)))


PROGRAMS = {
  'hiar': lambda: distillation_step('generator_step'),
  'public hiar': lambda: distillation_step(
    'generator_step',
    past_gradient='straight_through',
    forward_kl_attention='block_causal',
  ),
  'cached, block-first': lambda: distillation_step(
    'generator_step', order='block_first', forward_kl_attention='cached'
  ),
  'critic': lambda: distillation_step('critic_step'),
  'start': lambda: start_step('matched'),
  'random start': lambda: start_step('random'),
}


def over_all_keys(program: str) -> set[str]:
  """Types of a score or a truth for a number of queries by that of keys."""

  def is_wide(dims):
    *_, queries, keys = map(int, dims.split('x'))
    return keys >= 1560 and keys % 1560 == 0 and queries >= 128

  types = re.findall(r'tensor<((?:\d+x)+\d+)x(?:i1|f32|bf16)>', program)
  return {dims for dims in types if dims.count('x') and is_wide(dims)}


@pytest.fixture
def has_cudnn(monkeypatch):
  monkeypatch.setattr(attention, 'cudnn_refusal', lambda *arrays: '')
  from jax._src.cudnn import fused_attention_stablehlo

  monkeypatch.setattr(
    fused_attention_stablehlo, 'check_cudnn_version', lambda: 91000
  )


SLOW = ('hiar', 'cached, block-first', 'critic', 'random start')


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW))
    for name in PROGRAMS
  ],
)
def test_no_program_scores_or_masks_all_keys(has_cudnn, name):
  run, arguments = PROGRAMS[name]()
  traced = jax.jit(run).trace(*arguments)
  for platform, kernel in (('tpu', 'tpu_custom_call'), ('cuda', '__cudnn$f')):
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    assert program.count(kernel) > 2
    assert not over_all_keys(program)


def test_masks_and_scores_are_found_where_they_are():
  q, k = array(1, 3120, 2, 16), array(1, 4680, 2, 16)
  mask = array(3120, 4680, dtype='bool')
  attend = lambda *args: attention.attend(*args[:3], mask_TS=args[3])
  program = jax.jit(attend).trace(q, k, k, mask).lower().as_text()
  assert any(dims == '3120x4680' for dims in over_all_keys(program))
  chunked = lambda *args: attention.attend(*args, backend='chunked')
  program = jax.jit(chunked).trace(q, k, k).lower().as_text()
  assert over_all_keys(program)
