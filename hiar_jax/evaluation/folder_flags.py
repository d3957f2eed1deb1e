"""Flags that name folders of videos, and what measures all of them."""

import pathlib
import sys

import tqdm
from absl import flags

from hiar_jax.evaluation import folders


class FolderFlags:
  """--folder, --against, --names and --out of a program on foreign videos."""

  def __init__(self):
    self._folder = flags.DEFINE_string('folder', None, 'videos', required=True)
    self._against = flags.DEFINE_string(
      'against', None, 'a second folder of videos'
    )
    self._names = flags.DEFINE_list(
      'names', [], 'of the folders in the report; default: their own'
    )
    self._out = flags.DEFINE_string(
      'out', None, 'folder of the report; made if needed', required=True
    )

  @property
  def out(self) -> pathlib.Path:
    return pathlib.Path(self._out.value)

  def measure(
    self, way: folders.Way[folders.Video], notes: str
  ) -> list[folders.Folder[folders.Video]]:
    """One folder or two, with a bar, going on where it was stopped.

    Args:
      way: of measuring.
      notes: name of the file in --out that has what is measured already.

    Raises:
      ValueError: if names do not suit the folders, or no video of a folder can
        be read.
      FileNotFoundError: if there is no such folder.
    """
    given = [p for p in (self._folder.value, self._against.value) if p]
    paths = [folders.find(folder) for folder in given]
    names = self._names.value or _short_names(given)
    if len(names) != len(given) or len(set(names)) != len(names):
      raise ValueError(
        f'--names={",".join(names)} must be {len(given)} different names, one '
        'for each folder'
      )
    self.out.mkdir(parents=True, exist_ok=True)
    known = folders.Known(self.out / notes, way)
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
          raise ValueError(
            f'none of the {len(files)} videos of {name} was read'
          )
        measured.append(folder)
    return measured


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
