"""The host loop: a run that was cut goes on as if it had not been."""

import contextlib
import dataclasses
import json
import shutil
import signal

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from hiar_jax.data import bouncing, sources
from hiar_jax.runtime import errors
from hiar_jax.text import word_hash
from hiar_jax.training import checkpoint, phase_parts, phases
from hiar_jax.training import inputs as training_inputs
from hiar_jax.training import loop as training_loop
from hiar_jax.weights import networks
from tests import tiny


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
  root = tmp_path_factory.mktemp('inputs')
  tiny.write_inputs(root)
  return root


@dataclasses.dataclass
class Run:
  """What a run was made of; filled while it goes on."""

  state: object = None
  batches: object = None
  step: object = None
  iterations: list = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def watched(*, like=None, cut_before=None):
  """A phase that is built inside reports to a Run, or stops at an iteration.

  With `like`, an earlier Run of the same config, it has that one's compiled
  step; all else is new.
  """
  run, build = Run(), phases.build

  def watching(config):
    phase = build(config)
    run.batches = phase.batches
    run.step = phase.step if like is None else like.step

    def step(state, batch, iteration):
      if iteration == cut_before:
        raise KeyboardInterrupt
      run.iterations.append(iteration)
      run.state, metrics = run.step(state, batch, iteration)
      return run.state, metrics

    return dataclasses.replace(phase, step=step)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(phases, 'build', watching)
    yield run


def assert_equal(a, b):
  chex.assert_trees_all_equal(a, b)


# Self-Forcing is the distillation's program in another order; the codec's takes
# long to compile.
SLOW = [
  pytest.param(phase, marks=pytest.mark.slow)
  for phase in ('self_forcing', 'codec')
]


@pytest.mark.parametrize(
  'phase', ['teacher', 'student_start', 'distill', *SLOW]
)
def test_an_interrupted_run_ends_bit_equal(phase, inputs, tmp_path):
  config = tiny.config(phase, inputs)
  config.iterations = 5
  config.workdir = str(tmp_path / 'whole')
  with watched() as whole:
    whole_weights = training_loop.train(config)
  config.workdir = str(tmp_path / 'cut')
  # Iterations 0, 1 and 2 are done and a checkpoint of the first two is saved.
  with watched(like=whole, cut_before=3), pytest.raises(KeyboardInterrupt):
    training_loop.train(config)
  assert not (tmp_path / 'cut' / training_loop.WEIGHTS).exists()
  with watched(like=whole) as rest:
    weights = training_loop.train(config)

  assert whole.iterations == [0, 1, 2, 3, 4]
  assert rest.iterations == [2, 3, 4]
  # Parameters, optimiser states, averages and counters.
  assert_equal(rest.state, whole.state)
  assert_equal(next(rest.batches), next(whole.batches))
  assert weights.read_bytes() == whole_weights.read_bytes()
  lines = (tmp_path / 'cut' / 'metrics.jsonl').read_text()
  assert lines == (tmp_path / 'whole' / 'metrics.jsonl').read_text()
  steps = [json.loads(line)['step'] for line in lines.splitlines()]
  assert steps == [1, 2, 3, 4, 5]
  if phase != 'codec':  # Its average is whitened on the way out.
    # The average itself is what is shipped.
    ema = whole.state.ema
    assert_equal(networks.load_weights(weights, ema), ema)


# A phase that costs nothing: the loop alone.


def counting_phase(bad_iteration=None, raises=()):
  """`raises`: an iteration, and the signal that arrives during it."""

  def step(state, batch, iteration):
    bad = iteration == bad_iteration
    if raises and iteration == raises[0]:
      signal.raise_signal(raises[1])
    state = {'sum': state['sum'] + batch['text'].sum() + iteration}
    return state, {'loss': np.nan if bad else float(iteration)}

  prompts = training_inputs.PromptStates(
    bouncing.Captions(bouncing.WorldConfig(), seed=0),
    word_hash.WordHashEncoder(dim=4, length=2),
  )
  return phase_parts.Phase(
    state={'sum': jnp.zeros(())},
    step=step,
    batches=sources.batches(prompts, batch_size=2, seed=0),
    weights=lambda state: state,
  )


@pytest.fixture
def count(monkeypatch, tmp_path):
  """Trains the counting phase with some settings changed."""

  def count(bad_iteration=None, raises=(), kwargs=None, **settings):
    config = tiny.config('teacher', tmp_path)
    config.update(dict(iterations=10, checkpoint_every=4, log_every=3))
    config.loop = {}
    config.update(settings)
    monkeypatch.setattr(
      phases, 'build', lambda config: counting_phase(bad_iteration, raises)
    )
    return training_loop.train(config, **(kwargs or {}))

  return count


def metrics_of(weights):
  lines = (weights.parent / 'metrics.jsonl').read_text().splitlines()
  return {line['step']: line['loss'] for line in map(json.loads, lines)}


def test_metrics_are_means_since_the_last_line(count):
  # Every third iteration, every checkpoint and the end.
  assert metrics_of(count()) == {
    3: 1.0,
    4: 3.0,
    6: 4.5,
    8: 6.5,
    9: 8.0,
    10: 9.0,
  }


def test_a_loss_that_is_not_finite_stops_the_run_at_its_last_checkpoint(
  count, tmp_path
):
  with pytest.raises(ValueError) as caught:
    count(bad_iteration=6)
  workdir = tmp_path / 'teacher'
  message = errors.users_mistake(caught.value)
  assert message == (
    f'loss is nan in iteration 7; {workdir} keeps its last checkpoint'
  )
  with contextlib.closing(
    checkpoint.make_manager(workdir / 'checkpoints')
  ) as manager:
    assert checkpoint.latest_step(manager) == 4
  assert not (workdir / training_loop.WEIGHTS).exists()
  # Without the bad iteration it goes on from there.
  weights = count()
  whole = count(workdir=str(tmp_path / 'whole'))
  assert weights.read_bytes() == whole.read_bytes()
  assert metrics_of(weights) == metrics_of(whole)


def test_a_finished_run_writes_its_weights_again(count):
  weights = count()
  first = weights.read_bytes()
  weights.unlink()
  # A bad iteration would be noticed: nothing is trained any more.
  assert count(bad_iteration=0).read_bytes() == first


def test_a_changed_config_is_refused_by_name(count):
  weights = count()
  first = weights.read_bytes()
  with pytest.raises(ValueError) as caught:
    count(iterations=8, optimiser=dict(learning_rate=0.5))
  message = errors.users_mistake(caught.value)
  assert 'was made by another config' in message
  assert 'iterations: 10 -> 8' in message
  assert '--allow_config_change goes on' in message
  rate = tiny.config('teacher', '').optimiser.learning_rate
  assert f'optimiser.learning_rate: {rate} -> 0.5' in message
  assert weights.read_bytes() == first


def test_more_iterations_go_on_with_the_run(count, tmp_path):
  count()
  longer = count(iterations=14)
  whole = count(iterations=14, workdir=str(tmp_path / 'whole'))
  assert longer.read_bytes() == whole.read_bytes()
  assert metrics_of(longer)[14] == metrics_of(whole)[14]


def test_a_change_that_is_allowed_stays_known(count, tmp_path, capsys):
  count()
  capsys.readouterr()
  change = dict(optimiser=dict(learning_rate=0.5))
  allowed = dict(kwargs=dict(allow_config_change=True))
  count(iterations=12, **change, **allowed)
  assert 'warning: goes on with another config' in capsys.readouterr().err
  count(iterations=14, **change)
  with contextlib.closing(
    checkpoint.make_manager(tmp_path / 'teacher' / 'checkpoints')
  ) as manager:
    (change,) = checkpoint.restore_config(manager, 14)['_changes']
  assert change['after_iteration'] == 10
  assert change['changed'][0].endswith('learning_rate: 0.01 -> 0.5')


def test_how_often_is_logged_and_where_may_change(count, tmp_path):
  count()
  moved = tmp_path / 'moved'
  shutil.copytree(tmp_path / 'teacher', moved)
  weights = count(workdir=str(moved), log_every=1, checkpoint_every=2)
  assert safetensors.numpy.load_file(weights)['sum'] > 0


def saved_steps(workdir):
  with contextlib.closing(
    checkpoint.make_manager(workdir / 'checkpoints')
  ) as manager:
    return sorted(manager.all_steps())


@pytest.mark.parametrize(
  ('number', 'error', 'code'),
  [
    (signal.SIGTERM, SystemExit, 143),
    (signal.SIGINT, KeyboardInterrupt, None),
  ],
)
def test_a_signal_saves_the_iteration_under_way(
  count, tmp_path, number, error, code
):
  before = signal.getsignal(number)
  with pytest.raises(error) as caught:
    count(raises=(5, number))
  assert getattr(caught.value, 'code', None) == code
  assert signal.getsignal(number) is before
  # Iterations 0 to 5 are done, one more than the usual checkpoint.
  assert saved_steps(tmp_path / 'teacher') == [4, 6]
  weights = count()
  whole = count(workdir=str(tmp_path / 'whole'))
  assert weights.read_bytes() == whole.read_bytes()


def test_checkpoints_are_kept_by_policy(count, tmp_path):
  # The loss grows, so the first checkpoint is the best.
  settings = dict(keep_last=1, keep_every=4, keep_best='loss')
  count(checkpoint_every=1, loop=settings)
  assert saved_steps(tmp_path / 'teacher') == [1, 4, 8, 10]
  # And the policy may change from run to run.
  count(loop=dict(keep_last=2))


def test_other_code_goes_on_with_a_warning(count, monkeypatch, capsys):
  count()
  capsys.readouterr()
  count()
  assert 'warning' not in capsys.readouterr().err
  version = training_loop.provenance.code_version() | {'commit': 'another'}
  monkeypatch.setattr(training_loop.provenance, 'code_version', lambda: version)
  count()
  (line,) = [
    line
    for line in capsys.readouterr().err.splitlines()
    if line.startswith('warning')
  ]
  assert line.startswith(
    'warning: the code is not what saved iteration 10: commit: '
  )
  assert line.endswith(' -> another')


def test_a_window_of_iterations_is_profiled(count, tmp_path, capsys):
  folder = tmp_path / 'teacher' / 'profile'
  count(kwargs=dict(profile=(11, 1)))
  assert not folder.exists()
  count(workdir=str(tmp_path / 'teacher2'), kwargs=dict(profile=(3, 2)))
  folder = tmp_path / 'teacher2' / 'profile'
  assert f'profile in {folder}' in capsys.readouterr().out
  assert list(folder.glob('plugins/profile/*/*.xplane.pb'))
  with pytest.raises(ValueError, match='profile=0:2: START and COUNT'):
    count(kwargs=dict(profile=(0, 2)))


def test_videos_cannot_be_sampled_from_a_teacher(count):
  with pytest.raises(ValueError, match="sample_every=2: phase 'teacher'"):
    count(loop=dict(sample_every=2))


def test_an_unwritable_workdir_is_one_sentence(count, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(OSError) as caught:
    count(workdir=str(tmp_path / 'file' / 'run'))
  message = errors.users_mistake(caught.value)
  assert 'file' in message and '\n' not in message
