"""Measures anyone's videos, without a judge, in one folder or in two.

  hiar-jax evaluate videos --folder=ours --out=report
  hiar-jax evaluate videos --folder=theirs --against=ours --out=report

Writes report.html (one file, for a browser), report.json and videos.csv into
--out. Two folders are compared video by video, by the names of the files, such
as `a red disc-0.mp4`: --folder is shown first, and the difference is --against
minus --folder. A file that cannot be measured is named and left out. Kill it
and start it again: it goes on with the files that are missing.
"""

import pathlib
import sys

import tqdm
from absl import flags

from hiar_jax.evaluation import folders, page, report
from hiar_jax.runtime import errors

_FOLDER = flags.DEFINE_string('folder', None, 'videos', required=True)
_AGAINST = flags.DEFINE_string('against', None, 'a second folder of videos')
_NAMES = flags.DEFINE_list(
  'names', [], 'of the folders in the report; default: their own'
)
_OUT = flags.DEFINE_string(
  'out', None, 'folder of the report; made if needed', required=True
)
_EMBED = flags.DEFINE_float(
  'embed_mb',
  20.0,
  'videos lie in report.html if they have no more MB together, else beside it',
  lower_bound=0,
)


def main(argv):
  del argv
  given = [p for p in (_FOLDER.value, _AGAINST.value) if p is not None]
  paths = [folders.find(folder) for folder in given]
  names = _NAMES.value or _short_names(given)
  if len(names) != len(given) or len(set(names)) != len(names):
    raise ValueError(
      f'--names={",".join(names)} must be {len(given)} different names, one '
      'for each folder'
    )
  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  known = folders.Known(out / 'measured.jsonl')
  measured = []
  with tqdm.tqdm(
    total=sum(map(len, paths)), unit='video', dynamic_ncols=True
  ) as bar:

    def after_file(line):
      if line:
        tqdm.tqdm.write(f'not measured: {line}', file=sys.stderr)
      bar.update()

    for name, files in zip(names, paths, strict=True):
      folder = folders.measure(
        files, name, known, progress=_frames_of(bar), after_file=after_file
      )
      if not folder.videos:
        raise ValueError(f'none of the {len(files)} videos of {name} was read')
      measured.append(folder)
  print(report.format_table(measured))
  for path in report.write(
    out,
    measured,
    lambda: page.page(measured, beside=out, embed_mb=_EMBED.value),
  ):
    print(f'wrote {path}')


def _frames_of(bar):
  """Shows how many frames were measured, now and then."""
  count = 0

  def progress():
    nonlocal count
    count += 1
    if count % 50 == 0:
      bar.set_postfix_str(f'{count} frames')

  return progress


def _short_names(given):
  """The last part of each path, or the paths where those are one."""
  names = [pathlib.Path(folder).resolve().name for folder in given]
  return names if len(set(names)) == len(names) else given


if __name__ == '__main__':
  errors.run_main(main)
