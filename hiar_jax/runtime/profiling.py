"""Where time and memory go: a window of jax.profiler, speed, peaks."""

import pathlib
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, Self

import jax


class TraceWindow:
  """Traces some iterations of a loop, once.

  The trace holds whole iterations: the device is waited for before the first
  of them and after the last one.
  """

  def __init__(
    self, directory: str | pathlib.Path, window: tuple[int, int] | None
  ):
    """Prepares.

    Args:
      directory: of the trace, for TensorBoard's or XProf's profile viewer.
      window: first iteration, from 1, and number of iterations; None traces
        nothing.

    Raises:
      ValueError: if the window is empty or starts before 1.
    """
    if window is not None and min(window) < 1:
      raise ValueError(
        f'profile={window[0]}:{window[1]}: START and COUNT must be at least 1'
      )
    self._directory = str(directory)
    self._first, self._count = window or (0, 0)
    self._last = 0  # Iteration that ends the trace under way; 0: none is.

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *unused_error: object) -> None:
    self._stop()

  def before(self, iteration: int, state: Any) -> None:
    """Call before an iteration (from 1) with the state that it starts from."""
    if iteration == self._first:
      jax.block_until_ready(state)
      jax.profiler.start_trace(self._directory)
      self._last = iteration + self._count - 1

  def after(self, iteration: int, state: Any) -> None:
    """Call after an iteration with the state that it made."""
    if iteration == self._last:
      jax.block_until_ready(state)
      self._stop()

  def _stop(self):
    if self._last:
      self._last = 0
      jax.profiler.stop_trace()
      print(f'profile in {self._directory}', flush=True)


class Speed:
  """Iterations a second between two looks, and peaks of memory."""

  def __init__(
    self,
    start: int,
    flops: float | None = None,
    peak: float | None = None,
    videos: float | None = None,
    tokens: float | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Starts the clock.

    Args:
      start: iterations done before.
      flops: of an iteration, all devices together; None if not known.
      peak: FLOP/s that the devices together are stated to reach; None if not
        known.
      videos: of an iteration, all devices together; None if not known.
      tokens: of those videos, likewise.
      clock: seconds that only grow.
    """
    self._clock, self._flops, self._peak = clock, flops, peak
    self._counts = {'videos': videos, 'tokens': tokens}
    self._done, self._since = start, clock()

  def look(self, iteration: int) -> dict[str, float]:
    """Numbers since the last look.

    Returns:
      `iterations_per_second`, checkpoints and samples included;
      `host_memory_gib`, and where the device tells it `device_memory_gib`,
      the peaks since the process started; `videos_per_second` and
      `tokens_per_second` where their numbers are known; with `flops`,
      `model_tflops_per_second`, and with `peak`, `mfu`, their ratio (model
      FLOPs utilisation, Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
    """
    now = self._clock()
    elapsed = max(now - self._since, 1e-9)
    values = {
      'iterations_per_second': (iteration - self._done) / elapsed,
      'host_memory_gib': _host_peak_bytes() / 2**30,
    }
    self._done, self._since = iteration, now
    for name, count in self._counts.items():
      if count is not None:
        rate = values['iterations_per_second'] * count
        values[f'{name}_per_second'] = rate
    if self._flops is not None:
      rate = values['iterations_per_second'] * self._flops
      values['model_tflops_per_second'] = rate / 1e12
      if self._peak is not None:
        values['mfu'] = rate / self._peak
    peaks = [
      stats['peak_bytes_in_use']
      for device in jax.local_devices()
      if (stats := device.memory_stats()) and 'peak_bytes_in_use' in stats
    ]
    if peaks:
      values['device_memory_gib'] = max(peaks) / 2**30
    return values


def _host_peak_bytes() -> int:
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # Linux counts KiB, macOS bytes.
  return peak if sys.platform == 'darwin' else peak * 1024
