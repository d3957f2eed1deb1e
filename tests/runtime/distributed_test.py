"""Who takes part, and waits that end; joining is in distributed_pipeline_test.

Run as a program, this file is one of the processes:

  python tests/runtime/distributed_test.py HOST:PORT PROCESSES ID
"""

import os
import pathlib
import socket
import subprocess
import sys
import threading

import jax
import pytest
from orbax.checkpoint import multihost

from hiar_jax.runtime import distributed

_ROOT = pathlib.Path(__file__).parents[2]

NAMED = {
  'JAX_COORDINATOR_ADDRESS': 'host:1234',
  'JAX_NUM_PROCESSES': '2',
  'JAX_PROCESS_ID': '1',
}
SLURM = {
  'SLURM_JOB_ID': '4097',
  'SLURM_STEP_NODELIST': 'node[07-09],other1',
  'SLURM_NTASKS': '32',
  'SLURM_PROCID': '13',
  'SLURM_LOCALID': '5',
}
GKE_TPU = {
  'TPU_WORKER_ID': '2',
  'TPU_WORKER_HOSTNAMES': '127.0.0.1,w1,w2,w3',
}


def find(environ=None, **kwargs):
  return distributed.find(dict(os.environ) | (environ or {}), **kwargs)


@pytest.fixture
def environment(monkeypatch):
  """Sets variables where jax looks for a cluster."""
  for name in list(os.environ):
    if name.startswith(('SLURM_', 'TPU_', 'MEGASCALE_', 'KUBERNETES_')):
      monkeypatch.delenv(name)

  def update(variables):
    for name, value in variables.items():
      monkeypatch.setenv(name, value)

  return update


def test_nobody_named_is_alone(environment):
  assert find() is None


def test_slurm_tasks_are_processes_with_a_device_each(environment):
  environment(SLURM)
  assert find() == distributed.Processes('node07:61441', 32, 13, (5,))


def test_workers_of_a_tpu_slice_are_processes(environment, monkeypatch):
  environment(GKE_TPU)
  monkeypatch.setattr(distributed.clusters, '_has_tpu', lambda: True)
  # Or the metadata server would be asked for them.
  one_slice = {
    'TPU_SKIP_MDS_QUERY': '1',
    'MEGASCALE_COORDINATOR_ADDRESS': '127.0.0.1:8080',
    'MEGASCALE_NUM_SLICES': '1',
    'MEGASCALE_SLICE_ID': '0',
  }
  environment(GKE_TPU | one_slice)
  assert find() == distributed.Processes('127.0.0.1:8482', 4, 2)
  environment({'MEGASCALE_NUM_SLICES': '2', 'MEGASCALE_SLICE_ID': '1'})
  assert find() == distributed.Processes('127.0.0.1:8482', 8, 6)


def test_workers_of_a_tpu_vm_are_known_by_its_metadata(
  environment, monkeypatch
):
  told = {
    'agent-worker-number': '1',
    'worker-network-endpoints': 'a:0:10.0.0.4,b:1:10.0.0.5',
    'tpu-env': "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'",
  }
  monkeypatch.setattr(distributed.clusters, '_has_tpu', lambda: True)
  ask = lambda name: told.get(name.removeprefix('attributes/'))
  monkeypatch.setattr(distributed.clusters, '_metadata', ask)
  assert find() == distributed.Processes('10.0.0.4:8482', 4, 3)
  told['worker-network-endpoints'] = 'first,second'
  told['tpu-env'] = ''
  assert find() == distributed.Processes('first:8482', 2, 1)
  del told['agent-worker-number']
  assert find() is None


def test_a_cluster_that_does_not_answer_is_one_sentence(environment):
  environment(SLURM | {'SLURM_NTASKS': 'many'})
  with pytest.raises(OSError, match="names no processes: .*'many'"):
    find()


def test_variables_win_over_the_cluster_and_flags_over_both(environment):
  environment(SLURM)
  assert find(NAMED) == distributed.Processes('host:1234', 2, 1)
  assert find(NAMED, process_id=0) == distributed.Processes('host:1234', 2, 0)
  assert find(
    coordinator='other:1', num_processes=3, process_id=2
  ) == distributed.Processes('other:1', 3, 2)
  assert find(num_processes=1) is None
  assert find(NAMED | {'JAX_NUM_PROCESSES': '1', 'JAX_PROCESS_ID': '0'}) is None
  with pytest.raises(ValueError, match='--num_processes, --process_id'):
    find(num_processes=2)


def test_a_run_that_began_without_this_process_is_named():
  """jax's own service answers where the roll was called."""
  with socket.create_server(('127.0.0.1', 0)) as server:

    def answer():
      peer, _ = server.accept()
      with peer:
        peer.recv(64)
        peer.sendall(b'\0\0\x18\x04')

    thread = threading.Thread(target=answer)
    thread.start()
    address = f'127.0.0.1:{server.getsockname()[1]}'
    with pytest.raises(TimeoutError, match='began without this process'):
      distributed.start(distributed.Processes(address, 2, 1), timeout=5.0)
    thread.join()


def test_a_barrier_of_one_is_passed():
  assert distributed.is_writer()
  distributed.barrier('alone', timeout=0.01)


def test_a_barrier_names_itself_when_nobody_comes(monkeypatch):
  asked = []

  def wait(*, key, timeout_ms):
    asked.append((key, timeout_ms))
    if len(asked) == 3:
      raise jax.errors.JaxRuntimeError('DEADLINE_EXCEEDED:\n task 1')

  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  monkeypatch.setattr(multihost, 'get_barrier_sync_fn', lambda: wait)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  for _ in range(2):
    distributed.barrier('save', timeout=0.5)
  with pytest.raises(
    TimeoutError,
    match="process 0 of 2: .* to 'save' within 0.5 s .DEADLINE_EXCEEDED: task",
  ):
    distributed.barrier('save', timeout=0.5)
  # No name is used twice, and every process counts alike.
  assert len(set(asked)) == 3


@pytest.mark.slow
def test_processes_meet_at_barriers_and_miss_the_one_who_does_not_come():
  with socket.create_server(('127.0.0.1', 0)) as server:
    address = f'127.0.0.1:{server.getsockname()[1]}'
  started = [
    subprocess.Popen(
      [sys.executable, __file__, address, '2', str(i)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      cwd=_ROOT,
      env=os.environ | {'PYTHONPATH': str(_ROOT)},
    )
    for i in range(2)
  ]
  try:
    outputs = [process.communicate(timeout=200) for process in started]
  finally:
    for process in started:
      process.kill()
      process.wait()
  for process, (_, stderr) in zip(started, outputs):
    assert process.returncode == 0, stderr[-3000:]
  first, second = (stdout.splitlines() for stdout, _ in outputs)
  assert first[0] == 'writer' and first[1].startswith('process 0 of 2')
  assert "'never' within 1 s" in first[1]
  assert second == ['reader']


def _process(address: str, count: int, i: int) -> None:
  """One process: passes three barriers; at another, the first is alone."""
  jax.config.update('jax_platforms', 'cpu')
  distributed.start(distributed.Processes(address, count, i), timeout=120)
  print('writer' if distributed.is_writer() else 'reader')
  for _ in range(3):
    distributed.barrier('together', timeout=60)
  if i == 0:
    try:
      distributed.barrier('never', timeout=1)
    except TimeoutError as error:
      print(error)
  distributed.barrier('end', timeout=60)


if __name__ == '__main__':
  _process(sys.argv[1], *map(int, sys.argv[2:]))
