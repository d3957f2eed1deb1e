"""Programs ended by a signal and started again end where all others do.

Real processes on the tiny configs. The moment of the signal is drawn: some
checkpoints (or files of trajectories) after the first, and a moment later.
SIGKILL strikes anywhere; SIGTERM is answered by saving what is under way.

  python -m pytest tests/training/kill_resume_test.py -m slow -s
"""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import chex
import numpy as np
import pytest

from hiar_jax.runtime import stopping
from hiar_jax.training import checkpoint, phases
from hiar_jax.training import inputs as training_inputs
from hiar_jax.training import loop as training_loop
from hiar_jax.training.run_log import METRICS
from hiar_jax.weights import networks
from tests import tiny

pytestmark = pytest.mark.slow

_ROOT = pathlib.Path(__file__).parents[2]
_ITERATIONS, _EVERY = 16, 1
_CYCLE = 5
_DISTILLATIONS = ('distill', 'distill_lora', 'self_forcing')
# SIGKILLs of the distillation; every second one strikes during a save.
_TRIALS = 20
_TRAJECTORIES, _SHARD = 480, 2
_SEED = 0


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
  root = tmp_path_factory.mktemp('inputs')
  tiny.write_inputs(root)
  # Or two runs that start together would fit the codec at the same time.
  training_inputs.open_codec(tiny.config('teacher', root))
  return root


@pytest.fixture(scope='module')
def environment(tmp_path_factory):
  return os.environ | {
    'PYTHONPATH': str(_ROOT),
    'JAX_PLATFORMS': 'cpu',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    'JAX_COMPILATION_CACHE_DIR': str(tmp_path_factory.mktemp('programs')),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
  }


@pytest.fixture(scope='module')
def table(request):
  """Lines that are shown after the last test."""
  lines = [
    f'{"program":18}{"signal":>8}{"saved":>7}{"of":>4}{"s":>7}  under way'
  ]
  yield lines
  capture = request.config.pluginmanager.getplugin('capturemanager')
  with capture.global_and_fixture_disabled():
    print('', *lines, sep='\n')


class Program:
  """A process that writes to a file: a pipe that nobody reads would stop it."""

  def __init__(self, command, environment, log):
    self._log = log
    with log.open('w') as file:
      self._process = subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        stdout=file,
        stderr=subprocess.STDOUT,
      )

  def finish(self):
    """Waits for success; returns what was written."""
    self._process.wait(timeout=900)
    output = self._log.read_text()
    assert self._process.returncode == 0, output[-2000:]
    return output

  def end_when(self, ending, ready, delay):
    """Ends it by a signal `delay` seconds after ready()."""
    while not ready():
      assert self._process.poll() is None, self._log.read_text()[-2000:]
      time.sleep(0.001)
    time.sleep(delay)
    self._process.send_signal(ending)
    self._process.wait()
    status = stopping.SIGTERM_STATUS if ending == signal.SIGTERM else -ending
    assert self._process.returncode == status, self._log.read_text()[-2000:]


@pytest.fixture(scope='module')
def whole_run(inputs, environment, tmp_path_factory):
  """phase -> the folder of a run that nothing happened to, made once."""
  folders = {}

  def folder_of(phase):
    if phase not in folders:
      folders[phase] = tmp_path_factory.mktemp(f'whole_{phase}')
      command = [*train_command(phase, inputs), workdir(folders[phase])]
      log = folders[phase].with_suffix('.log')
      Program(command, environment, log).finish()
    return folders[phase]

  return folder_of


def train_command(phase, inputs):
  distills = phase in _DISTILLATIONS
  return [
    str(_ROOT / 'launch' / 'train.py'),
    f'--config={_ROOT / "tests" / "tiny.py"}:{phase},{inputs}',
    f'--config.iterations={_ITERATIONS}',
    f'--config.checkpoint_every={_EVERY}',
    *([f'--config.distill.generator_every={_CYCLE}'] * distills),
  ]


def workdir(folder):
  return f'--config.workdir={folder}'


def last_state(config):
  """State and next batch of a run's last checkpoint."""
  phase = phases.build(config)
  directory = pathlib.Path(config.workdir) / 'checkpoints'
  with contextlib.closing(checkpoint.make_manager(directory)) as manager:
    step = checkpoint.latest_step(manager)
    assert step == config.iterations
    state, batches, _ = checkpoint.restore(
      manager, step, networks.abstract(phase.state), phase.batches
    )
  return state, next(batches)


@pytest.mark.parametrize(
  ('phase', 'ending', 'trial'),
  [
    *((phase, signal.SIGKILL, 0) for phase in tiny.PHASES),
    *((phase, signal.SIGTERM, 0) for phase in tiny.PHASES),
    ('distill_lora', signal.SIGKILL, 0),
    *(('distill', signal.SIGKILL, trial) for trial in range(1, _TRIALS)),
  ],
)
def test_an_ended_phase_ends_bit_equal(
  phase, ending, trial, inputs, environment, table, whole_run, tmp_path
):
  began = time.monotonic()
  rng = np.random.default_rng((_SEED, len(phase), ending, trial))
  number = int(rng.integers(2, _ITERATIONS - 4))
  saves, delay = trial % 2 == 1, rng.uniform(0, 0.3)
  if saves:
    delay /= 100
  folders = {'whole': whole_run(phase), 'cut': tmp_path / 'cut'}
  checkpoints = folders['cut'] / 'checkpoints'

  def folders_now():
    return [path.name for path in checkpoints.glob('[0-9]*')]

  def saved():
    # Older checkpoints are deleted, folders of unfinished ones have a suffix.
    return max([int(name) for name in folders_now() if name.isdigit()] + [0])

  def unfinished():
    return any(not name.isdigit() for name in folders_now())

  command = [*train_command(phase, inputs), workdir(folders['cut'])]
  Program(command, environment, tmp_path / 'ended.log').end_when(
    ending, lambda: saved() >= number and (not saves or unfinished()), delay
  )
  left, under_way = saved(), 'save' if unfinished() else ''
  assert number <= left < _ITERATIONS
  output = Program(command, environment, tmp_path / 'rest.log').finish()
  restored = re.search(r'goes on after iteration (\d+)', output)
  assert restored and int(restored[1]) == left
  states = []
  for folder in folders.values():
    config = tiny.config(phase, inputs)
    config.iterations = _ITERATIONS
    config.workdir = str(folder)
    states.append(last_state(config))
  chex.assert_trees_all_equal(*states)
  whole, cut = (
    {
      name: (folder / name).read_bytes()
      for name in (training_loop.WEIGHTS, METRICS)
    }
    for folder in folders.values()
  )
  assert whole[training_loop.WEIGHTS] == cut[training_loop.WEIGHTS]
  # A stop on request writes a line where the other run has none.
  assert whole[METRICS] == cut[METRICS] or ending == signal.SIGTERM
  if phase in _DISTILLATIONS:
    update = 'critic' if left % _CYCLE else 'generator and critic'
    under_way = f'{update}, {under_way}' if under_way else update
  table.append(_line(phase, ending, left, _ITERATIONS, began, under_way))


def _line(program, ending, saved, total, began, under_way=''):
  name = signal.Signals(ending).name
  seconds = time.monotonic() - began
  return f'{program:18}{name:>8}{saved:>7}{total:>4}{seconds:7.1f}  {under_way}'


@pytest.mark.parametrize('ending', [signal.SIGKILL, signal.SIGTERM])
def test_ended_trajectories_end_bit_equal(
  ending, inputs, environment, table, tmp_path
):
  began = time.monotonic()
  command = [
    str(_ROOT / 'launch' / 'make_trajectories.py'),
    f'--config={_ROOT / "tests" / "tiny.py"}:distill,{inputs}',
    f'--num={_TRAJECTORIES}',
    f'--config.trajectories.shard_size={_SHARD}',
  ]
  folders = [tmp_path / 'whole', tmp_path / 'cut']

  def count():
    return len(list(folders[1].glob('*.array_record')))

  rng = np.random.default_rng((_SEED, len(tiny.PHASES), ending))
  number = int(rng.integers(2, _TRAJECTORIES // _SHARD // 2))
  whole = [*command, f'--out={folders[0]}']
  cut = [*command, f'--out={folders[1]}']
  Program(whole, environment, tmp_path / 'whole.log').finish()
  Program(cut, environment, tmp_path / 'ended.log').end_when(
    ending, lambda: count() >= number, rng.uniform(0, 0.1)
  )
  left = count()
  assert left * _SHARD < _TRAJECTORIES  # Or nothing was cut.
  output = Program(cut, environment, tmp_path / 'rest.log').finish()
  missing = _TRAJECTORIES - left * _SHARD
  assert f'{missing} of {_TRAJECTORIES} trajectories to sample' in output
  whole, cut = (
    {path.name: path.read_bytes() for path in folder.iterdir()}
    for folder in folders
  )
  assert whole.keys() == cut.keys()
  assert [name for name in whole if whole[name] != cut[name]] == []
  table.append(
    _line(
      'make_trajectories',
      ending,
      left * _SHARD,
      _TRAJECTORIES,
      began,
    )
  )
