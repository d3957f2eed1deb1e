"""Programs killed with SIGKILL and started again end where all others do.

Real processes on the tiny configs. The moment of the kill is drawn: some
checkpoints (or files of trajectories) after the first, and a moment later.
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

from hiar_jax import checkpoint, phases, train
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
  lines = [f'{"program":18}{"killed at":>10}{"saved":>7}{"of":>4}{"s":>7}']
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

  def kill_after(self, count, number, delay):
    """Kills it `delay` seconds after count() has reached a number."""
    while count() < number:
      assert self._process.poll() is None, self._log.read_text()[-2000:]
      time.sleep(0.01)
    time.sleep(delay)
    self._process.send_signal(signal.SIGKILL)
    self._process.wait()
    assert self._process.returncode == -signal.SIGKILL, 'it had ended before'


def run_three(command, whole, cut, count, total, environment, folder, rng):
  """A whole run, a killed one, and its continuation.

  Args:
    command: of the program.
    whole: arguments that send the first run to its folder.
    cut: the same of the run to be killed.
    count: how many checkpoints or files the latter has.
    total: how many it would have in the end.
    environment: of the processes.
    folder: for what they write.
    rng: draws the moment.

  Returns:
    How many there were, and the continuation's output.
  """
  number, delay = int(rng.integers(1, total // 2)), rng.uniform(0, 0.1)
  first = Program([*command, *whole], environment, folder / 'whole.log')
  second = Program([*command, *cut], environment, folder / 'killed.log')
  second.kill_after(count, number, delay)
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


@pytest.mark.parametrize('phase', tiny.PHASES)
def test_a_killed_phase_ends_bit_equal(
  phase, inputs, environment, table, tmp_path
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
    return max([int(p.name) // _EVERY for p in saved if p.name.isdigit()] + [0])

  left, output = run_three(
    command,
    [f'--config.workdir={folders["whole"]}'],
    [f'--config.workdir={folders["cut"]}'],
    count,
    _ITERATIONS // _EVERY,
    environment,
    tmp_path,
    np.random.default_rng((_SEED, tiny.PHASES.index(phase))),
  )
  restored = re.search(r'goes on after iteration (\d+)', output)
  assert restored and int(restored[1]) == left * _EVERY
  states = []
  for folder in folders.values():
    config = tiny.config(phase, inputs)
    config.iterations = _ITERATIONS
    config.workdir = str(folder)
    states.append(last_state(config))
  jax.tree.map(np.testing.assert_array_equal, *states)
  for name in (train.WEIGHTS, 'metrics.jsonl'):
    whole, cut = (folder / name for folder in folders.values())
    assert whole.read_bytes() == cut.read_bytes(), name
  table.append(
    f'{phase:18}{left * _EVERY:>10}{left:>7}{_ITERATIONS // _EVERY:>4}'
    f'{time.monotonic() - began:7.1f}'
  )


def test_killed_trajectories_end_bit_equal(
  inputs, environment, table, tmp_path
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
    count,
    _TRAJECTORIES // _SHARD,
    environment,
    tmp_path,
    np.random.default_rng((_SEED, len(tiny.PHASES))),
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
    f'{"make_trajectories":18}{left * _SHARD:>10}{left:>7}'
    f'{_TRAJECTORIES // _SHARD:>4}{time.monotonic() - began:7.1f}'
  )
