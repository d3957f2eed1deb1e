"""What a session was shown, on disk, until somebody downloads it.

Pictures as they were sent, in files without a name: they are gone with the
process, however it ends. Of a session without end the last frames are kept.
"""

import collections
import io
import pathlib
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np
from PIL import Image

from hiar_jax.runtime import video_io

_SEGMENT_FRAMES = 1800
_SEGMENTS = 8  # of the bytes that are kept
_BLOCK_FRAMES = 32  # that are decoded at a time.


class Recording:
  """Pictures of one size, appended by one thread and read by others."""

  def __init__(self, max_frames: int, max_bytes: int):
    """Begins empty.

    Args:
      max_frames: of which no more than a segment too many is kept.
      max_bytes: likewise.
    """
    self._max_frames, self._max_bytes = max_frames, max_bytes
    self._lock = threading.Lock()
    self._segments: collections.deque[tuple[IO[bytes], list[int]]] = (
      collections.deque()
    )
    self._closed = False

  def __len__(self) -> int:
    """Frames that are kept."""
    return sum(len(sizes) for _, sizes in self._segments)

  def append(self, pictures: Sequence[bytes]) -> None:
    """Adds encoded pictures; after `close` nothing."""
    with self._lock:
      if self._closed:
        return
      if not self._segments or self._is_full(self._segments[-1][1]):
        self._segments.append((tempfile.TemporaryFile(), []))
      file, sizes = self._segments[-1]
      file.write(b''.join(pictures))
      sizes += map(len, pictures)
      while len(self._segments) > 1 and self._can_spare(self._segments[0][1]):
        self._segments.popleft()[0].close()

  def _is_full(self, sizes: list[int]) -> bool:
    most = self._max_bytes // _SEGMENTS
    return len(sizes) >= _SEGMENT_FRAMES or sum(sizes) >= most

  def _can_spare(self, oldest: list[int]) -> bool:
    bytes_kept = sum(sum(sizes) for _, sizes in self._segments)
    return (
      len(self) - len(oldest) >= self._max_frames
      or bytes_kept - sum(oldest) >= self._max_bytes
    )

  def pictures(self) -> Iterator[bytes]:
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
        data = file.read(sum(sizes))
        file.seek(0, io.SEEK_END)
      start = 0
      for size in sizes:
        yield data[start : start + size]
        start += size

  def write_mp4(self, path: pathlib.Path, *, fps: float, scale: int) -> None:
    """Writes what is kept as a video; errors as `video_io.VideoWriter`."""
    with video_io.VideoWriter(path, fps=fps, scale=scale) as writer:
      frames: list[np.ndarray] = []
      for picture in self.pictures():
        with Image.open(io.BytesIO(picture)) as image:
          frames.append(np.asarray(image.convert('RGB')))
        if len(frames) == _BLOCK_FRAMES:
          writer.append(np.stack(frames))
          frames.clear()
      if frames:
        writer.append(np.stack(frames))

  def close(self) -> None:
    """Lets go of everything."""
    with self._lock:
      self._closed = True
      while self._segments:
        self._segments.popleft()[0].close()
