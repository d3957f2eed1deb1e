"""The report on a study as one HTML page that needs no other file."""

import base64
import html
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hiar_jax.evaluation import charts, page, report, study


def write(
  path: pathlib.Path,
  *,
  title: str,
  measured: study.Measured,
  says: Mapping[str, str],
  kinds: Mapping[str, study.Kind],
  columns: Sequence[study.Column],
  curves: Mapping[str, str],
  groups: Sequence[Sequence[str]],
  against: str,
  paper: Mapping[str, Mapping[str, float]],
  losses: Mapping[str, Mapping[str, Sequence[float]]],
  pictures: Mapping[str, pathlib.Path],
  missing: Sequence[str],
) -> None:
  """Writes the page.

  Args:
    path: of the file.
    title: above it.
    measured: all that there is.
    says: what an arm is, in the order of the tables.
    kinds: of videos, by what the page calls them.
    columns: of the tables.
    curves: name -> title of a chart.
    groups: arms in one chart, at most four.
    against: the arm that others are compared with.
    paper: an arm's numbers in the paper, by name.
    losses: of an arm's training, at equal shares of it, by name.
    pictures: PNG files of frames, by title.
    missing: what was asked for and is not there yet.
  """
  parts = [f'<h1>{html.escape(title)}</h1>']
  if missing:
    parts.append(
      f'<div class="failed"><p>Not there yet: {len(missing)} of the runs</p>'
      f'<small>{html.escape(", ".join(missing))}</small></div>'
    )
  parts.append(_arms(says, paper))
  for name, kind in kinds.items():
    arms = [arm for arm in says if measured.seeds(arm, kind)]
    if not arms:
      continue
    parts.append(f'<h2>{html.escape(name)}</h2>')
    parts.append(_table(measured, arms, kind, columns, against))
    for group in groups:
      shown = [arm for arm in group if arm in arms]
      # One arm alone compares nothing, and its pairs are in other groups.
      if len(shown) > 1:
        parts.append(f'<p>{charts.legend(shown)} mean, 95 % band</p>')
        parts.append(_charts(measured, shown, kind, curves))
  if losses:
    parts.append('<h2>Losses over the training</h2>')
    parts.append(_losses(losses))
  for name, picture in pictures.items():
    data = base64.b64encode(picture.read_bytes()).decode()
    parts.append(
      f'<h2>{html.escape(name)}</h2>'
      f'<img style="width:100%" src="data:image/png;base64,{data}" alt="">'
    )
  meanings = ''.join(
    f'<dt>{html.escape(c.heading)}</dt><dd>{html.escape(c.meaning)}</dd>'
    for c in columns
  )
  parts.append(f'<h2>What the numbers are</h2><dl>{meanings}</dl>')
  text = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    f'<title>{html.escape(title)}</title><style>{page.STYLE}</style></head>'
    f'<body>{"".join(parts)}</body></html>\n'
  )
  path.write_text(text, encoding='utf-8')


def _arms(says, paper):
  names = sorted({name for numbers in paper.values() for name in numbers})
  rows = ''
  for arm, meaning in says.items():
    numbers = paper.get(arm, {})
    cells = ''.join(
      f'<td>{numbers[n]:.3f}</td>' if n in numbers else '<td></td>'
      for n in names
    )
    rows += f'<tr><th>{html.escape(arm)}</th>{cells}' + (
      f'<td style="text-align:left">{html.escape(meaning)}</td></tr>'
    )
  return page.table(('arm', *(f"paper's {n}" for n in names), ''), rows)


def _table(measured, arms, kind, columns, against):
  rows = ''
  for arm in arms:
    means = study.estimates(measured, arm, kind, columns)
    apart = study.differences(measured, arm, against, kind, columns)
    cells = ''
    for column in columns:
      if column.key not in means:
        cells += '<td></td>'
        continue
      mean, low, high = (
        f'{float(v):{column.style}}' for v in means[column.key]
      )
      differs = arm != against and study.sign(apart.get(column.key, _NONE))
      tag = 'b' if differs else 'span'
      cells += f'<td><{tag}>{mean}</{tag}><small>{low} … {high}</small></td>'
    seeds = ' '.join(map(str, measured.seeds(arm, kind)))
    rows += f'<tr><th>{html.escape(arm)}</th><td>{seeds}</td>{cells}</tr>'
  headings = [
    f'<span title="{html.escape(c.meaning)}">{html.escape(c.heading)}</span>'
    for c in columns
  ]
  return page.table(('arm', 'seeds', *headings), rows) + (
    f'<p>Below a mean its 95 % interval over scenes. Bold: apart from '
    f'{html.escape(against)}, scene by scene in the seeds of both, by an '
    'interval without 0.</p>'
  )


_NONE = report.Estimate(*[np.array(np.nan)] * 3)


def picture(
  measured: study.Measured,
  kind: study.Kind,
  arms: Sequence[str],
  curves: Mapping[str, str],
  says: Mapping[str, str],
) -> str:
  """Curves of one kind of videos as an SVG file; '' if an arm has none.

  Args:
    measured: all that there is.
    kind: of videos.
    arms: at most four.
    curves: name -> title of a chart.
    says: what an arm is called in the legend.
  """
  drawn = _drawn(measured, arms, kind, curves)
  if not drawn:
    return ''
  return charts.picture(drawn, [says[arm] for arm in arms], columns=2)


def _charts(measured, arms, kind, curves):
  drawn = _drawn(measured, arms, kind, curves)
  return f'<div class="charts">{"".join(drawn)}</div>'


def _drawn(measured, arms, kind, curves):
  drawn = []
  for name, title in curves.items():
    found = {arm: measured.curve(arm, kind, name) for arm in arms}
    lines = [
      charts.Curve(arm, *(part.tolist() for part in curve))
      for arm, curve in found.items()
      if curve is not None
    ]
    # A missing arm would shift the colours of those after it.
    if len(lines) == len(arms):
      drawn.append(charts.chart(title, lines))
  return drawn


def _losses(losses):
  drawn = [
    charts.chart(
      f'{arm}: {name}', [charts.Curve(name, values, *_no_band(values))]
    )
    for arm, by_name in losses.items()
    for name, values in by_name.items()
    if len(values)
  ]
  return f'<div class="charts">{"".join(drawn)}</div>'


def _no_band(values):
  nothing = [float('nan')] * len(values)
  return nothing, nothing


def losses_of(path: pathlib.Path, names: Sequence[str]) -> dict[str, Any]:
  """Losses in a run's metrics.jsonl, by name, in the order of the lines."""
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  return {
    name: [row[name] for row in rows if row.get(name) is not None]
    for name in names
  }
