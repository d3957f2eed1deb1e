"""Configs become phases, or one sentence before anything is compiled."""

import pathlib

import chex
import jax
import numpy as np
import pytest

from hiar_jax.data import trajectory_files
from hiar_jax.denoiser import Denoiser
from hiar_jax.models.config import WanConfig
from hiar_jax.runtime import errors
from hiar_jax.training import distillation_phase, phase_parts, phases
from hiar_jax.training import inputs as training_inputs
from hiar_jax.training import state as training_state
from hiar_jax.training import steps as training_steps
from hiar_jax.weights import networks
from tests import tiny


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
  """What earlier phases leave, not to be changed."""
  root = tmp_path_factory.mktemp('inputs')
  tiny.write_inputs(root)
  return root


@pytest.fixture
def no_work(monkeypatch):
  """The optimiser's state is the first thing that a phase computes."""

  def too_late(*args):
    raise AssertionError('work began before the config was checked')

  monkeypatch.setattr(training_state, 'init_net', too_late)


def mistake(config):
  """The one line that a user would see."""
  with pytest.raises((OSError, TypeError, ValueError)) as caught:
    phases.build(config)
  message = errors.users_mistake(caught.value)
  assert message and '\n' not in message
  return message


def weights_of(path):
  denoiser = Denoiser(WanConfig(**tiny.config('teacher', '').model))
  return networks.load_weights(path, tiny.random_params(denoiser, seed=0))


def assert_equal(a, b):
  chex.assert_trees_all_equal(a, b)


# --- What a phase is made of.


def test_student_start_begins_with_the_teachers_weights(inputs):
  config = tiny.config('student_start', inputs)
  phase = phases.build(config)
  teacher = weights_of(config.teacher_weights)
  assert_equal(phase.state.net.params, teacher)
  assert_equal(phase.weights(phase.state), teacher)
  batch = next(phase.batches)
  assert batch['latents'].shape == (2, 5, 6, 4, 4, 4)
  assert batch['text'].shape == (2, 4, 8)


@pytest.mark.slow
def test_teacher_begins_where_another_run_ended(inputs):
  config = tiny.config('teacher', inputs)
  drawn = phases.build(config).state.net.params
  config.start_weights = tiny.config('distill', inputs).teacher_weights
  params = phases.build(config).state.net.params
  assert_equal(params, weights_of(config.start_weights))
  with pytest.raises(AssertionError):
    assert_equal(params, drawn)


def test_distillation_begins_with_two_networks_of_earlier_phases(inputs):
  config = tiny.config('distill', inputs)
  state = phases.build(config).state
  student = weights_of(config.student_weights)
  assert_equal(state.student.params, student)
  assert_equal(state.ema, student)
  assert_equal(state.critic.params, weights_of(config.teacher_weights))


def test_a_first_state_may_be_donated(inputs):
  state = phases.build(tiny.config('distill', inputs)).state
  moved = jax.jit(lambda x: x, donate_argnums=0)(jax.device_put(state))
  assert int(moved.iteration) == 0


def test_forward_kl_gets_trajectories_beside_the_prompts(inputs):
  config = tiny.config('distill', inputs)
  encoder = training_inputs.open_text(config)
  states = training_inputs.open_states(
    config, training_inputs.open_prompts(config), encoder
  )
  trajectories = phase_parts.trajectory_source(config, encoder)
  pairs = distillation_phase.StatesAndTrajectories(states, trajectories)
  assert len(pairs) == len(states) > len(trajectories) == 4
  element = pairs[6]
  np.testing.assert_array_equal(element['text'], states[6]['text'])
  np.testing.assert_array_equal(
    element['trajectory'], trajectories[2]['latents']
  )
  np.testing.assert_array_equal(
    element['trajectory_text'], trajectories[2]['text']
  )


def test_without_forward_kl_no_trajectory_is_read(inputs, tmp_path):
  config = tiny.config('self_forcing', inputs)
  config.trajectories.dir = str(tmp_path / 'none')
  assert next(phases.build(config).batches).keys() == {'index', 'text'}


def test_codec_is_fitted_once(tmp_path):
  config = tiny.config('teacher', tmp_path)
  fitted = training_inputs.open_codec(config)
  written = pathlib.Path(config.codec.path)
  time = written.stat().st_mtime_ns
  read = training_inputs.open_codec(config)
  assert written.stat().st_mtime_ns == time
  assert_equal(
    [fitted.mean_P, fitted.encoder_PC], [read.mean_P, read.encoder_PC]
  )
  assert [path.name for path in tmp_path.iterdir()] == ['codec.npz']


def test_host_draws_follow_from_seed_and_iteration(inputs, monkeypatch):
  traced = []

  def generator_step(
    steps,
    state,
    frozen,
    batch,
    key,
    *,
    num_blocks,
    most_before=None,
    forward_kl_step,
  ):
    traced.append(num_blocks)
    return state, {'generator': num_blocks, 'forward_kl_step': forward_kl_step}

  def critic_step(
    steps, state, frozen, batch, key, *, num_blocks, most_before=None
  ):
    return state, {'critic': num_blocks}

  monkeypatch.setattr(
    training_steps.Distillation, 'generator_step', generator_step
  )
  monkeypatch.setattr(training_steps.Distillation, 'critic_step', critic_step)
  config = tiny.config('distill', inputs)
  config.rollout_blocks = (2, 4)
  config.distill.update(dict(forward_kl_steps=2, generator_every=3))

  def draws(seed, iterations):
    config.seed = seed
    phase = phases.build(config)
    state, batch = phase.state, next(phase.batches)
    for iteration in iterations:
      state, metrics = phase.step(state, batch, iteration)
      yield jax.tree.map(int, metrics)

  run = list(draws(0, range(24)))
  assert {m['critic'] for m in run} == {2, 3, 4}
  assert {m['forward_kl_step'] for m in run[::3]} == {0, 1}
  # A program for each length, and none for each step of the forward KL.
  assert sorted(traced) == [2, 3, 4]
  assert all(m['generator'] == m['critic'] for m in run[::3])
  assert all(m.keys() == {'critic'} for i, m in enumerate(run) if i % 3)
  assert list(draws(0, range(12, 24))) == run[12:]
  assert list(draws(1, range(24))) != run


# --- Mistakes.


@pytest.mark.parametrize('phase', ['teacher', 'student_start'])
@pytest.mark.parametrize('parts', [0, 3])
def test_microbatches_that_do_not_divide(no_work, inputs, phase, parts):
  config = tiny.config(phase, inputs)
  with config.unlocked():
    config.microbatches = parts
  assert mistake(config) == (
    f'microbatches={parts} is not a divisor of batch_size=2'
  )


def test_unknown_phase(no_work, inputs):
  config = tiny.config('teacher', inputs)
  config.phase = 'pupil'
  assert mistake(config) == (
    "phase 'pupil' is not one of ['codec', 'distill', 'student_start', "
    "'teacher']"
  )


@pytest.mark.parametrize(
  'name', ['iterations', 'batch_size', 'log_every', 'checkpoint_every']
)
def test_numbers_below_one(no_work, inputs, name):
  config = tiny.config('teacher', inputs)
  config[name] = 0
  assert mistake(config) == f'{name}=0 is not at least 1'


@pytest.mark.parametrize(
  ('phase', 'section'),
  [
    ('teacher', 'world'),
    ('teacher', 'text'),
    ('teacher', 'model'),
    ('teacher', 'optimiser'),
    ('student_start', 'rollout'),
    ('distill', 'distill'),
    ('distill', 'critic_optimiser'),
  ],
)
def test_a_misspelt_key_is_named(no_work, inputs, phase, section):
  config = tiny.config(phase, inputs)
  config[section].dpeth = 3
  assert "unexpected keyword argument 'dpeth'" in mistake(config)


@pytest.mark.parametrize(
  ('phase', 'key'),
  [
    ('student_start', 'teacher_weights'),
    ('distill', 'teacher_weights'),
    ('distill', 'student_weights'),
  ],
)
def test_missing_weights_of_an_earlier_phase(no_work, inputs, phase, key):
  config = tiny.config(phase, inputs)
  config[key] = str(inputs / 'absent' / 'weights.safetensors')
  assert mistake(config) == (
    f'no weights at {config[key]}; the phase absent of the config ends with '
    'them'
  )
  config[key] = str(inputs / 'wan')
  assert mistake(config) == (
    f'no weights at {config[key]}; `hiar-jax convert` makes such folders of '
    'published weights'
  )


def test_weights_of_another_size(no_work, inputs):
  config = tiny.config('student_start', inputs)
  config.model.ffn_dim = 24
  message = mistake(config)
  assert 'layers/ffn_in/bias has shape (2, 16), not (2, 24)' in message


@pytest.mark.parametrize('phase', ['student_start', 'distill'])
def test_missing_trajectories(no_work, inputs, phase, tmp_path):
  config = tiny.config(phase, inputs)
  config.trajectories.dir = str(tmp_path / 'none')
  assert str(tmp_path / 'none') in mistake(config)


def test_incomplete_trajectories(no_work, tmp_path):
  tiny.write_inputs(tmp_path)
  config = tiny.config('student_start', tmp_path)
  trajectory_files.Manifest.path(config.trajectories.dir, 1).unlink()
  assert '1 of 2 files of trajectories are missing' in mistake(config)


def test_trajectories_at_other_levels(no_work, inputs):
  config = tiny.config('student_start', inputs)
  config.schedule.shift = 3.0
  assert 'training needs them at (1.0, 0.9, 0.75, 0.5, 0.0)' in mistake(config)


def test_trajectories_that_do_not_divide_into_blocks(no_work, inputs):
  config = tiny.config('student_start', inputs)
  config.rollout.update(dict(frames_per_block=4, window=8))
  message = mistake(config)
  assert '6 frames, not a multiple of frames_per_block=4' in message


@pytest.mark.parametrize('blocks', [(0, 2), (3, 2)])
def test_rollout_blocks_that_do_not_rise(no_work, inputs, blocks):
  config = tiny.config('distill', inputs)
  config.rollout_blocks = blocks
  assert mistake(config) == f'rollout_blocks={blocks} do not rise from 1'


@pytest.mark.parametrize(
  ('key', 'value', 'message'),
  [
    ('rollout.window', 7, 'window=7 is not a positive multiple of'),
    ('rollout.context', 'dirty', "context='dirty' is not one of"),
    ('distill.order', 'hybrid', "order='hybrid' is not one of"),
    ('distill.forward_kl_steps', 5, 'forward_kl_steps=5 is more than the 4'),
    ('batch_size', 2**21, 'batch_size=2097152 must be in [1, 1048576]'),
    ('seed', -1, 'seed=-1 must be in [0, 2**32)'),
  ],
)
def test_values_that_do_not_fit(no_work, inputs, key, value, message):
  config = tiny.config('distill', inputs)
  config.update_from_flattened_dict({key: value})
  assert message in mistake(config)
