"""Curves with bands as SVG, which a page carries in itself."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

# Told apart by people who see red and green alike, and on paper.
COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7')
_WIDTH, _HEIGHT = 340, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 18, 26, 24
_LEGEND = 16  # Px of a line of it.
# Of what is in a chart; a page needs it too.
STYLE = """
svg .grid { stroke: #e4e4e4 } svg text { font-size: 10px; fill: #555 }
svg .title { font-size: 12px; fill: #222; font-weight: 600 }
svg .end { text-anchor: end } svg .middle { text-anchor: middle }
"""


class Curve(NamedTuple):
  """A line over a share of the video, with what is known of it.

  name: in the legend.
  middle: values at the middles of equal parts.
  low: of the band, as many; NaN where there is none.
  high: likewise.
  """

  name: str
  middle: Sequence[float]
  low: Sequence[float]
  high: Sequence[float]


def chart(title: str, curves: Sequence[Curve]) -> str:
  """One chart; x is the share of the video in %.

  Args:
    title: above it.
    curves: at most as many as COLOURS; each has at least one value.
  """
  values = [v for c in curves for v in (*c.middle, *c.low, *c.high)]
  ticks = _ticks([v for v in values if math.isfinite(v)])
  bottom, top = ticks[0], ticks[-1]

  def place(share, value):
    x = _LEFT + share * (_WIDTH - _LEFT - _RIGHT)
    height = _HEIGHT - _TOP - _BOTTOM
    y = _TOP + height * (1 - (value - bottom) / (top - bottom))
    return f'{x:.1f},{y:.1f}'

  parts = [
    f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" '
    f'aria-label="{html.escape(title)}">',
    f'<text x="{_LEFT}" y="15" class="title">{html.escape(title)}</text>',
  ]
  for tick in ticks:
    start, end = place(0, tick), place(1, tick)
    parts.append(_line(start, end, 'grid'))
    y = float(start.split(',')[1]) + 3.5
    parts.append(
      f'<text x="{_LEFT - 5}" y="{y:.1f}" class="tick end">'
      f'{_number(tick, ticks[1] - ticks[0])}</text>'
    )
  for share in (0, 0.2, 0.4, 0.6, 0.8, 1):
    x = place(share, bottom).split(',')[0]
    parts.append(
      f'<text x="{x}" y="{_HEIGHT - 7}" class="tick middle">{share:.0%}</text>'
    )
  for curve, colour in zip(curves, COLOURS):
    count = len(curve.middle)
    shares = [(i + 0.5) / count for i in range(count)]
    if all(map(math.isfinite, (*curve.low, *curve.high))):
      outline = [
        *map(place, shares, curve.high),
        *reversed([*map(place, shares, curve.low)]),
      ]
      parts.append(
        f'<polygon points="{" ".join(outline)}" fill="{colour}" '
        'fill-opacity="0.18"/>'
      )
    points = ' '.join(map(place, shares, curve.middle))
    parts.append(
      f'<polyline points="{points}" fill="none" stroke="{colour}" '
      'stroke-width="1.8"/>'
    )
  parts.append('</svg>')
  return ''.join(parts)


def legend(names: Sequence[str]) -> str:
  """The colours of all charts of a page, as HTML."""
  return ''.join(
    f'<span class="key"><i style="background:{colour}"></i>'
    f'{html.escape(name)}</span>'
    for name, colour in zip(names, COLOURS)
  )


def picture(drawn: Sequence[str], names: Sequence[str], columns: int) -> str:
  """Charts with their legend as one SVG file, for where a page cannot be.

  Args:
    drawn: what `chart` made.
    names: of the curves, in the order of the charts.
    columns: charts beside each other.
  """
  rows = math.ceil(len(drawn) / columns)
  top = _LEGEND * len(names) + 8
  width, height = columns * _WIDTH, rows * _HEIGHT + top
  parts = [
    '<svg xmlns="http://www.w3.org/2000/svg" '
    f'viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
    'font-family="system-ui, DejaVu Sans, sans-serif">',
    f'<style>{STYLE}</style>',
    f'<rect width="{width}" height="{height}" fill="#fff"/>',
  ]
  for index, (name, colour) in enumerate(zip(names, COLOURS)):
    y = 8 + index * _LEGEND
    parts.append(
      f'<rect x="{_LEFT}" y="{y}" width="20" height="6" fill="{colour}"/>'
      f'<text x="{_LEFT + 28}" y="{y + 7}">{html.escape(name)}</text>'
    )
  for index, svg in enumerate(drawn):
    row, column = divmod(index, columns)
    place = (
      f'<svg x="{column * _WIDTH}" y="{top + row * _HEIGHT}" '
      f'height="{_HEIGHT}" '
    )
    parts.append(svg.replace('<svg ', place, 1))
  return ''.join([*parts, '</svg>\n'])


def _line(start, end, kind):
  (x1, y1), (x2, y2) = start.split(','), end.split(',')
  return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" class="{kind}"/>'


def _ticks(values: Sequence[float]) -> list[float]:
  """Three to six round numbers that enclose the values."""
  low, high = min(values), max(values)
  # What does not change is drawn in the middle, not as noise of its last digit.
  least = max(abs(low), abs(high), 1e-3) * 0.02
  if high - low < least:
    low, high = low - least / 2, high + least / 2
  rough = (high - low) / 4
  unit = 10.0 ** math.floor(math.log10(rough))
  step = next(unit * n for n in (1, 2, 2.5, 5, 10) if unit * n >= rough)
  first, last = math.floor(low / step), math.ceil(high / step)
  return [n * step for n in range(first, last + 1)]


def _number(value, step):
  digits = max(0, -math.floor(math.log10(step) + 1e-9))
  # A step of 2.5 has a digit more than one of 2.
  if round(step * 10**digits, 6) % 1:
    digits += 1
  return f'{value:.{digits}f}'
