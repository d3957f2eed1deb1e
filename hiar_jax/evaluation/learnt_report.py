"""What learnt judges said of folders of videos: a table, JSON, CSV.

Intervals and differences are those of `report`.
"""

import csv
import io
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from hiar_jax.evaluation import folders, learnt, report
from hiar_jax.runtime import files

_Folder = folders.Folder[learnt.Judged]


def format_table(measured: Sequence[_Folder]) -> str:
  """Lines of text: means by judge and the drift, with intervals below.

  Args:
    measured: one folder or two, with at least a video each; of two, the
      difference over the videos that both have comes last.
  """
  rows = _rows(measured)
  names = [*next(iter(rows.values()))[1]]
  first = max(len('97.5 %'), *map(len, rows))
  width = max(10, *map(len, names))
  lines = ['  '.join((' ' * first, 'videos', *(n.rjust(width) for n in names)))]
  for label, (count, numbers) in rows.items():
    parts = {label.ljust(first): 'mean'}
    if count > 1:
      parts |= {'2.5 %'.rjust(first): 'low', '97.5 %'.rjust(first): 'high'}
    for text, part in parts.items():
      cells = (
        f'{float(getattr(numbers[name], part)):.4g}'.rjust(width)
        for name in names
      )
      shown = str(count) if part == 'mean' else ''
      lines.append('  '.join((text, shown.rjust(6), *cells)))
  return '\n'.join(lines)


def write(
  out: pathlib.Path, measured: Sequence[_Folder], every: int
) -> list[pathlib.Path]:
  """Writes learnt.json and learnt.csv, each in one move.

  Args:
    out: a folder that exists.
    measured: one folder or two.
    every: so many frames one was looked at.
  """
  whole = {
    'every': every,
    'means': {
      label: {'videos': count, **{n: _plain(e) for n, e in numbers.items()}}
      for label, (count, numbers) in _rows(measured).items()
    },
    'folders': [
      {
        'name': folder.name,
        'videos': [video.to_json() for video in folder.videos.values()],
        'failed': folder.failed,
      }
      for folder in measured
    ],
  }
  texts = {
    'learnt.json': json.dumps(whole, indent=1, allow_nan=False) + '\n',
    'learnt.csv': _csv(measured),
  }
  paths = []
  for name, text in texts.items():
    with files.whole_file(out / name) as partial:
      partial.write_text(text, encoding='utf-8')
    paths.append(out / name)
  return paths


def _rows(
  measured: Sequence[_Folder],
) -> dict[str, tuple[int, dict[str, report.Estimate]]]:
  """By label: how many videos, and their numbers."""
  rows = {
    folder.name: (
      len(folder.videos),
      _estimates([_numbers(video) for video in folder.videos.values()]),
    )
    for folder in measured
  }
  if len(measured) == 2:
    first, second = (folder.videos for folder in measured)
    if both := sorted(first.keys() & second.keys()):
      apart = []
      for name in both:
        a, b = _numbers(first[name]), _numbers(second[name])
        apart.append({key: b[key] - a[key] for key in a})
      rows['difference'] = (len(both), _estimates(apart))
  return rows


def _numbers(video: learnt.Judged) -> dict[str, float]:
  return video.means | {'drift': video.drift}


def _estimates(rows):
  return {
    name: report.estimate(np.array([row[name] for row in rows]))
    for name in rows[0]
  }


def _plain(estimate: report.Estimate) -> dict[str, Any]:
  return {
    part: None if np.isnan(number) else float(number)
    for part, number in estimate._asdict().items()
  }


def _csv(measured):
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  names = [*next(iter(measured[0].videos.values())).means]
  parts = [f'drift_{name}' for name in names]
  writer.writerow(['folder', 'video', *names, 'drift', *parts])
  for folder in measured:
    for video in folder.videos.values():
      numbers = [
        *(video.means[name] for name in names),
        video.drift,
        *(video.drift_parts[name] for name in names),
      ]
      writer.writerow(
        [folder.name, video.name, *(f'{number:.6g}' for number in numbers)]
      )
  return text.getvalue()
