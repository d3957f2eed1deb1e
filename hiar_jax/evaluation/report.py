"""What was measured of folders of videos: means, intervals, JSON, CSV, text.

Intervals are of the mean over videos, 95 %, by bootstrap (10,000 samples of as
many videos, percentiles). Two folders are compared video by video, by the names
of the files: what differs from scene to scene cancels out.
"""

import csv
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hiar_jax.evaluation import folders, statistics

_SAMPLES = 10_000
_SEED = 0
_WIDTH = 9  # Of a column of text.


class Column(NamedTuple):
  """A number of a table; its style, and what it means."""

  heading: str
  style: str
  meaning: str


# Of every table, by the names in `statistics.Summary`. Drift has motion and
# what stands for quality before it: without them it says nothing.
COLUMNS = {
  'motion': Column(
    'motion', '.2f', 'of the 5 % of blocks that move most, % of a side a frame'
  ),
  'sharpness': Column('sharp', '.1f', 'variance of the Laplacian of the luma'),
  'contrast': Column('contrast', '.3f', 'standard deviation of the luma, 0..1'),
  'saturation': Column('saturat.', '.3f', 'mean HSV saturation, 0..1'),
  'similarity': Column('similar', '.4f', 'correlation of frames in a row'),
  'difference': Column('differ.', '.4f', 'of frames in a row, mean, 0..1'),
  'jump': Column('jump', '.4f', 'greatest difference above the median one'),
  'motion_drift': Column(
    'motion +-', '+.2f', 'rise of the motion from first to last segment'
  ),
  'drift': Column('drift', '.3f', 'slopes over five segments, weighted sum'),
  'drift_ends': Column('ends', '.3f', 'the same of last 15 % - first 15 %'),
  'drift_first': Column('first', '.3f', 'the same of segments - first one'),
}


class Estimate(NamedTuple):
  """A mean over videos with its interval, NaN where there is but one video."""

  mean: np.ndarray
  low: np.ndarray
  high: np.ndarray


class Comparison(NamedTuple):
  """The second folder minus the first, over the videos that both have.

  names: of those videos.
  columns: by the names of COLUMNS.
  """

  names: list[str]
  columns: dict[str, Estimate]


def estimate(values: np.ndarray) -> Estimate:
  """Of [V] or [V, P] values of V videos.

  Raises:
    ValueError: if there is no video.
  """
  values = np.asarray(values, np.float64)
  count = len(values)
  if not count:
    raise ValueError('no video to take a mean of')
  mean = values.mean(axis=0)
  if count == 1:
    return Estimate(mean, mean * np.nan, mean * np.nan)
  draws = _draws(count) @ values / count
  low, high = np.percentile(draws, (2.5, 97.5), axis=0)
  return Estimate(mean, low, high)


# A table asks for the same ones again and again.
@functools.lru_cache(maxsize=4)
def _draws(count: int) -> np.ndarray:
  """How often each sample has each video: float64 [samples, V]."""
  return (
    np.random.default_rng(_SEED)
    .multinomial(count, np.full(count, 1 / count), size=_SAMPLES)
    .astype(np.float64)
  )


def columns(folder: folders.Folder) -> dict[str, Estimate]:
  """The numbers of a folder, by the names of COLUMNS."""
  return {
    name: estimate(
      np.array([getattr(v.summary, name) for v in folder.videos.values()])
    )
    for name in COLUMNS
  }


def compare(first: folders.Folder, second: folders.Folder) -> Comparison:
  """Two folders, video by video.

  Raises:
    ValueError: if no name is in both.
  """
  names = sorted(first.videos.keys() & second.videos.keys())
  if not names:
    raise ValueError(
      f'{first.name} and {second.name} have no video of one name'
    )
  return Comparison(
    names,
    {
      column: estimate(
        np.array(
          [
            getattr(second.videos[name].summary, column)
            - getattr(first.videos[name].summary, column)
            for name in names
          ]
        )
      )
      for column in COLUMNS
    },
  )


def curves(folder: folders.Folder) -> dict[str, Estimate]:
  """Means over videos at equal shares of their lengths, by series."""
  points = max(len(v.curves['motion']) for v in folder.videos.values())
  return {
    name: estimate(
      np.stack(
        [_resample(v.curves[name], points) for v in folder.videos.values()]
      )
    )
    for name in statistics.SERIES
  }


def format_table(measured: Sequence[folders.Folder]) -> str:
  """Lines of text: a row for each folder, and one for the difference of two."""
  rows = {folder.name: columns(folder) for folder in measured}
  counts = {folder.name: len(folder.videos) for folder in measured}
  if len(measured) == 2:
    comparison = try_compare(*measured)
    if comparison:
      label = 'difference'
      rows[label], counts[label] = comparison.columns, len(comparison.names)
  width = max(len('97.5 %'), *map(len, rows))
  headings = [c.heading.rjust(_WIDTH) for c in COLUMNS.values()]
  lines = ['  '.join((' ' * width, 'videos', *headings))]
  for label, numbers in rows.items():
    lines.append(_line(label.ljust(width), counts[label], numbers, 'mean'))
    if counts[label] > 1:
      for name, part in (('2.5 %', 'low'), ('97.5 %', 'high')):
        lines.append(_line(name.rjust(width), '', numbers, part))
  return '\n'.join(lines)


def _line(label, count, numbers, part):
  cells = [
    format(float(getattr(numbers[name], part)), column.style).rjust(_WIDTH)
    for name, column in COLUMNS.items()
  ]
  return '  '.join((label, str(count).rjust(6), *cells))


def try_compare(
  first: folders.Folder, second: folders.Folder
) -> Comparison | None:
  """As `compare`; None if no name is in both."""
  if first.videos.keys() & second.videos.keys():
    return compare(first, second)
  return None


def as_json(measured: Sequence[folders.Folder]) -> dict[str, Any]:
  """Everything, with what the numbers mean."""
  result = {
    'columns': {name: c.meaning for name, c in COLUMNS.items()},
    'drift': {
      'segments': statistics.SEGMENTS,
      'weights': statistics.DRIFT_WEIGHTS,
      'scales': statistics.DRIFT_SCALES,
      'divided_by_own_mean_but_no_less_than': statistics.DRIFT_FLOORS,
      'ends': statistics.END_SHARE,
    },
    'folders': [
      {
        'name': folder.name,
        'mean': _estimates(columns(folder)),
        'curves': _estimates(curves(folder)),
        'videos': [video.to_json() for video in folder.videos.values()],
        'failed': folder.failed,
      }
      for folder in measured
    ],
  }
  if len(measured) == 2:
    comparison = try_compare(*measured)
    if comparison:
      result['difference'] = {
        'second_minus_first_of': comparison.names,
        'mean': _estimates(comparison.columns),
      }
  return result


def write(
  out: pathlib.Path,
  measured: Sequence[folders.Folder],
  page: Callable[[], str],
) -> list[pathlib.Path]:
  """Writes report.json, videos.csv and report.html, each in one move.

  Args:
    out: a folder that exists.
    measured: one folder or two.
    page: makes the HTML.
  """
  texts = {
    'report.json': json.dumps(as_json(measured), indent=1, allow_nan=False),
    'videos.csv': _csv(measured),
    'report.html': page(),
  }
  paths = []
  for name, text in texts.items():
    path = out / name
    partial = out / f'.{name}.part'
    partial.write_text(text.rstrip('\n') + '\n', encoding='utf-8')
    partial.replace(path)
    paths.append(path)
  return paths


def _csv(measured):
  class Lines(list):
    write = list.append

  lines = Lines()
  writer = csv.writer(lines, lineterminator='\n')
  parts = [f'drift_{name}' for name in statistics.DRIFT_WEIGHTS]
  writer.writerow(
    ['folder', 'video', 'frames', 'fps', 'height', 'width', *COLUMNS, *parts]
  )
  for folder in measured:
    for video in folder.videos.values():
      row = video.summary
      writer.writerow(
        [
          *(folder.name, video.name, row.num_frames, video.fps),
          *(video.height, video.width),
          *(f'{getattr(row, name):.6g}' for name in COLUMNS),
          *(f'{row.drift_parts[n]:.6g}' for n in statistics.DRIFT_WEIGHTS),
        ]
      )
  return ''.join(lines)


def _estimates(values: Mapping[str, Estimate]) -> dict[str, Any]:
  return {
    name: {part: _plain(numbers) for part, numbers in value._asdict().items()}
    for name, value in values.items()
  }


def _plain(numbers):
  """Lists of floats; None for NaN, which JSON does not know."""
  if np.ndim(numbers):
    return [_plain(number) for number in numbers]
  return None if np.isnan(numbers) else float(numbers)


def _resample(values, points):
  if len(values) == points:
    return np.asarray(values)
  own, wanted = (
    (np.arange(count) + 0.5) / count for count in (len(values), points)
  )
  return np.interp(wanted, own, values)
