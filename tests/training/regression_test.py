"""Steps of teacher and student start: what each one sees and measures.

A network of two layers on latents of 2x4, two tokens a frame.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax import noise_schedule, rollout
from hiar_jax.denoiser import Denoiser
from hiar_jax.training import regression
from hiar_jax.training import state as training_state
from tests import tiny

DENOISER = tiny.DENOISER
ROLLOUT = rollout.RolloutConfig(
  levels=noise_schedule.warped_levels((1000, 750, 500, 250), 5.0),
  frames_per_block=2,
  window=4,
)
OPTIMISER = training_state.make_optimiser(
  training_state.OptimiserConfig(learning_rate=1e-3), 100
)
BATCH, BLOCKS = 2, 3
FRAMES = BLOCKS * ROLLOUT.frames_per_block


def equal(a, b):
  return all(
    jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))
  )


@functools.cache
def batch():
  rng = np.random.default_rng(7)
  shape = (BATCH, ROLLOUT.num_steps + 1, FRAMES, 2, 4, 2)
  return {
    'text': rng.normal(size=(BATCH, 3, 8)).astype(np.float32),
    'trajectory': rng.normal(size=shape).astype(np.float32),
  }


def regression_state(params):
  return training_state.RegressionState(
    iteration=jnp.zeros((), jnp.int32),
    net=training_state.init_net(params, OPTIMISER),
    ema=params,
  )


def test_teacher_step_lowers_the_loss_on_a_fixed_batch():
  optimiser = training_state.make_optimiser(
    training_state.OptimiserConfig('adamw', learning_rate=0.02, b1=0.9), 20
  )
  params = jax.jit(DENOISER.init)(jax.random.key(0))
  state = training_state.RegressionState(
    iteration=jnp.zeros((), jnp.int32),
    net=training_state.init_net(params, optimiser),
    ema=params,
  )
  step = jax.jit(
    regression.teacher_step(
      DENOISER, optimiser, timestep_shift=3.0, ema_decay=0.9
    )
  )
  fixed = {'latents': batch()['trajectory'][:, 0], 'text': batch()['text']}
  first, metrics = step(state, fixed, jax.random.key(1))
  # The first average has decay (1 + 0) / (10 + 0), not the 0.9 asked for.
  jax.tree.map(
    lambda ema, old, new: np.testing.assert_allclose(
      ema, 0.1 * old + 0.9 * new, atol=1e-6
    ),
    first.ema,
    params,
    first.net.params,
  )
  trace, state = [metrics['loss']], first
  for _ in range(20):
    state, metrics = step(state, fixed, jax.random.key(1))
    trace.append(metrics['loss'])
  assert state.iteration == 21
  assert trace[-1] < 0.7 * trace[0], np.array(trace)
  # A batch that is not finite counts as an iteration, and changes nothing else.
  poisoned = fixed | {'text': np.full_like(fixed['text'], np.nan)}
  after, metrics = step(state, poisoned, jax.random.key(1))
  assert metrics['skipped'] and not np.isfinite(metrics['loss'])
  assert equal((after.net, after.ema), (state.net, state.ema))
  assert after.iteration == 22


@pytest.fixture(scope='module')
def student_start_run():
  """One step, and what the network was given and answered in it."""
  seen = {}

  def watched(denoiser, params, x, sigma, text, **kwargs):
    x0 = Denoiser.x0(denoiser, params, x, sigma, text, **kwargs)
    jax.debug.callback(lambda *a: seen.update(values=a), x, sigma, x0)
    return x0

  class Watched(Denoiser):
    x0 = watched

  step = regression.student_start_step(
    Watched(DENOISER.config),
    OPTIMISER,
    ROLLOUT,
    context='random',
    ema_decay=0.9,
  )
  state = regression_state(tiny.random_params(DENOISER, 0))
  # Key 5 draws level 0 for some blocks and not for others.
  _, metrics = jax.jit(step)(state, batch(), jax.random.key(5))
  jax.effects_barrier()
  x, sigma, x0 = map(np.asarray, seen['values'])
  return x, sigma, x0, float(metrics['loss'])


def test_student_start_puts_each_block_at_a_level_of_its_own(
  student_start_run,
):
  x, sigma_BF, _, _ = student_start_run
  by_block = sigma_BF.reshape(BATCH, BLOCKS, -1)
  assert np.all(by_block == by_block[:, :, :1])
  assert all(len(set(levels)) > 1 for levels in by_block[:, :, 0])
  for b, f in np.ndindex(sigma_BF.shape):
    point = np.argmin(np.abs(np.array(ROLLOUT.levels) - sigma_BF[b, f]))
    np.testing.assert_allclose(sigma_BF[b, f], ROLLOUT.levels[point], rtol=1e-6)
    np.testing.assert_array_equal(x[b, f], batch()['trajectory'][b, point, f])


def test_student_start_asks_nothing_of_clean_blocks(student_start_run):
  x, sigma_BF, x0, loss = student_start_run
  end = batch()['trajectory'][:, -1]
  clean = sigma_BF == 0
  assert clean.any() and not clean.all()
  np.testing.assert_array_equal(x0[clean], end[clean])
  np.testing.assert_array_equal(x[clean], end[clean])
  error = np.square(x0 - end)
  assert error[~clean].min(axis=(1, 2, 3)).max() > 0
  np.testing.assert_allclose(loss, error[~clean].sum() / error.size, rtol=1e-5)


def test_matched_start_is_the_rollout_on_the_trajectory():
  """x0 of every block as a sampler with its ring cache would name it."""
  params = tiny.random_params(DENOISER, 0)
  step = regression.student_start_step(
    DENOISER, OPTIMISER, ROLLOUT, context='matched', ema_decay=0.9
  )
  key = jax.random.key(1)
  _, metrics = jax.jit(step)(regression_state(params), batch(), key)

  trajectory = batch()['trajectory']
  steps = jax.random.randint(key, (BATCH,), 0, ROLLOUT.num_steps)
  assert len(set(map(int, steps))) > 1
  size = ROLLOUT.frames_per_block
  errors = []
  for b, j in enumerate(map(int, steps)):
    text = DENOISER.project_text(params, batch()['text'][b : b + 1])
    sampler = rollout.Sampler(DENOISER, params, text, ROLLOUT)
    past = sampler.empty_past()
    for first in range(0, trajectory.shape[2], size):
      block = trajectory[b : b + 1, :, first : first + size]
      flow, _ = sampler.denoise(block[:, j], past, j)
      x0 = noise_schedule.flow_to_x0(block[:, j], flow, ROLLOUT.levels[j])
      errors.append(np.square(x0 - block[:, -1]).mean())
      level = jnp.asarray(ROLLOUT.levels[j + 1])
      past = past.write(sampler.commit_kv(block[:, j + 1], past, level))
  np.testing.assert_allclose(metrics['loss'], np.mean(errors), rtol=1e-4)


def test_an_unknown_start_context_is_named():
  with pytest.raises(ValueError, match="'clean' is not one of"):
    regression.student_start_step(
      DENOISER, OPTIMISER, ROLLOUT, context='clean', ema_decay=0.9
    )


@pytest.mark.parametrize('phase', ['teacher', 'matched', 'random'])
def test_microbatches_make_the_update_of_the_whole_batch(phase):
  both = jax.tree.map(lambda x: np.concatenate([x, x[::-1] + 1]), batch())
  both['latents'] = both['trajectory'][:, 0]
  ends = []
  for num_parts in (1, 2):
    numbers = dict(ema_decay=0.9, num_parts=num_parts)
    if phase == 'teacher':
      step = regression.teacher_step(
        DENOISER, OPTIMISER, timestep_shift=3.0, **numbers
      )
    else:
      step = regression.student_start_step(
        DENOISER, OPTIMISER, ROLLOUT, context=phase, **numbers
      )
    state = regression_state(tiny.random_params(DENOISER, 0))
    ends.append(jax.jit(step)(state, both, jax.random.key(1))[1])
  for name in ('loss', 'grad_norm'):
    np.testing.assert_allclose(ends[1][name], ends[0][name], rtol=2e-5)
