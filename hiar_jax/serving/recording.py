"""What a session was shown, on disk, until somebody downloads it.

Pieces as they were made, in files without a name: they are gone with the
process, however it ends. Of a session without end the last frames are kept.
"""

import collections
import io
import pathlib
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import IO, NamedTuple

import numpy as np

from hiar_jax.runtime import video_io
from hiar_jax.serving.pieces import Decode, Piece

_SEGMENT_FRAMES = 1800
_SEGMENTS = 8  # of the bytes that are kept
_BLOCK_FRAMES = 32  # that are decoded at a time.


class _Size(NamedTuple):
  """Of a piece."""

  bytes: int
  frames: int


class Recording:
  """Frames of one size, appended by one thread and read by others."""

  def __init__(self, max_frames: int, max_bytes: int):
    """Begins empty.

    Args:
      max_frames: of which no more than a segment too many is kept.
      max_bytes: likewise.
    """
    self._max_frames, self._max_bytes = max_frames, max_bytes
    self._lock = threading.Lock()
    self._segments: collections.deque[tuple[IO[bytes], list[_Size]]] = (
      collections.deque()
    )
    self._closed = False

  def __len__(self) -> int:
    """Frames that are kept."""
    return sum(_frames(sizes) for _, sizes in self._segments)

  def append(self, pieces: Sequence[Piece]) -> None:
    """Adds what is encoded; after `close` nothing."""
    with self._lock:
      if self._closed:
        return
      if not self._segments or self._is_full(self._segments[-1][1]):
        self._segments.append((tempfile.TemporaryFile(), []))
      file, sizes = self._segments[-1]
      file.write(b''.join(piece.data for piece in pieces))
      sizes += [_Size(len(piece.data), piece.frames) for piece in pieces]
      while len(self._segments) > 1 and self._can_spare(self._segments[0][1]):
        self._segments.popleft()[0].close()

  def _is_full(self, sizes: list[_Size]) -> bool:
    most = self._max_bytes // _SEGMENTS
    return _frames(sizes) >= _SEGMENT_FRAMES or _bytes(sizes) >= most

  def _can_spare(self, oldest: list[_Size]) -> bool:
    bytes_kept = sum(_bytes(sizes) for _, sizes in self._segments)
    return (
      len(self) - _frames(oldest) >= self._max_frames
      or bytes_kept - _bytes(oldest) >= self._max_bytes
    )

  def pieces(self) -> Iterator[bytes]:
    """Those that were there when asked for first, from the oldest on.

    What is dropped meanwhile is left out.
    """
    with self._lock:
      parts = [(file, tuple(sizes)) for file, sizes in self._segments]
    for file, sizes in parts:
      with self._lock:
        if file.closed:
          continue
        file.seek(0)
        data = file.read(_bytes(sizes))
        file.seek(0, io.SEEK_END)
      start = 0
      for size in sizes:
        yield data[start : start + size.bytes]
        start += size.bytes

  def write_mp4(
    self, path: pathlib.Path, decode: Decode, *, fps: float, scale: int
  ) -> None:
    """Writes what is kept as a video; errors as `video_io.VideoWriter`.

    Args:
      path: of the video.
      decode: of a piece's data.
      fps: frames a second.
      scale: whole factor of enlargement.
    """
    with video_io.VideoWriter(path, fps=fps, scale=scale) as writer:
      frames: list[np.ndarray] = []
      for data in self.pieces():
        frames.append(decode(data))
        if sum(map(len, frames)) >= _BLOCK_FRAMES:
          writer.append(np.concatenate(frames))
          frames.clear()
      if frames:
        writer.append(np.concatenate(frames))

  def close(self) -> None:
    """Lets go of everything."""
    with self._lock:
      self._closed = True
      while self._segments:
        self._segments.popleft()[0].close()


def _frames(sizes: Sequence[_Size]) -> int:
  return sum(size.frames for size in sizes)


def _bytes(sizes: Sequence[_Size]) -> int:
  return sum(size.bytes for size in sizes)
