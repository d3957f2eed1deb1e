"""The report on folders of videos as one HTML page that needs no other file."""

import base64
import html
import os
import pathlib
from collections.abc import Sequence

from hiar_jax.evaluation import charts, folders, report, statistics

# What browsers play; others are linked.
_TYPES = {
  '.mp4': 'video/mp4',
  '.m4v': 'video/mp4',
  '.webm': 'video/webm',
  '.gif': 'image/gif',
}
_CURVES = {
  'motion': 'motion, % of a side a frame',
  'sharpness': 'sharpness',
  'contrast': 'contrast',
  'saturation': 'saturation',
  'colour': 'distance to the first colour',
  'similarity': 'similarity of frames in a row',
  'difference': 'difference of frames in a row',
}


def page(
  measured: Sequence[folders.Folder], *, beside: pathlib.Path, embed_mb: float
) -> str:
  """The page.

  Args:
    measured: one folder or two, with at least a video each.
    beside: folder that the page will lie in, for links to videos.
    embed_mb: videos are put into the page if all together are not larger, in
      MB; else they are linked, and the page needs them beside it.
  """
  paths = [v.path for folder in measured for v in folder.videos.values()]
  embed = sum(path.stat().st_size for path in paths) <= embed_mb * 1e6
  title = ' and '.join(folder.name for folder in measured)
  names = [folder.name for folder in measured]
  sections = [
    f'<h1>{html.escape(title)}</h1>',
    _failures(measured),
    '<h2>Means over videos</h2>',
    _summary(measured),
    f'<h2>Over the length of the video</h2><p>{charts.legend(names)} '
    'mean over videos, 95 % band</p>',
    _charts(measured),
    '<h2>Videos</h2><p><button onclick="for (const v of document.'
    "querySelectorAll('video')) { v.currentTime = 0; v.play() }\">play all"
    '</button></p>',
    _videos(measured, beside, embed),
    '<h2>Each video</h2>',
    _each(measured),
    '<h2>What the numbers are</h2>',
    _meaning(),
  ]
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width">'
    f'<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>'
    + '\n'.join(sections)
    + '</body></html>'
  )


def _failures(measured):
  lines = [
    f'<li>{html.escape(line)}</li>'
    for folder in measured
    for line in folder.failed.values()
  ]
  if not lines:
    return ''
  return (
    f'<div class="failed"><p>Not measured: {len(lines)}</p>'
    f'<ul>{"".join(lines)}</ul></div>'
  )


def _summary(measured):
  rows = [
    (folder.name, len(folder.videos), report.columns(folder))
    for folder in measured
  ]
  note = ''
  if len(measured) == 2:
    comparison = report.try_compare(*measured)
    if comparison:
      label = f'{measured[1].name} - {measured[0].name}'
      rows.append((label, len(comparison.names), comparison.columns))
      note = (
        '<p>The last row is over the videos that both have, by name; an '
        'interval that does not hold 0 is in bold.</p>'
      )
    else:
      note = '<p>No video of one folder has the name of one of the other.</p>'
  body = ''
  for index, (label, count, numbers) in enumerate(rows):
    cells = ''
    for name, column in report.COLUMNS.items():
      value = numbers[name]
      mean, low, high = (f'{float(v):{column.style}}' for v in value)
      interval = f'{low} … {high}' if count > 1 else ''
      strict = index == 2 and (value.low > 0 or value.high < 0)
      tag = 'b' if strict else 'span'
      cells += f'<td><{tag}>{mean}</{tag}><small>{interval}</small></td>'
    body += f'<tr><th>{html.escape(label)}</th><td>{count}</td>{cells}</tr>'
  return table(('', 'videos', *_headings()), body) + note


def _charts(measured):
  curves = {folder.name: report.curves(folder) for folder in measured}
  return (
    '<div class="charts">'
    + ''.join(
      charts.chart(
        title,
        [
          charts.Curve(
            folder.name,
            *(part.tolist() for part in curves[folder.name][series]),
          )
          for folder in measured
        ],
      )
      for series, title in _CURVES.items()
    )
    + '</div>'
  )


def _videos(measured, beside, embed):
  names = sorted({name for folder in measured for name in folder.videos})
  rows = ''
  for name in names:
    cells = ''
    for folder in measured:
      video = folder.videos.get(name)
      if video is None:
        cells += '<td class="none">none</td>'
        continue
      row = video.summary
      cells += (
        f'<td>{_player(video.path, beside, embed)}<small>motion '
        f'{row.motion:.2f} · sharp {row.sharpness:.1f} · contrast '
        f'{row.contrast:.3f} · drift {row.drift:.3f}</small></td>'
      )
    rows += f'<tr><th>{html.escape(name)}</th>{cells}</tr>'
  return table(('', *(html.escape(f.name) for f in measured)), rows, 'videos')


def _player(path, beside, embed):
  kind = _TYPES.get(path.suffix.lower())
  # A page may be read on Windows as well.
  source = pathlib.PurePath(os.path.relpath(path, beside)).as_posix()
  source = html.escape(source, quote=True)
  if kind is None:
    return f'<a href="{source}">{html.escape(path.name)}</a>'
  if embed:
    data = base64.b64encode(path.read_bytes()).decode()
    source = f'data:{kind};base64,{data}'
  if kind.startswith('image'):
    return f'<img src="{source}" alt="">'
  return (
    f'<video src="{source}" controls loop muted playsinline '
    'preload="metadata"></video>'
  )


def _each(measured):
  rows = ''.join(
    f'<tr><th>{html.escape(video.name)}</th><td>{html.escape(folder.name)}'
    f'</td><td>{video.summary.num_frames}</td>'
    + ''.join(
      f'<td>{getattr(video.summary, name):{column.style}}</td>'
      for name, column in report.COLUMNS.items()
    )
    + '</tr>'
    for folder in measured
    for video in folder.videos.values()
  )
  return table(('', 'folder', 'frames', *_headings()), rows)


def _headings():
  return [
    f'<span title="{html.escape(c.meaning)}">{html.escape(c.heading)}</span>'
    for c in report.COLUMNS.values()
  ]


def table(headings: Sequence[str], body: str, kind: str = '') -> str:
  """Rows of HTML under headings, which scroll where they are too wide."""
  head = ''.join(f'<th>{heading}</th>' for heading in headings)
  return (
    f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead>'
    f'<tbody>{body}</tbody></table></div>'
  )


def _meaning():
  items = ''.join(
    f'<dt>{html.escape(c.heading)}</dt><dd>{html.escape(c.meaning)}</dd>'
    for c in report.COLUMNS.values()
  )
  floors = ', '.join(f'{n} {v:g}' for n, v in statistics.DRIFT_FLOORS.items())
  scales = ', '.join(f'{n} {v:g}' for n, v in statistics.DRIFT_SCALES.items())
  return (
    f'<dl>{items}</dl><p>Drift: in each of {statistics.SEGMENTS} equal '
    'segments six numbers; the rise of a straight line through the five, '
    'divided by the mean over the video but by no less than a floor '
    f'({floors}), or by a fixed scale ({scales}); the six summed with weights '
    f'of 1/{len(statistics.DRIFT_WEIGHTS)}. It has the shape of the score in '
    'the HiAR paper, whose weights were not published: the numbers do not '
    'compare. A frozen video does not drift: read it beside motion, sharpness '
    'and contrast.</p>'
  )


# Of every page of this room.
STYLE = (
  charts.STYLE
  + """
body { font: 15px/1.45 system-ui, 'DejaVu Sans', sans-serif; color: #222;
  max-width: 1320px; margin: 1.5em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 1.8em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25em .6em; text-align: right; border-bottom: 1px solid #ddd;
  vertical-align: top } tbody th { text-align: left; font-weight: 600 }
td small { display: block; color: #666; font-size: .78em; white-space: nowrap }
.wide { overflow-x: auto } .videos td, .videos thead th { text-align: left }
tbody th { min-width: 6em; max-width: 16em; overflow-wrap: anywhere }
video, img { display: block; width: 380px; max-width: 100%;
  image-rendering: pixelated; background: #eee }
.none { color: #999 } .failed { background: #fff0e6; padding: .3em 1em }
.charts { display: flex; flex-wrap: wrap; gap: 1em }
.key { margin-right: 1.2em } .key i { display: inline-block; width: 1.4em;
  height: .45em; margin-right: .4em; vertical-align: middle }
dt { font-weight: 600; float: left; clear: left; width: 7em }
dd { margin-left: 7.5em }
"""
)
