"""SIGTERM and Ctrl-C end a loop between two iterations, not inside one."""

import os
import signal
import threading
from typing import Any, NoReturn, Self

import jax
from jax.experimental import multihost_utils

SIGTERM_STATUS = 128 + signal.SIGTERM


class StopSignals:
  """Notes the request to stop until the loop asks for it.

    with StopSignals() as stop:
      for iteration in ...:
        ...
        if stop.requested(iteration):
          save()
          stop.leave()

  Several processes that train together have to stop at the same iteration:
  there jax's preemption service takes the SIGTERM of any of them and agrees on
  one, which `requested` names to all. A second Ctrl-C is not waited with.
  Outside of the main thread, which alone gets signals, nothing is noted.
  """

  def __init__(self, *, together: bool = True):
    """Prepares; entering the context takes the signals over.

    Args:
      together: processes of `jax.distributed`, if there are several, stop at
        the same iteration.
    """
    self._received = None
    self._before: dict[int, Any] = {}
    self._together = together and jax.process_count() > 1

  def __enter__(self) -> Self:
    if threading.current_thread() is threading.main_thread():
      # Of several processes, SIGTERM belongs to the preemption service.
      for number in (signal.SIGINT, signal.SIGTERM)[: 2 - self._together]:
        self._before[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *unused_error: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._before = {}

  def requested(self, iteration: int) -> bool:
    """Whether to stop now.

    Args:
      iteration: that is done; several processes must all ask after each.
    """
    if self._together:
      return multihost_utils.reached_preemption_sync_point(iteration)
    return self._received is not None

  def leave(self) -> NoReturn:
    """Raises SystemExit(143), or KeyboardInterrupt after Ctrl-C alone."""
    if self._received == signal.SIGINT and not self._together:
      raise KeyboardInterrupt
    raise SystemExit(SIGTERM_STATUS)

  def _note(self, number, frame):
    del frame
    self._received = number
    if number == signal.SIGINT:
      signal.signal(number, self._before.pop(number))
      if self._together:
        os.kill(os.getpid(), signal.SIGTERM)
