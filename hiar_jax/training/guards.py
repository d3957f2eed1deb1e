"""What the host makes of the steps' values: means, skipped updates, errors.

A step does not apply an update that is not finite and says so in a value
`skipped` (or 'student_skipped', 'critic_skipped'). The host reads it together
with everything else when a line of the metrics is due: no earlier, because it
would have to wait for the device.
"""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, TextIO

import jax
import numpy as np

from hiar_jax.runtime import metrics

# Losses whose size depends on the step at which the rollout was left.
_BY_EXIT = {
  'exit_step': ('reverse_kl', 'dmd_gradient'),
  'critic_exit_step': ('critic',),
}
_SKIPPED = 'skipped'


@dataclasses.dataclass(frozen=True)
class Report:
  """What happened since the last report.

  Attributes:
    values: means by name; of `skipped` values the counts instead, and where
      there were any, `skipped_iterations` and `skipped_elements`, the numbers
      of the data elements in their batches.
    exhausted: why the run should stop, or None.
  """

  values: dict[str, Any]
  exhausted: str | None


class Guard:
  """Collects values of iterations and judges them once they are due."""

  def __init__(self, max_skipped: int, *, stream: TextIO | None = None):
    """Starts with nothing skipped.

    Args:
      max_skipped: updates of one network in a row that may be skipped before
        the run should stop, >= 1.
      stream: for a line on each skipped update; None is stderr.
    """
    self._max_skipped = max_skipped
    self._stream = sys.stderr if stream is None else stream
    self._pending: list[tuple[int, Any, Mapping[str, Any]]] = []
    self._in_a_row: dict[str, int] = {}

  def add(
    self,
    iteration: int,
    elements: np.ndarray | None,
    values: Mapping[str, jax.Array | float],
  ) -> None:
    """Notes one iteration, as its step returned it.

    Args:
      iteration: from 1.
      elements: numbers of the data elements in its batch, if known.
      values: scalars; keys may differ between iterations.
    """
    self._pending.append((iteration, elements, dict(values)))

  def report(self) -> Report:
    """Fetches the values since the last report, and starts anew.

    Raises:
      ValueError: if a value is not finite although its update was applied.
    """
    pending, self._pending = self._pending, []
    fetched = jax.device_get([values for _, _, values in pending])
    clean, iterations, exhausted = [], [], None
    elements: set[int] = set()
    for (iteration, batch, _), values in zip(pending, fetched, strict=True):
      skipped = [k for k in values if k.endswith(_SKIPPED) and values[k]]
      bad = {k: v for k, v in values.items() if not np.isfinite(v)}
      if bad and not skipped:
        name, value = next(iter(bad.items()))
        raise ValueError(f'{name} is {value} in iteration {iteration}')
      if skipped:
        self._print(iteration, batch, skipped, bad)
        iterations.append(iteration)
        elements.update([] if batch is None else map(int, batch))
      for name in values:
        if name.endswith(_SKIPPED):
          in_a_row = self._in_a_row.get(name, 0) + 1 if values[name] else 0
          self._in_a_row[name] = in_a_row
          if in_a_row == self._max_skipped:
            exhausted = (
              f'{in_a_row} updates in a row were not finite, the last in '
              f'iteration {iteration}'
            )
      clean.append({k: v for k, v in values.items() if k not in bad})
    result: dict[str, Any] = dict(metrics.means(clean))
    for name in result:
      if name.endswith(_SKIPPED):
        result[name] = sum(int(v.get(name, 0)) for v in clean)
    for key, names in _BY_EXIT.items():
      if result.pop(key, None) is not None:
        result |= metrics.means_by(clean, key, names, suffix='_exit')
    if iterations:
      result['skipped_iterations'] = iterations
      result['skipped_elements'] = sorted(elements)
    return Report(result, exhausted)

  def _print(self, iteration, batch, skipped, bad):
    networks = [k.removesuffix(_SKIPPED).rstrip('_') for k in skipped]
    values = ', '.join(f'{name} {value}' for name, value in bad.items())
    elements = 'unknown' if batch is None else list(map(int, batch))
    of = ' of the ' + ' and the '.join(networks) if any(networks) else ''
    print(
      f'iteration {iteration}: the update{of} was not finite and is left out '
      f'({values}); data elements {elements}',
      file=self._stream,
      flush=True,
    )
