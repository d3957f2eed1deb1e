"""Videos with captions, by number; and those of a folder.

A folder holds video files and what is said of them: a file of JSON objects, one
a line, such as {"file": "cats/1.mp4", "caption": "a cat"}, or beside each video
a text file of its name.
"""

import hashlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from hiar_jax.data import clips, prompts

# F frames, H W height and width

CAPTIONS = 'captions.jsonl'
# Of files that are videos; those of a caption file may have any.
SUFFIXES = ('.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm')

# Told apart from other streams of the same seed.
_DROPOUT_STREAM = 1


class Videos(Protocol):
  """A source of captioned videos of one size.

  Attributes:
    captions: caption i is that of video i.
    shape: (F, H, W, 3) of every video.
  """

  captions: prompts.Prompts
  shape: tuple[int, int, int, int]

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> np.ndarray:
    """Video `index`: uint8 [F, H, W, 3].

    Raises:
      ValueError: if its file is broken or too short, naming it.
    """

  def identity(self) -> dict[str, Any]:
    """What these videos are, by content and not by place; JSON."""


def drops_caption(seed: int, index: int, share: float) -> bool:
  """Whether element `index` goes without its caption; by seed and index only.

  Args:
    seed: in [0, 2**64).
    index: in [0, 2**64).
    share: of the elements that do, in [0, 1].
  """
  bits = np.random.Philox(
    key=np.array([seed, index], np.uint64),
    counter=np.array([0, 0, 0, _DROPOUT_STREAM], np.uint64),
  )
  return np.random.Generator(bits).random() < share


class FolderVideos:
  """The start of every video file of a folder; see `Videos`.

  The order is that of the caption file, else of the files' names. Files are
  decoded when they are asked for, and a broken one is found then.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    *,
    num_frames: int,
    height: int,
    width: int,
    fps: float = 16.0,
    captions: str | os.PathLike | None = None,
  ):
    """Finds the files and their captions; opens no video.

    Args:
      path: of the folder.
      num_frames: F.
      height: H in px, see `clips.read`.
      width: W in px.
      fps: frames a second; of Wan2.1 are 16.
      captions: the caption file; None: `captions.jsonl` in the folder if there
        is one, else the text files.

    Raises:
      FileNotFoundError: if there is no such folder or caption file.
      ValueError: if there are no videos, a video has no caption or a caption no
        video, naming it, or a value is out of range.
    """
    self._folder = pathlib.Path(path)
    self._files: prompts.FilePrompts | list[str]
    self.captions: prompts.Prompts
    for name, value in (
      ('num_frames', num_frames),
      ('height', height),
      ('width', width),
    ):
      if value < 1:
        raise ValueError(f'videos.{name}={value} is not at least 1')
    if not fps > 0:
      raise ValueError(f'videos.fps={fps} is not positive')
    self.shape = (num_frames, height, width, 3)
    self._fps = float(fps)
    if not self._folder.is_dir():
      raise FileNotFoundError(f'no videos at {self._folder}: no such folder')
    listed = self._folder / CAPTIONS
    if captions is not None:
      listed = pathlib.Path(captions)
    if captions is not None or listed.is_file():
      self._files = prompts.FilePrompts(listed, field='file', objects=True)
      self.captions = prompts.FilePrompts(listed, field='caption', objects=True)
      self._check_listed(listed)
    else:
      files = _captioned_files(self._folder)
      self._files = files
      self.captions = _TextFiles(self._folder, files)

  def __len__(self) -> int:
    return len(self._files)

  def __repr__(self) -> str:
    return f'FolderVideos({str(self._folder)!r}, {len(self)})'

  def __getitem__(self, index: int) -> np.ndarray:
    num_frames, height, width, _ = self.shape
    return clips.read(
      self.path(index),
      fps=self._fps,
      num_frames=num_frames,
      height=height,
      width=width,
    )

  def path(self, index: int) -> pathlib.Path:
    """The file of video `index`."""
    return self._folder / self._files[index]

  def identity(self) -> dict[str, Any]:
    """By names, sizes and captions: reading all pixels would take days."""
    digest = hashlib.sha256()
    for index in range(len(self)):
      size = self.path(index).stat().st_size
      digest.update(f'{self._files[index]}\n{size}\n'.encode())
    return {
      'source': 'folder',
      'num': len(self),
      'files_sha256': digest.hexdigest(),
      'captions_sha256': self.captions.identity()['sha256'],
      'shape': list(self.shape),
      'fps': self._fps,
    }

  def _check_listed(self, listed):
    absent = [
      name
      for name in map(self._files.__getitem__, range(len(self)))
      if not (self._folder / name).is_file()
    ]
    if absent:
      raise ValueError(
        f'{listed} has captions of {len(absent)} videos that are not in '
        f'{self._folder}, the first is {absent[0]!r}'
      )


class _TextFiles:
  """The captions in text files beside videos; see `prompts.Prompts`."""

  def __init__(self, folder: pathlib.Path, files: Sequence[str]):
    self._folder, self._files = folder, files
    digest = hashlib.sha256()
    for index in range(len(files)):
      told = self[index].encode()
      digest.update(b'%d\n%s' % (len(told), told))
    self._sha256 = digest.hexdigest()

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> str:
    path = (self._folder / self._files[index]).with_suffix('.txt')
    try:
      text = path.read_text(encoding='utf-8-sig').strip()
    except UnicodeDecodeError as error:
      raise ValueError(
        f'{path} is not UTF-8: byte {error.start + 1} is '
        f'0x{error.object[error.start]:02x}'
      ) from None
    if not text:
      raise ValueError(f'the caption {path} is empty')
    return text

  def identity(self) -> dict[str, Any]:
    return {'source': 'texts', 'num': len(self), 'sha256': self._sha256}


def _captioned_files(folder: pathlib.Path) -> list[str]:
  """Names of the videos in a folder and below, each with a text file."""
  videos, texts = set(), set()
  for path in folder.rglob('*'):
    if path.suffix.lower() in SUFFIXES:
      videos.add(path)
    elif path.suffix == '.txt':
      texts.add(path)
  if not videos:
    raise ValueError(
      f'no videos in {folder}: no file ends in one of {", ".join(SUFFIXES)}'
    )
  bare = sorted(v for v in videos if v.with_suffix('.txt') not in texts)
  if bare:
    raise ValueError(
      f'{len(bare)} of {len(videos)} videos in {folder} have no caption, the '
      f'first is {bare[0].relative_to(folder)}: write {bare[0].stem}.txt '
      f'beside it, or {CAPTIONS} for all of them'
    )
  told = {video.with_suffix('.txt') for video in videos}
  if alone := sorted(texts - told):
    raise ValueError(
      f'{len(alone)} captions in {folder} have no video, the first is '
      f'{alone[0].relative_to(folder)}'
    )
  if len(told) < len(videos):
    raise ValueError(
      f'{len(videos)} videos in {folder} share {len(told)} captions: give each '
      'a name of its own'
    )
  return sorted(video.relative_to(folder).as_posix() for video in videos)


def open_videos(
  options: Mapping[str, Any], config: Mapping[str, Any]
) -> FolderVideos:
  """The videos of a folder; the seam of `training.inputs`.

  Args:
    options: as `FolderVideos` takes them.
    config: is not looked at.
  """
  del config
  for name in ('path', 'num_frames', 'height', 'width'):
    if not options.get(name):
      raise ValueError(f'videos.{name} is missing')
  return FolderVideos(**options)
