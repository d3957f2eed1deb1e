"""Tells when iterations finish that a loop has only started."""

import queue
import threading
from collections.abc import Callable
from typing import Any

import jax


class Follower:
  """A thread that waits for iterations in the order they were started in.

  A loop that does not wait for the device is ahead of it: what it has started
  says nothing of how far the device is.
  """

  def __init__(self, finished: Callable[[int], None]):
    """Prepares; `start` starts the thread.

    Args:
      finished: is told the number of every iteration that has finished, in the
        thread.
    """
    self._finished = finished
    self._started: queue.SimpleQueue[tuple[int, Any] | None] = (
      queue.SimpleQueue()
    )
    self._thread = threading.Thread(
      target=self._follow, name='follower', daemon=True
    )

  def start(self) -> None:
    self._thread.start()

  def step(self, iteration: int, values: Any) -> None:
    """Notes that an iteration was started.

    Args:
      iteration: its number, from 1.
      values: arrays that are ready when it has finished, and not donated.
    """
    self._started.put((iteration, values))

  def close(self, timeout: float = 0.0) -> None:
    """Ends the thread, and waits so many seconds for it.

    It ends after what was started before, so on a device that hangs it stays.
    """
    self._started.put(None)
    if timeout:
      self._thread.join(timeout)

  def _follow(self):
    while (item := self._started.get()) is not None:
      iteration, values = item
      try:
        jax.block_until_ready(values)
      except RuntimeError:  # The loop meets the same error, and reports it.
        return
      self._finished(iteration)
