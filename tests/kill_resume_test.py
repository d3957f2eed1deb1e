"""Programs ended by a signal and started again end where all others do.

Real processes on the tiny configs. The moment of the signal is drawn: some
checkpoints (or files of trajectories) after the first, and a moment later.
SIGKILL strikes anywhere; SIGTERM is answered by saving what is under way.
"""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from hiar_jax import checkpoint, phases, stopping, train
from hiar_jax.run_log import METRICS
from tests import tiny

pytestmark = pytest.mark.slow

_ROOT = pathlib.Path(__file__).parents[1]
_ITERATIONS, _EVERY = 32, 2
_TRAJECTORIES, _SHARD = 48, 2
_SEED = 0


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
  root = tmp_path_factory.mktemp('inputs')
  tiny.write_inputs(root)
  # Or two runs that start together would fit the codec at the same time.
  phases.world_codec(tiny.config('teacher', root))
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
  lines = [f'{"program":18}{"signal":>8}{"saved":>7}{"of":>4}{"s":>7}']
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

  def end_after(self, ending, count, number, delay):
    """Ends it by a signal `delay` seconds after count() reached a number."""
    while count() < number:
      assert self._process.poll() is None, self._log.read_text()[-2000:]
      time.sleep(0.01)
    time.sleep(delay)
    self._process.send_signal(ending)
    self._process.wait()
    status = stopping.SIGTERM_STATUS if ending == signal.SIGTERM else -ending
    assert self._process.returncode == status, self._log.read_text()[-2000:]


def run_three(
  command, whole, cut, ending, count, total, environment, folder, rng
):
  """A whole run, one ended by a signal, and its continuation.

  Args:
    command: of the program.
    whole: arguments that send the first run to its folder.
    cut: the same of the run to be ended.
    ending: the signal.
    count: how many iterations or files the latter has saved.
    total: how many it would have in the end.
    environment: of the processes.
    folder: for what they write.
    rng: draws the moment.

  Returns:
    How many there were, and the continuation's output.
  """
  number, delay = int(rng.integers(2, total // 2)), rng.uniform(0, 0.1)
  first = Program([*command, *whole], environment, folder / 'whole.log')
  second = Program([*command, *cut], environment, folder / 'ended.log')
  second.end_after(ending, count, number, delay)
  first.finish()
  left = count()
  assert number <= left < total
  third = Program([*command, *cut], environment, folder / 'rest.log')
  return left, third.finish()


def last_state(config):
  """State and next batch of a run's last checkpoint."""
  phase = phases.build(config)
  directory = pathlib.Path(config.workdir) / 'checkpoints'
  with contextlib.closing(checkpoint.make_manager(directory)) as manager:
    step = checkpoint.latest_step(manager)
    assert step == config.iterations
    state, batches, _ = checkpoint.restore(
      manager, step, checkpoint.abstract(phase.state), phase.batches
    )
  return state, next(batches)


@pytest.mark.parametrize(
  ('phase', 'ending'),
  [
    *((phase, signal.SIGKILL) for phase in tiny.PHASES),
    ('distill', signal.SIGTERM),
  ],
)
def test_an_ended_phase_ends_bit_equal(
  phase, ending, inputs, environment, table, tmp_path
):
  began = time.monotonic()
  command = [
    str(_ROOT / 'launch' / 'train.py'),
    f'--config={_ROOT / "tests" / "tiny.py"}:{phase},{inputs}',
    f'--config.iterations={_ITERATIONS}',
    f'--config.checkpoint_every={_EVERY}',
  ]
  folders = {name: tmp_path / name for name in ('whole', 'cut')}

  def count():
    saved = (folders['cut'] / 'checkpoints').glob('[0-9]*')
    # Older checkpoints are deleted, folders of unfinished ones have a suffix.
    return max([int(p.name) for p in saved if p.name.isdigit()] + [0])

  left, output = run_three(
    command,
    [f'--config.workdir={folders["whole"]}'],
    [f'--config.workdir={folders["cut"]}'],
    ending,
    count,
    _ITERATIONS,
    environment,
    tmp_path,
    np.random.default_rng((_SEED, tiny.PHASES.index(phase), ending)),
  )
  restored = re.search(r'goes on after iteration (\d+)', output)
  assert restored and int(restored[1]) == left
  states = []
  for folder in folders.values():
    config = tiny.config(phase, inputs)
    config.iterations = _ITERATIONS
    config.workdir = str(folder)
    states.append(last_state(config))
  jax.tree.map(np.testing.assert_array_equal, *states)
  whole, cut = (
    {name: (folder / name).read_bytes() for name in (train.WEIGHTS, METRICS)}
    for folder in folders.values()
  )
  assert whole[train.WEIGHTS] == cut[train.WEIGHTS]
  # A stop on request writes a line where the other run has none.
  assert whole[METRICS] == cut[METRICS] or ending == signal.SIGTERM
  table.append(_line(phase, ending, left, _ITERATIONS, began))


def _line(program, ending, saved, total, began):
  name = signal.Signals(ending).name
  seconds = time.monotonic() - began
  return f'{program:18}{name:>8}{saved:>7}{total:>4}{seconds:7.1f}'


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

  left, output = run_three(
    command,
    [f'--out={folders[0]}'],
    [f'--out={folders[1]}'],
    ending,
    count,
    _TRAJECTORIES // _SHARD,
    environment,
    tmp_path,
    np.random.default_rng((_SEED, len(tiny.PHASES), ending)),
  )
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
