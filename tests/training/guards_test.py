"""An update that is not finite is left out, said, and not repeated for ever."""

import contextlib
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.data import bouncing, sources
from hiar_jax.runtime import errors
from hiar_jax.text import word_hash
from hiar_jax.training import checkpoint, guards, inputs, phase_parts, phases
from hiar_jax.training import loop as training_loop
from hiar_jax.training import state as training_state
from tests import tiny


def guard(max_skipped=3):
  stream = io.StringIO()
  return guards.Guard(max_skipped, stream=stream), stream


def test_values_are_means_and_skips_are_counts():
  watch, stream = guard()
  watch.add(1, np.array([4, 2]), {'loss': jnp.float32(1), 'skipped': False})
  watch.add(2, np.array([7, 2]), {'loss': jnp.nan, 'skipped': jnp.bool_(True)})
  watch.add(3, np.array([9, 3]), {'loss': 2.0, 'skipped': False})
  report = watch.report()
  assert report.exhausted is None
  assert report.values == {
    'loss': 1.5,
    'skipped': 1,
    'skipped_iterations': [2],
    'skipped_elements': [2, 7],
  }
  assert stream.getvalue() == (
    'iteration 2: the update was not finite and is left out (loss nan); data '
    'elements [7, 2]\n'
  )
  assert watch.report() == guards.Report({}, None)


def test_losses_are_apart_for_each_exit_step():
  watch, _ = guard()
  for iteration, (exit_step, loss) in enumerate([(0, 4.0), (2, 1.0), (2, 3.0)]):
    watch.add(iteration, None, {'exit_step': exit_step, 'reverse_kl': loss})
  assert watch.report().values == {
    'reverse_kl': pytest.approx(8 / 3),
    'reverse_kl_exit0': 4.0,
    'reverse_kl_exit2': 2.0,
  }


def test_skips_in_a_row_are_counted_across_reports_and_by_network():
  watch, stream = guard(max_skipped=3)
  # The student is updated every other iteration, the critic in each.
  for iteration in range(1, 7):
    watch.add(iteration, None, {'critic': 1.0, 'critic_skipped': False})
    student = {'student_grad_norm': jnp.inf, 'student_skipped': True}
    watch.add(iteration, None, student if iteration % 2 else {})
    exhausted = watch.report().exhausted
    assert (exhausted is not None) == (iteration == 5)
    if exhausted:
      assert exhausted == (
        '3 updates in a row were not finite, the last in iteration 5'
      )
  assert 'the update of the student was not finite' in stream.getvalue()


def test_one_good_update_starts_the_count_anew():
  watch, _ = guard(max_skipped=2)
  for iteration, skipped in enumerate([True, False, True, False, True]):
    watch.add(iteration, None, {'loss': 0.0, 'skipped': skipped})
  assert watch.report().exhausted is None


def test_a_value_that_is_not_finite_must_have_been_skipped():
  watch, _ = guard()
  watch.add(1, None, {'loss': 1.0, 'skipped': False})
  watch.add(2, None, {'loss': np.inf, 'skipped': False})
  with pytest.raises(ValueError, match='loss is inf in iteration 2'):
    watch.report()


# A phase that fits one number to the text; jitted, so that it is quick.

_OPTIMISER = training_state.make_optimiser(
  training_state.OptimiserConfig('adamw', learning_rate=0.1, b1=0.9), 8
)


@jax.jit
def _update(state, target):
  def loss_fn(params):
    return jnp.mean(jnp.square(params['w'] - target))

  loss, grads = jax.value_and_grad(loss_fn)(state.net.params)
  state, metrics = state.update(loss, grads, _OPTIMISER, 0.5)
  return state, {'loss': loss, **metrics}


@pytest.fixture
def fit(monkeypatch, tmp_path):
  """Trains that phase with the text of some iterations poisoned."""

  def fit(*poisoned, **settings):
    states = []
    prompts = inputs.PromptStates(
      bouncing.Captions(bouncing.WorldConfig(), seed=0),
      word_hash.WordHashEncoder(dim=4, length=2),
    )
    params = {'w': jnp.float32(3.0)}

    def step(state, batch, iteration):
      assert batch.keys() == {'text'}
      poison = np.nan if iteration + 1 in poisoned else 1.0
      state, metrics = _update(state, batch['text'] * poison)
      states.append(state)
      return state, metrics

    phase = phase_parts.Phase(
      state=training_state.RegressionState(
        jnp.int32(0), training_state.init_net(params, _OPTIMISER), params
      ),
      step=step,
      batches=sources.batches(prompts, batch_size=4, seed=0),
      weights=lambda state: state.ema,
    )
    monkeypatch.setattr(phases, 'build', lambda config: phase)
    config = tiny.config('teacher', tmp_path)
    config.update(dict(iterations=8, checkpoint_every=4, log_every=8))
    config.loop = settings
    training_loop.train(config)
    return states

  return fit


def test_a_poisoned_batch_leaves_the_state_and_training_goes_on(
  fit, tmp_path, capsys
):
  states = fit(3)
  kept, after = states[1], states[2]
  jax.tree.map(
    np.testing.assert_array_equal,
    (after.net, after.ema),
    (kept.net, kept.ema),
  )
  assert after.iteration == 3
  assert states[3].net.params['w'] != kept.net.params['w']
  assert np.isfinite(states[-1].net.params['w'])
  lines = (tmp_path / 'teacher' / 'metrics.jsonl').read_text().splitlines()
  line = json.loads(lines[0])
  assert line['step'] == 4 and line['skipped'] == 1
  assert np.isfinite(line['loss'])
  assert line['skipped_iterations'] == [3]
  assert len(line['skipped_elements']) == 4
  assert 'iteration 3: the update was not finite' in capsys.readouterr().err
  assert json.loads(lines[1])['skipped'] == 0


def test_many_in_a_row_end_the_run_with_a_saved_state(fit, tmp_path):
  with pytest.raises(ValueError) as caught:
    fit(2, 3, 4, max_skipped=3)
  workdir = tmp_path / 'teacher'
  assert errors.users_mistake(caught.value) == (
    '3 updates in a row were not finite, the last in iteration 4; '
    f'{workdir} has a checkpoint of iteration 4'
  )
  with contextlib.closing(
    checkpoint.make_manager(workdir / 'checkpoints')
  ) as manager:
    assert checkpoint.latest_step(manager) == 4
  # Started again, it goes on with the next batches.
  assert len(fit()) == 4
  assert (workdir / training_loop.WEIGHTS).exists()
