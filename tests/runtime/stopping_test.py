"""A loop is asked to stop, and stops where it can go on from."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from hiar_jax.runtime import stopping

_ROOT = pathlib.Path(__file__).parents[2]


def test_sigterm_is_noted_until_the_loop_asks():
  with stopping.StopSignals() as stop:
    assert not stop.requested(1)
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert stop.requested(2)
    with pytest.raises(SystemExit) as caught:
      stop.leave()
  assert caught.value.code == 143


def test_a_second_interrupt_is_not_waited_with():
  # A shell's background jobs ignore SIGINT: then there would be no second one.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with stopping.StopSignals() as stop:
      signal.raise_signal(signal.SIGINT)
      assert stop.requested(1)
      with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
  finally:
    signal.signal(signal.SIGINT, before)


def test_outside_of_the_main_thread_nothing_is_touched():
  before = signal.getsignal(signal.SIGTERM)
  seen = []

  def run():
    with stopping.StopSignals() as stop:
      seen.append((signal.getsignal(signal.SIGTERM), stop.requested(1)))

  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  assert seen == [(before, False)]


_PROGRAM = """
import sys, time
from hiar_jax.runtime import distributed, stopping
distributed.start(
  distributed.Processes('localhost:{port}', 2, int(sys.argv[1])), timeout=60
)
with stopping.StopSignals() as stop:
  for iteration in range(1, 6000):
    time.sleep(0.02)
    if iteration == 1:
      print('started', flush=True)
    if stop.requested(iteration):
      print('stopped after', iteration, flush=True)
      stop.leave()
"""


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_processes_stop_after_the_same_iteration(number):
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', _PROGRAM.format(port=port), str(index)],
      cwd=_ROOT,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'},
      stdout=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  try:
    for process in processes:
      assert process.stdout.readline() == 'started\n'
    time.sleep(0.3)
    processes[1].send_signal(number)  # The other learns of it from jax.
    lines = [process.communicate(timeout=120)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [143, 143]
  assert lines[0].startswith('stopped after') and lines[0] == lines[1]
