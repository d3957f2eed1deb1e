"""Numbers of a run on the host: a JSONL file, means, a progress line."""

import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TextIO

import jax
import numpy as np

from hiar_jax.runtime import compile_clock, files

# Of a step's time, above which it says nothing of the next one.
_COMPILED_SHARE = 0.1


class MetricsFile:
  """Appends one JSON object a line: {"step": 40, "loss": 0.31, ...}.

  A run that goes on from a checkpoint repeats the iterations after it, so lines
  beyond the restored step, and a line cut short by a kill, are dropped first.
  """

  def __init__(self, path: str | pathlib.Path, *, restored_step: int = 0):
    """Opens the file for appending.

    Args:
      path: is created, with its folder, if absent.
      restored_step: iterations that are done; 0 starts the file anew.

    Raises:
      OSError: if the file cannot be written.
    """
    self.path = pathlib.Path(path)
    self.path.parent.mkdir(parents=True, exist_ok=True)
    if self.path.exists():
      kept = [r for r in read_metrics(self.path) if r['step'] <= restored_step]
      with files.whole_file(self.path) as partial:
        partial.write_text(''.join(map(_line, kept)))
    self._file = self.path.open('a')

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Appends one line; numbers that are not finite become null."""
    self._file.write(_line({'step': int(step), **values}))
    self._file.flush()

  def close(self) -> None:
    self._file.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *unused_error: object) -> None:
    self.close()


def read_metrics(path: str | pathlib.Path) -> list[dict[str, Any]]:
  """Every whole line of a metrics file, in order.

  Raises:
    ValueError: if a line before the last is not one of `MetricsFile`'s.
  """
  lines = pathlib.Path(path).read_text().split('\n')
  records = []
  for number, line in enumerate(lines, 1):
    if not line:
      continue
    try:
      record = json.loads(line)
    except json.JSONDecodeError:
      if number == len(lines):  # No newline after it: the writer was killed.
        break
      raise ValueError(f'line {number} of {path} is not JSON') from None
    if not isinstance(record, dict) or 'step' not in record:
      raise ValueError(f'line {number} of {path} has no step')
    records.append(record)
  return records


def means(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
  """The mean of each key over the records that have it."""
  names = dict.fromkeys(name for values in records for name in values)
  return {
    name: float(np.mean([v[name] for v in records if name in v]))
    for name in names
  }


def means_by(
  records: Sequence[Mapping[str, float]],
  key: str,
  names: Sequence[str],
  *,
  suffix: str,
) -> dict[str, float]:
  """Means apart for each value of a key: {'loss_exit0': .., 'loss_exit3': ..}.

  Args:
    records: of several iterations; those without the key are left out.
    key: that has whole numbers.
    names: of which there are means.
    suffix: between the name and the number.
  """
  groups: dict[int, Any] = {}
  for values in records:
    if key in values:
      kept = {name: values[name] for name in names if name in values}
      groups.setdefault(int(values[key]), []).append(kept)
  return {
    f'{name}{suffix}{group}': value
    for group in sorted(groups)
    for name, value in means(groups[group]).items()
  }


class Progress:
  """A progress bar on a terminal, a line now and then in a log.

  Both show the step, iterations a second, the time left and the last reported
  values, such as 'loss 0.312  grad_norm 1.4'. Steps that jax compiled in tell
  nothing of those to come, and do not count for the rate.
  """

  def __init__(
    self,
    total: int | None,
    *,
    start: int = 0,
    label: str = '',
    unit: str = 'it',
    seconds_between_lines: float = 30.0,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
    compiling: Callable[[], float] = compile_clock.seconds,
  ):
    """Starts the clock.

    Args:
      total: the step at which the run ends; None: nobody knows.
      start: steps done before; they count for the bar, not for the rate.
      label: stands before the numbers.
      unit: what a step is: 'it', 'block', 'video'.
      seconds_between_lines: how often a log gets a line.
      stream: where to; None is stderr.
      clock: seconds that only grow.
      compiling: those of them that went into compiling.
    """
    compile_clock.start()
    self._total, self._start, self._step = total, start, start
    self._label, self._unit = label, unit
    self._seconds_between_lines = seconds_between_lines
    self._stream = sys.stderr if stream is None else stream
    self._clock, self._compiling = clock, compiling
    self._started = self._printed = self._looked = clock()
    self._compiled = compiling()
    # Without those that were compiled in.
    self._counted_steps, self._counted_seconds = 0, 0.0
    self._text = ''
    self._bar = None
    if self._stream.isatty():
      import tqdm

      self._bar = tqdm.tqdm(
        total=total,
        initial=start,
        desc=label or None,
        unit=unit,
        file=self._stream,
        dynamic_ncols=True,
      )

  def update(
    self, step: int, values: Mapping[str, float] | None = None
  ) -> None:
    """Moves to a step.

    Args:
      step: that is done.
      values: Python numbers to show from now on; None leaves the last ones.
    """
    advanced, self._step = step - self._step, step
    took, compiled = self._clock() - self._looked, self._compiling()
    counts = compiled - self._compiled <= _COMPILED_SHARE * took
    self._looked, self._compiled = self._looked + took, compiled
    if counts:
      self._counted_steps += advanced
      self._counted_seconds += took
    if values is not None:
      self._text = '  '.join(f'{k} {v:.4g}' for k, v in values.items())
    if self._bar is not None:
      if values is not None:
        self._bar.set_postfix_str(self._text, refresh=False)
      if not counts:
        self._bar.unpause()
      self._bar.update(advanced)
    elif self._clock() - self._printed >= self._seconds_between_lines:
      self._print()

  def rate(self) -> float:
    """Steps a second since the start of this process; 0 before the first."""
    steps, seconds = self._counted_steps, self._counted_seconds
    if not steps:
      steps = self._step - self._start
      seconds = self._clock() - self._started
    return steps / seconds if seconds > 0 else 0.0

  def close(self) -> None:
    """Ends the bar, or prints the last line."""
    if self._bar is not None:
      self._bar.close()
    else:
      self._print()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *unused_error: object) -> None:
    self.close()

  def _print(self) -> None:
    self._printed = self._clock()
    rate = self.rate()
    label = f'{self._label} ' if self._label else ''
    text = f'  {self._text}' if self._text else ''
    done, left = str(self._step), ''
    if self._total is not None:
      done += f'/{self._total}'
      seconds = (self._total - self._step) / rate if rate else math.inf
      if not self._counted_steps and seconds:  # All of it was compiled in.
        seconds = math.inf
      left = f'  {_duration(seconds)} left'
    print(
      f'{label}{done}  {_rate_text(rate, self._unit)}{left}{text}',
      file=self._stream,
      flush=True,
    )


def _line(record: Mapping[str, Any]) -> str:
  def plain(value):
    if isinstance(value, jax.Array | np.ndarray | np.generic):
      value = np.asarray(value).tolist()
    if isinstance(value, list | tuple):
      return [plain(v) for v in value]
    # NaN and Infinity are not JSON; other readers stop at them.
    if isinstance(value, float) and not math.isfinite(value):
      return None
    return value

  record = {key: plain(value) for key, value in record.items()}
  return json.dumps(record, allow_nan=False) + '\n'


def _rate_text(rate: float, unit: str) -> str:
  if 0 < rate < 1:
    return f'{1 / rate:.2f} s/{unit}'
  return f'{rate:.2f} {unit}/s'


def _duration(seconds: float) -> str:
  """'0:41', '12:05', '3:20:00', '?' if unknown."""
  if not math.isfinite(seconds):
    return '?'
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours}:{minutes:02}:{seconds:02}'
  return f'{minutes}:{seconds:02}'
