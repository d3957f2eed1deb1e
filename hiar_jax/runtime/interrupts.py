"""Ctrl-C and SIGTERM end a program at any moment, with one status.

Python raises KeyboardInterrupt wherever its main thread happens to be. In
programs of jax that is not enough:

- inside a callback of C++ (comparing static arguments, collecting garbage) the
  exception is dropped, or comes out as another one;
- at the end, with XLA's threads still at work, taking the interpreter apart may
  be a segmentation fault;
- half imported modules of C++ may be one as well.

So an exception is raised again until one is under way, whatever error comes out
then counts as the interruption, and the process ends without more ado. Signals
that were ignored when the process started stay so.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

_SECONDS = 0.25  # until an exception that was dropped is raised again

_WORDS = {signal.SIGINT: b'interrupted\n', signal.SIGTERM: b'terminated\n'}
_received: signal.Signals | None = None


def leave_at_once() -> None:
  """From now on a signal ends the process where it is: nothing to clean up."""

  def leave(number: int, unused_frame: FrameType | None) -> None:
    _end(signal.Signals(number))

  _handle(leave)


def unwind() -> None:
  """From now on a signal raises: KeyboardInterrupt, or SystemExit(143).

  It does so again and again until an exception is under way.
  """

  def note(number: int, unused_frame: FrameType | None) -> None:
    global _received
    _received = signal.Signals(number)
    _arm()
    _raise()

  _handle(note)


@contextlib.contextmanager
def noted() -> Iterator[Callable[[], bool]]:
  """Signals raise nothing inside; what is given tells whether one came.

  For loops that ask between two rounds, and have half a file in their hands.
  """
  came = False

  def note(unused_number: int, unused_frame: FrameType | None) -> None:
    nonlocal came
    came = True

  before = {number: signal.signal(number, note) for number in _WORDS}
  try:
    yield lambda: came
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def check() -> None:
  """Raises what a signal asked for, if it was dropped on the way."""
  if _received is not None:
    _raise()


def leave_if_received() -> None:
  """Ends the process if a signal came, whatever became of its exception."""
  if _received is not None:
    _end(_received)


def leave() -> NoReturn:
  """Ends the process as after Ctrl-C."""
  _end(signal.SIGINT)


def _handle(handler: Callable[[int, FrameType | None], Any]) -> None:
  for number in _WORDS:
    if signal.getsignal(number) is not signal.SIG_IGN:
      signal.signal(number, handler)


def _arm() -> None:
  def again(unused_number: int, unused_frame: FrameType | None) -> None:
    _arm()
    # While one is handled, files are being closed: not to be disturbed.
    if sys.exc_info()[1] is None:
      _raise()

  if hasattr(signal, 'setitimer'):
    signal.signal(signal.SIGALRM, again)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)


def _raise() -> NoReturn:
  if _received == signal.SIGTERM:
    raise SystemExit(128 + signal.SIGTERM)
  raise KeyboardInterrupt


def _end(number: signal.Signals) -> NoReturn:
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):  # Nobody listens any more.
      stream.flush()
  os.write(2, _WORDS[number])
  os._exit(128 + number)
