"""Ends a process whose training stands still, and says where it stood.

A device that hangs, or a peer that is gone, leaves the host waiting for ever
inside one call, where no exception can reach it.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

from hiar_jax.runtime import follower

STATUS = 124  # As of timeout(1).


class Watchdog:
  """Demands that an iteration finishes every `seconds`.

  The loop does not wait for the device, so a thread does, see `Follower`. A
  second one looks at the time. If even threads stand still (a call that hangs
  with the GIL), a timer in C ends the process, a limit later.
  """

  def __init__(
    self,
    seconds: float | None,
    *,
    start: int = 0,
    end: Callable[[str], None] | None = None,
  ):
    """Prepares; entering the context starts the clock.

    Args:
      seconds: longest time between two finished iterations; compilation and
        the wait for data count. None: there is no limit, and no thread.
      start: iterations done before.
      end: is told when time is up; None dumps all stacks to stderr and exits
        with STATUS.

    Raises:
      ValueError: if seconds is not positive.
    """
    if seconds is not None and seconds <= 0:
      raise ValueError(f'step_timeout={seconds} is not positive')
    self._seconds = seconds
    self._end = _dump_and_exit if end is None else end
    self._done, self._since = start, time.monotonic()
    self._paused = False
    self._over = threading.Event()
    self._follower = self._thread = None
    if seconds is not None:
      self._follower = follower.Follower(self._finished)
      self._thread = threading.Thread(
        target=self._look, args=(seconds,), name='watchdog', daemon=True
      )

  def __enter__(self) -> Self:
    self._since = time.monotonic()
    if self._seconds is not None:
      self._set_timer(self._seconds)
    for thread in (self._follower, self._thread):
      if thread is not None:
        thread.start()
    return self

  def __exit__(self, *unused_error: object) -> None:
    if self._follower is None or self._thread is None:
      return
    self._over.set()
    self._follower.close()
    self._thread.join()
    faulthandler.cancel_dump_traceback_later()

  def step(self, iteration: int, values: Any) -> None:
    """Notes that an iteration was started.

    Args:
      iteration: its number, from 1.
      values: arrays that are ready when it has finished, and not donated.
    """
    if self._follower is not None:
      self._follower.step(iteration, values)

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Time inside does not count."""
    self._paused = True
    try:
      yield
    finally:
      self._since, self._paused = time.monotonic(), False

  def _finished(self, iteration: int) -> None:
    self._done, self._since = iteration, time.monotonic()

  def _look(self, seconds: float) -> None:
    while not self._over.wait(min(seconds / 4, 10.0)):
      self._set_timer(seconds)
      if not self._paused and time.monotonic() - self._since > seconds:
        self._end(
          f'iteration {self._done + 1} has not finished within '
          f'{seconds:g} s; what each thread was doing:'
        )
        return

  def _set_timer(self, seconds: float) -> None:
    """Puts off the end that comes if no thread gets to put it off again."""
    faulthandler.dump_traceback_later(2 * seconds, exit=True)


def _dump_and_exit(message: str) -> None:
  print(f'error: {message}', file=sys.stderr, flush=True)
  faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
  sys.stderr.flush()
  # No clean-up: it would wait for what hangs.
  os._exit(STATUS)
