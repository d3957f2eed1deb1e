"""Measures anyone's videos, without a judge, in one folder or in two.

  hiar-jax evaluate videos --folder=ours --out=report
  hiar-jax evaluate videos --folder=theirs --against=ours --out=report

Writes report.html (one file, for a browser), report.json and videos.csv into
--out. Two folders are compared video by video, by the names of the files, such
as `a red disc-0.mp4`: --folder is shown first, and the difference is --against
minus --folder. A file that cannot be measured is named and left out. Kill it
and start it again: it goes on with the files that are missing.
"""

from absl import flags

from hiar_jax.evaluation import folder_flags, folders, page, report
from hiar_jax.runtime import errors

_FOLDERS = folder_flags.FolderFlags()
_EMBED = flags.DEFINE_float(
  'embed_mb',
  20.0,
  'videos lie in report.html if they have no more MB together, else beside it',
  lower_bound=0,
)


def main(argv):
  del argv
  measured = _FOLDERS.measure(folders.PIXELS, 'measured.jsonl')
  out = _FOLDERS.out
  print(report.format_table(measured))
  for path in report.write(
    out,
    measured,
    lambda: page.page(measured, beside=out, embed_mb=_EMBED.value),
  ):
    print(f'wrote {path}')


if __name__ == '__main__':
  errors.run_main(main)
