"""A loop that stands still is ended, one that is slow to ask is not."""

import pathlib
import subprocess
import sys
import threading
import time

import pytest

from hiar_jax.runtime import watchdog
from tests import late_values

_ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def dog():
  """A watchdog of half a second, and what it has said."""
  said = []
  with watchdog.Watchdog(0.5, start=4, end=said.append) as dog:
    yield dog, said


def test_an_iteration_that_never_finishes_is_named(dog):
  dog, said = dog
  values = late_values.LateValues()
  dog.step(5, {'loss': 1.0})
  dog.step(6, values)
  # The loop itself runs on: it does not wait for the device.
  dog.step(7, {'loss': 1.0})
  deadline = time.monotonic() + 20
  while not said and time.monotonic() < deadline:
    time.sleep(0.05)
  values.finish()
  assert said == [
    'iteration 6 has not finished within 0.5 s; what each thread was doing:'
  ]


def test_iterations_that_finish_in_time_may_go_on_for_ever(dog):
  dog, said = dog
  for iteration in range(5, 20):
    dog.step(iteration, {})
    time.sleep(0.1)
  assert not said


def test_time_that_is_paused_does_not_count(dog):
  dog, said = dog
  with dog.paused():
    time.sleep(1.0)
  assert not said


def test_without_a_limit_there_is_no_thread():
  before = threading.active_count()
  with watchdog.Watchdog(None) as dog:
    dog.step(1, {})
    assert threading.active_count() == before
  with pytest.raises(ValueError, match='step_timeout=0 is not positive'):
    watchdog.Watchdog(0)


# The second one holds the GIL, so that no thread can run any more.
_PROGRAM = """
import ctypes, time
from hiar_jax.runtime import watchdog
def a_call_that_hangs():
  {call}
with watchdog.Watchdog(0.5) as dog:
  dog.step(1, {{}})
  a_call_that_hangs()
"""


@pytest.mark.parametrize(
  ('call', 'status'),
  [('time.sleep(60)', watchdog.STATUS), ('ctypes.PyDLL(None).sleep(30)', 1)],
)
def test_a_process_that_hangs_ends_with_all_stacks(call, status):
  process = subprocess.run(
    [sys.executable, '-c', _PROGRAM.format(call=call)],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert process.returncode == status, process.stderr
  assert 'in a_call_that_hangs' in process.stderr
  if status == watchdog.STATUS:
    assert process.stderr.startswith(
      'error: iteration 2 has not finished within 0.5 s'
    )
