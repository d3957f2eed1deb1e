"""Two processes as a pod: killed, started again, and none the worse.

Real processes on the tiny configs.
"""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy

from hiar_jax.data import trajectory_files
from hiar_jax.runtime import metrics
from hiar_jax.training import inputs as training_inputs
from hiar_jax.training import loop as training_loop
from hiar_jax.training import phase_parts
from tests import tiny

pytestmark = pytest.mark.slow

_ROOT = pathlib.Path(__file__).parents[2]
_NUM, _SHARD = 200, 4


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
  root = tmp_path_factory.mktemp('inputs')
  tiny.write_inputs(root)
  return root


@pytest.fixture(scope='module')
def environment(tmp_path_factory):
  variables = {k: v for k, v in os.environ.items() if not k.startswith('JAX_')}
  return variables | {
    'PYTHONPATH': str(_ROOT),
    'JAX_PLATFORMS': 'cpu',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    'JAX_COMPILATION_CACHE_DIR': str(tmp_path_factory.mktemp('programs')),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
  }


class Program:
  """A launch program that writes to a file: a full pipe would stop it."""

  def __init__(self, name, arguments, environment, log):
    self._log = log
    with log.open('w') as file:
      self._process = subprocess.Popen(
        [sys.executable, str(_ROOT / 'launch' / name), *arguments],
        env=environment,
        stdout=file,
        stderr=subprocess.STDOUT,
      )

  @property
  def output(self):
    return self._log.read_text()

  def end(self, timeout=900.0):
    """Waits for its exit status, at most so many seconds."""
    return self._process.wait(timeout)

  def kill_once(self, ready):
    """SIGKILL as soon as ready()."""
    while not ready():
      assert self._process.poll() is None, self.output[-2000:]
      time.sleep(0.01)
    self._process.send_signal(signal.SIGKILL)
    assert self.end() == -signal.SIGKILL, 'it had ended before'

  def stop(self):
    if self._process.poll() is None:
      self._process.kill()
      self._process.wait()


@pytest.fixture
def start(environment, tmp_path):
  """start(program, arguments, process_id, address): one process of two."""
  programs = []

  def start(name, arguments, process_id=0, address='127.0.0.1:1', count=2):
    named = {
      'JAX_COORDINATOR_ADDRESS': address,
      'JAX_NUM_PROCESSES': str(count),
      'JAX_PROCESS_ID': str(process_id),
    }
    log = tmp_path / f'{len(programs)}.log'
    programs.append(Program(name, arguments, environment | named, log))
    return programs[-1]

  yield start
  for program in programs:
    program.stop()


def test_trajectories_of_two_processes_one_of_which_was_killed(
  inputs, start, tmp_path
):
  out = tmp_path / 'trajectories'
  arguments = [
    f'--config={_ROOT / "tests" / "tiny.py"}:distill,{inputs}',
    f'--out={out}',
  ]
  making = [
    *arguments,
    f'--num={_NUM}',
    f'--config.trajectories.shard_size={_SHARD}',
  ]
  made = lambda: {
    shard
    for shard in range(_NUM // _SHARD)
    if trajectory_files.Manifest.path(out, shard).exists()
  }
  own = lambda process_id: {s for s in made() if s % 2 == process_id}

  first, second = (start('make_trajectories.py', making, i) for i in range(2))
  second.kill_once(lambda: len(own(1)) >= 5)
  left = len(own(1))
  assert 5 <= left < 25
  # The other one needs nobody.
  assert first.end() == 0, first.output[-2000:]
  assert len(own(0)) == 25 and len(own(1)) == left
  verify = start('make_trajectories.py', [*arguments, '--verify'])
  assert verify.end() == 2
  assert 'shard-00049.array_record is missing' in verify.output

  again = start('make_trajectories.py', making, 1)
  assert again.end() == 0, again.output[-2000:]
  missing = _NUM // 2 - left * _SHARD
  assert f'{missing} of {_NUM} trajectories to sample' in again.output
  verify = start('make_trajectories.py', [*arguments, '--verify'])
  assert verify.end() == 0, verify.output[-2000:]
  assert f'{_NUM} trajectories, whole' in verify.output
  indices = [
    int(record['index'])
    for shard in sorted(made())
    for record in trajectory_files._read_shard(
      trajectory_files.Manifest.path(out, shard)
    )
  ]
  assert indices == list(range(_NUM))
  assert len(list(out.iterdir())) == _NUM // _SHARD + 1  # And the manifest.

  # Training refuses what was made for another schedule.
  training = [
    f'--config={_ROOT / "tests" / "tiny.py"}:student_start,{inputs}',
    f'--config.workdir={tmp_path / "refused"}',
    f'--config.trajectories.dir={out}',
    '--config.schedule.shift=3.0',
  ]
  refused = start('train.py', training, count=1)
  assert refused.end() == 2, refused.output[-2000:]
  assert f'error: trajectories in {out}' in refused.output
  assert 'training needs them at' in refused.output


@pytest.mark.parametrize(
  ('name', 'value', 'message'),
  [
    ('guidance', 7.5, 'guidance: 2.0 -> 7.5'),
    ('num_steps', 3, 'num_steps: 2 -> 3'),
  ],
)
def test_training_refuses_trajectories_of_another_sampler(
  name, value, message, inputs
):
  config = tiny.config('student_start', inputs)
  config.trajectories[name] = value
  with pytest.raises(ValueError, match=message):
    phase_parts.trajectory_source(config, training_inputs.open_text(config))


# A worker that is lost counts as dead after so many seconds.
_HEARTBEAT = 10
_ITERATIONS, _EVERY = 12, 2


def train(start, inputs, workdir, count=2):
  """Processes of one training run."""
  arguments = [
    f'--config={_ROOT / "tests" / "tiny_pod.py"}:distill,{inputs}',
    f'--config.workdir={workdir}',
    f'--config.iterations={_ITERATIONS}',
    f'--config.checkpoint_every={_EVERY}',
    f'--heartbeat_timeout={_HEARTBEAT}',
    '--join_timeout=300',
  ]
  address = free_address()
  return [start('train.py', arguments, i, address, count) for i in range(count)]


def finish(programs):
  for program in programs:
    assert program.end() == 0, program.output[-3000:]
  return programs


def saved(workdir):
  """Iterations of the whole checkpoints."""
  folders = (workdir / 'checkpoints').glob('[0-9]*')
  return sorted(int(p.name) for p in folders if p.name.isdecimal())


def weights(workdir):
  return safetensors.numpy.load_file(workdir / training_loop.WEIGHTS)


def losses(workdir):
  return metrics.read_metrics(workdir / 'metrics.jsonl')


def test_a_pair_that_lost_a_worker_goes_on_to_the_same_numbers(
  inputs, start, tmp_path
):
  whole, cut = tmp_path / 'whole', tmp_path / 'cut'
  finish(train(start, inputs, whole))
  assert saved(whole)[-1] == _ITERATIONS

  first, second = train(start, inputs, cut)
  second.kill_once(lambda: saved(cut))
  lost = time.monotonic()
  # It waits for numbers that never come; 30 s are jax's own for the farewell.
  assert first.end(_HEARTBEAT + 60) not in (0, 2), first.output[-3000:]
  print(f'the other ended after {time.monotonic() - lost:.1f} s')
  left = saved(cut)[-1]
  assert left < _ITERATIONS

  first, second = finish(train(start, inputs, cut))
  assert f'goes on after iteration {left}' in first.output
  assert f'wrote {cut}' in first.output and f'wrote {cut}' not in second.output
  assert weights(cut).keys() == weights(whole).keys()
  for name, array in weights(whole).items():
    np.testing.assert_array_equal(weights(cut)[name], array, name)
  assert [line['step'] for line in losses(cut)] == list(
    range(1, _ITERATIONS + 1)
  )

  # What two processes saved, one goes on with; it adds in another order.
  alone = tmp_path / 'alone'
  shutil.copytree(whole, alone)
  (alone / training_loop.WEIGHTS).unlink()
  for step in saved(alone)[1:]:
    shutil.rmtree(alone / 'checkpoints' / str(step))
  (program,) = finish(train(start, inputs, alone, count=1))
  assert f'goes on after iteration {saved(whole)[0]}' in program.output
  for name, array in weights(whole).items():
    np.testing.assert_allclose(
      weights(alone)[name], array, rtol=0, atol=2e-5, err_msg=name
    )


def test_a_phase_without_a_mesh_is_refused_on_two_processes(inputs, start):
  address = free_address()
  config = f'--config={_ROOT / "tests" / "tiny.py"}:distill,{inputs}'
  for program in [start('train.py', [config], i, address) for i in range(2)]:
    assert program.end() == 2, program.output[-2000:]
    assert 'error: 2 processes, but the distill config' in program.output


def free_address():
  with socket.create_server(('127.0.0.1', 0)) as server:
    return f'127.0.0.1:{server.getsockname()[1]}'
