"""Where a program's time went, compilation apart from the rest."""

import contextlib
import time
from collections.abc import Iterator

from hiar_jax.runtime import compile_clock


class Stopwatch:
  """Where the time went: seconds by name, compilation apart from the rest."""

  def __init__(self, started: float):
    """Takes what was before it for imports.

    Args:
      started: of `time.monotonic`, when the program began.
    """
    self._started = started
    self.seconds = {'import': time.monotonic() - started}
    compile_clock.start()

  @contextlib.contextmanager
  def __call__(self, name: str) -> Iterator[None]:
    started, compiled = time.monotonic(), compile_clock.seconds()
    yield
    elapsed = time.monotonic() - started
    compiled = compile_clock.seconds() - compiled
    self._add('compile', compiled)
    self._add(name, elapsed - compiled)

  def __str__(self) -> str:
    total = time.monotonic() - self._started
    parts = ', '.join(f'{k} {v:.1f}' for k, v in self.seconds.items())
    return f'{total:.1f} s: {parts}'

  def _add(self, name: str, seconds: float) -> None:
    self.seconds[name] = self.seconds.get(name, 0.0) + seconds
