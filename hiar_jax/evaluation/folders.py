"""Every video of a folder measured, and what of it is kept.

Measuring goes on where it was stopped: what is known of each file lies in a
JSON Lines file, and counts as long as the file's size and time of change and
the way of measuring are the same.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

import numpy as np

from hiar_jax.evaluation import statistics
from hiar_jax.runtime import frame_reader

SUFFIXES = ('.mp4', '.webm', '.mkv', '.mov', '.avi', '.m4v', '.gif')
# Parts of a video that its curves have a point for; fewer where it is short.
POINTS = 20


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
  """What a report needs of one video.

  Attributes:
    name: of the file, in its folder, without the ending.
    path: of the file.
    fps: frames a second.
    height: in px.
    width: in px.
    summary: the row of numbers.
    curves: by the name of a series in `statistics`, its means over equal parts
      of the video; of the colour, the distance to the first part's.
  """

  name: str
  path: pathlib.Path
  fps: float
  height: int
  width: int
  summary: statistics.Summary
  curves: dict[str, list[float]]

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self) | {'path': str(self.path)}

  @classmethod
  def from_json(cls, fields: dict[str, Any]) -> Self:
    summary = statistics.Summary(**fields['summary'])
    path = pathlib.Path(fields['path'])
    return cls(**(fields | {'path': path, 'summary': summary}))


class Kept(Protocol):
  """What is kept of a video."""

  @property
  def name(self) -> str: ...

  @property
  def path(self) -> pathlib.Path: ...

  def to_json(self) -> dict[str, Any]: ...


Video = TypeVar('Video', bound=Kept)


@dataclasses.dataclass(frozen=True, eq=False)
class Folder(Generic[Video]):
  """The videos of one folder.

  Attributes:
    name: that a report gives it.
    videos: measured, by name in alphabetical order.
    failed: what is wrong with a file, one line each, by the file's name.
  """

  name: str
  videos: dict[str, Video]
  failed: dict[str, str]


def find(folder: str | os.PathLike) -> list[pathlib.Path]:
  """The videos in a folder, by their endings, in alphabetical order.

  Raises:
    FileNotFoundError: if there is no such folder.
    ValueError: if it has no video, or two whose names differ in the ending
      alone.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise FileNotFoundError(f'no folder of videos at {folder}')
  paths = sorted(
    path
    for path in folder.iterdir()
    if path.suffix.lower() in SUFFIXES and path.is_file()
  )
  if not paths:
    raise ValueError(f'{folder} has no file that ends in {", ".join(SUFFIXES)}')
  seen: dict[Any, Any] = {}
  for path in paths:
    if path.stem in seen:
      raise ValueError(
        f'{seen[path.stem]} and {path.name} in {folder} have one name'
      )
    seen[path.stem] = path.name
  return paths


def measure_file(
  path: str | os.PathLike, progress: Callable[[], None] = lambda: None
) -> Measured:
  """Measures one video.

  Args:
    path: of the file.
    progress: called after every frame.

  Raises:
    ValueError: if it cannot be read to its end, or is too short or too small;
      one line that names it.
    FileNotFoundError: if there is none.
  """
  path = pathlib.Path(path)
  with frame_reader.FrameReader(path) as reader:
    try:
      measured = statistics.measure(_told(reader, progress))
    except ValueError as error:
      message = str(error)
      if str(path) not in message:
        message = f'{path}: {message}'
      raise ValueError(message) from None
  parts = measured.by_segment(min(POINTS, measured.num_frames - 1))
  start = parts['colour'][:1]
  parts['colour'] = np.linalg.norm(parts['colour'] - start, axis=1)
  return Measured(
    name=path.stem,
    path=path,
    fps=reader.fps,
    height=measured.height,
    width=measured.width,
    summary=statistics.summarise(measured),
    curves={name: values.tolist() for name, values in parts.items()},
  )


def measure(
  paths: Sequence[pathlib.Path],
  name: str,
  known: 'Known[Video]',
  progress: Callable[[], None] = lambda: None,
  after_file: Callable[[str], None] = lambda line: None,
) -> 'Folder[Video]':
  """Measures the videos that are not known yet.

  Args:
    paths: of the files, see `find`.
    name: of the folder.
    known: what was measured before; told of what is new.
    progress: called after every frame.
    after_file: called after every file with what is wrong with it, or ''.
  """
  videos, failed = {}, {}
  for path in paths:
    line = ''
    video = known.get(path)
    if video is None:
      # A file that changes while it is read is measured again.
      mark = _mark(path)
      try:
        video = known.way.measure(path, progress)
      except (ValueError, OSError) as error:
        line = failed[path.name] = ' '.join(str(error).split())
      else:
        known.add(video, mark)
    if video is not None:
      videos[video.name] = video
    after_file(line)
  return Folder(name, videos, failed)


class Way(NamedTuple, Generic[Video]):
  """A way of measuring.

  version: raised when numbers change their meaning: what was kept then counts
    no more.
  measure: a file; called with its path and what to call after every frame.
  read: makes a video of what its `to_json` gave.
  """

  version: int | str
  measure: Callable[[pathlib.Path, Callable[[], None]], Video]
  read: Callable[[dict[str, Any]], Video]


# What every pixel says, see `statistics`.
PIXELS = Way(1, measure_file, Measured.from_json)


class Known(Generic[Video]):
  """Measured videos in a JSON Lines file.

  Attributes:
    way: that they are measured in.
  """

  def __init__(self, path: str | os.PathLike, way: Way[Video]):
    """Reads what is there; a last line that was cut, and a line of another
    version, are passed over."""
    self.way = way
    self._path = pathlib.Path(path)
    self._lines = {}
    self._ends = True
    if self._path.is_file():
      text = self._path.read_text(encoding='utf-8')
      self._ends = text.endswith('\n') or not text
      for line in text.splitlines():
        try:
          entry = json.loads(line)
        except json.JSONDecodeError:
          continue
        if entry['version'] == way.version:
          self._lines[entry['file']] = entry

  def get(self, path: pathlib.Path) -> Video | None:
    """What is known of a file that has not changed."""
    entry = self._lines.get(_file(path))
    if entry is None or entry['mark'] != _mark(path):
      return None
    return self.way.read(entry['video'] | {'path': path})

  def add(self, video: Video, mark: list[int]) -> None:
    """Notes a video; the next process knows it."""
    entry = {
      'version': self.way.version,
      'file': _file(video.path),
      'mark': mark,
      'video': video.to_json(),
    }
    self._lines[entry['file']] = entry
    start = '' if self._ends else '\n'
    with self._path.open('a', encoding='utf-8') as file:
      file.write(start + json.dumps(entry) + '\n')
    self._ends = True


def _file(path: pathlib.Path) -> str:
  return str(path.resolve())


def _mark(path: pathlib.Path) -> list[int]:
  status = path.stat()
  return [status.st_size, status.st_mtime_ns]


def _told(
  frames: Iterable[np.ndarray], progress: Callable[[], Any]
) -> Iterator[np.ndarray]:
  for frame in frames:
    yield frame
    progress()
