"""Arms of a study beside each other: means, intervals, differences, text.

A file has what was measured of one arm, seed and length, video by video. The
same number of scene is the same scene in every arm, so that arms are compared
scene by scene, over the seeds that both have; seeds are averaged within a
scene. Intervals are 95 % by bootstrap over scenes, see `report.estimate`: what
another seed of the training would give is not in them.

V scenes, K parts of a video.
"""

import json
import math
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hiar_jax.evaluation import report
from hiar_jax.runtime import files


class Kind(NamedTuple):
  """Videos that compare with each other.

  blocks: of a video, given ones included.
  given: blocks of the truth that it begins with; 0: none.
  """

  blocks: int
  given: int

  def __str__(self) -> str:
    return f'{self.blocks}b{self.given}'


class Column(NamedTuple):
  """A number of a table: where it lies, and how it is shown."""

  key: str
  heading: str
  style: str
  meaning: str


class Measured:
  """What lies in a folder, by arm, seed and kind."""

  def __init__(self, folder: pathlib.Path):
    """Reads all files that are whole.

    Raises:
      ValueError: if one is not what `write` wrote.
    """
    self._rows: dict[tuple[str, Kind], dict[int, list[dict]]] = {}
    for path in sorted(folder.glob('*.json')):
      try:
        found = files.parse_json(path.read_text())
        kind = Kind(found['blocks'], found['given'])
        seeds = self._rows.setdefault((found['arm'], kind), {})
        seeds[found['seed']] = found['videos']
      except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} is damaged ({error}); delete it') from error

  def seeds(self, arm: str, kind: Kind) -> list[int]:
    return sorted(self._rows.get((arm, kind), {}))

  def numbers(
    self,
    arm: str,
    kind: Kind,
    key: str,
    seeds: Collection[int] | None = None,
  ) -> dict[int, float]:
    """A number of every scene, mean over seeds; scenes without it left out.

    Args:
      arm: its name.
      kind: of videos.
      key: 'identity.hue', 'statistics.drift' and so on.
      seeds: that count; None: all there are.
    """
    group, _, name = key.partition('.')
    found: dict[int, list[float]] = {}
    for seed, rows in self._rows.get((arm, kind), {}).items():
      for row in rows if seeds is None or seed in seeds else ():
        value = row[group].get(name)
        if value is not None:
          found.setdefault(row['number'], []).append(value)
    return {number: float(np.mean(v)) for number, v in sorted(found.items())}

  def of_seed(self, arm: str, kind: Kind, key: str) -> list[float]:
    """The mean over scenes of each seed, in the order of `seeds`."""
    group, _, name = key.partition('.')
    return [
      _mean([row[group].get(name) for row in rows])
      for _, rows in sorted(self._rows.get((arm, kind), {}).items())
    ]

  def curve(self, arm: str, kind: Kind, name: str) -> report.Estimate | None:
    """Mean over scenes and seeds of a curve, [K]; None if there are none."""
    rows = [
      [math.nan if v is None else v for v in row['curves'][name]]
      for seed in self._rows.get((arm, kind), {}).values()
      for row in seed
    ]
    whole = [row for row in rows if all(map(math.isfinite, row))]
    return report.estimate(np.array(whole)) if whole else None


def write(
  path: pathlib.Path,
  *,
  arm: str,
  seed: int,
  kind: Kind,
  videos: Sequence[Mapping[str, Any]],
  **more: Any,
) -> None:
  """Writes one file, in one move.

  Args:
    path: in the folder of `Measured`.
    arm: its name.
    seed: of its training.
    kind: of the videos.
    videos: of each its `number`, and numbers by name in `identity` and
      `statistics`, and `curves`; NaN is written as null.
    **more: kept beside them, such as how long it took.
  """
  whole = {
    'arm': arm,
    'seed': seed,
    **kind._asdict(),
    **more,
    'videos': [_plain(video) for video in videos],
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  with files.whole_file(path) as partial:
    partial.write_text(json.dumps(whole, allow_nan=False))


def estimates(
  measured: Measured, arm: str, kind: Kind, columns: Sequence[Column]
) -> dict[str, report.Estimate]:
  """By the key of a column; without those that no scene has."""
  result = {}
  for column in columns:
    values = [*measured.numbers(arm, kind, column.key).values()]
    if values:
      result[column.key] = report.estimate(np.array(values))
  return result


def differences(
  measured: Measured,
  arm: str,
  against: str,
  kind: Kind,
  columns: Sequence[Column],
) -> dict[str, report.Estimate]:
  """An arm minus another, over scenes and seeds that both have, by key."""
  seeds = {*measured.seeds(arm, kind)} & {*measured.seeds(against, kind)}
  result = {}
  for column in columns:
    a = measured.numbers(arm, kind, column.key, seeds)
    b = measured.numbers(against, kind, column.key, seeds)
    both = a.keys() & b.keys()
    if both:
      values = [a[number] - b[number] for number in sorted(both)]
      result[column.key] = report.estimate(np.array(values))
  return result


def table(
  measured: Measured,
  arms: Sequence[str],
  kind: Kind,
  columns: Sequence[Column],
  against: str,
) -> str:
  """Markdown: a row for each arm that has videos of the kind.

  A cell is the mean, and the 95 % interval of the difference to `against`
  below zero or above as a sign, where it does not hold 0.
  """
  headings = ['arm', 'seeds', *(c.heading for c in columns)]
  lines = [f'| {" | ".join(headings)} |', '|---' * len(headings) + '|']
  for arm in arms:
    seeds = measured.seeds(arm, kind)
    if not seeds:
      continue
    means = estimates(measured, arm, kind, columns)
    apart = differences(measured, arm, against, kind, columns)
    cells = []
    for column in columns:
      if column.key not in means:
        cells.append('-')
        continue
      cell = cell_text(means[column.key], column.style)
      if arm != against and column.key in apart:
        cell += sign(apart[column.key])
      cells.append(cell)
    lines.append(f'| {arm} | {len(seeds)} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def cell_text(estimate: report.Estimate, style: str) -> str:
  """'0.257 [0.24, 0.27]'."""
  mean, low, high = (format(float(v), style) for v in estimate)
  return mean if math.isnan(float(estimate.low)) else f'{mean} [{low}, {high}]'


def sign(difference: report.Estimate) -> str:
  """' +' or ' -' where the interval of a difference does not hold 0."""
  if difference.low > 0:
    return ' +'
  return ' -' if difference.high < 0 else ''


def missing(
  measured: Measured, wanted: Sequence[tuple[str, int, Kind]]
) -> list[str]:
  """What is not measured yet of what was asked for, a word each."""
  return [
    f'{arm} seed {seed} {kind}'
    for arm, seed, kind in wanted
    if seed not in measured.seeds(arm, kind)
  ]


def as_json(
  measured: Measured,
  arms: Sequence[str],
  kinds: Sequence[Kind],
  columns: Sequence[Column],
  curves: Sequence[str],
  against: str,
) -> dict[str, Any]:
  """All means, intervals, differences and curves; JSON."""
  result = []
  for kind in kinds:
    for arm in arms:
      if not measured.seeds(arm, kind):
        continue
      found = {name: measured.curve(arm, kind, name) for name in curves}
      result.append(
        {
          'arm': arm,
          'seeds': measured.seeds(arm, kind),
          **kind._asdict(),
          'mean': _parts(estimates(measured, arm, kind, columns)),
          'of_seed': {
            c.key: _plain(measured.of_seed(arm, kind, c.key)) for c in columns
          },
          f'minus_{against}': _parts(
            differences(measured, arm, against, kind, columns)
          ),
          'curves': _parts({n: c for n, c in found.items() if c is not None}),
        }
      )
  return {'columns': {c.key: c.meaning for c in columns}, 'rows': result}


def _parts(values):
  return {name: _plain(v._asdict()) for name, v in values.items()}


def _plain(value):
  """Python's own numbers; NaN is None, which JSON knows."""
  if isinstance(value, Mapping):
    return {key: _plain(v) for key, v in value.items()}
  if isinstance(value, str | int | None):
    return value
  if np.ndim(value):
    return [_plain(v) for v in value]
  return float(value) if math.isfinite(value) else None


def _mean(values):
  known = [v for v in values if v is not None]
  return float(np.mean(known)) if known else math.nan
