"""Clips of video files: decoded, at one frame rate, at one size, by PyAV.

F frames, H W height and width.
"""

import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

FITS = ('crop', 'pad', 'stretch')  # See `fit`.

# Seconds by which the times of containers are off: some count milliseconds.
_ROUNDING = 1.5e-3


def read(
  path: str | os.PathLike,
  *,
  fps: float,
  num_frames: int,
  height: int,
  width: int,
) -> np.ndarray:
  """The start of a video, as people would see it.

  Frame k is that which is nearest in time to k / fps after the first one: by
  the time stamps, for not every file has a fixed rate. It is turned as the file
  says, scaled to cover the wanted size, and its middle is kept.

  Args:
    path: of anything that FFmpeg decodes.
    fps: frames a second of the clip.
    num_frames: F.
    height: H in px.
    width: W in px.

  Returns:
    uint8 [F, H, W, 3].

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it cannot be decoded, has no video, or is too short.
  """
  import av

  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'no video at {path}')
  try:
    with av.open(address(path)) as container:
      stream = video_stream(container, path)
      aspect = float(stream.sample_aspect_ratio or 1)
      chosen: list[np.ndarray] = []
      seconds = 0.0
      last, pixels = None, np.empty(0)
      for frame, end in _nearest(container, stream, fps, num_frames):
        # The same one again, where a file has fewer of them.
        if frame is not last:
          last, pixels = frame, fit(*upright(frame, aspect), height, width)
        chosen.append(pixels)
        seconds = end
  except av.FFmpegError as error:
    raise ValueError(f'{path} cannot be decoded: {error.strerror}') from error
  if len(chosen) < num_frames:
    raise ValueError(
      f'{path} is too short: it has {seconds:.2f} s, and {num_frames} frames '
      f'at {fps:g} a second are {num_frames / fps:.2f} s'
    )
  return np.stack(chosen)


def address(path: pathlib.Path) -> str:
  """The file for FFmpeg, which would take '10:30.mp4' for a protocol."""
  return f'file:{path}'


def video_stream(container: Any, path: pathlib.Path) -> Any:
  """The stream of a file that people see, which is not its cover picture.

  Raises:
    ValueError: if it has none.
  """
  import av

  cover = av.stream.Disposition.attached_pic
  streams = [s for s in container.streams.video if not s.disposition & cover]
  if not streams:
    raise ValueError(f'{path} has no video in it')
  best = container.streams.best('video')
  stream = best if best in streams else streams[0]
  stream.thread_type = 'AUTO'
  return stream


def _nearest(
  container: Any, stream: Any, fps: float, num_frames: int
) -> Iterator[tuple[Any, float]]:
  """Up to num_frames frames, each with the seconds of the file until then."""
  start: float | None = None
  before: tuple[float, Any] | None = None
  count, end = 0, 0.0
  for time, length, frame in timed(container, stream):
    start = time if start is None else start
    now, end = time - start, time - start + length
    while count < num_frames and count / fps <= now:
      wanted = count / fps
      if before is None or now - wanted <= wanted - before[0]:
        yield frame, end
      else:
        yield before[1], end
      count += 1
    before = (now, frame)
    if count == num_frames:
      return
  # The last frame is shown until it ends.
  while before and count < num_frames and count / fps < end - _ROUNDING:
    yield before[1], end
    count += 1


def timed(container: Any, stream: Any) -> Iterator[tuple[float, float, Any]]:
  """Start and length in seconds of every frame, in the order they are shown."""
  rate = float(stream.average_rate or stream.guessed_rate or 25)
  time = 0.0
  for frame in container.decode(stream):
    base = frame.time_base
    if frame.pts is not None and base is not None:
      time = float(frame.pts * base)
    length = float(frame.duration * base) if frame.duration and base else 0.0
    length = length or 1 / rate
    yield time, length, frame
    time += length


def upright(frame: Any, aspect: float) -> tuple[np.ndarray, float]:
  """Pixels of a frame, turned as its file says, and the shape of one."""
  pixels = frame.to_ndarray(format='rgb24')
  turns = round(frame.rotation / 90) % 4
  return np.rot90(pixels, turns), 1 / aspect if turns % 2 else aspect


def fit(
  frame: np.ndarray, aspect: float, height: int, width: int, how: str = 'crop'
) -> np.ndarray:
  """Brings a frame to height x width.

  Args:
    frame: uint8 [H', W', 3].
    aspect: width of one of its pixels over its height.
    height: H.
    width: W.
    how: one of FITS. 'crop': scaled to cover the size, the middle kept; 'pad':
      scaled to lie within it, between black bars; 'stretch': all of it, in
      another shape.
  """
  rows, columns = frame.shape[:2]
  if (rows, columns) == (height, width) and aspect == 1:
    return frame
  shown = columns * aspect
  image = Image.fromarray(np.ascontiguousarray(frame))
  filtered = Image.Resampling.LANCZOS
  if how == 'pad':
    scale = min(height / rows, width / shown)
    size = max(1, round(shown * scale)), max(1, round(rows * scale))
    padded = Image.new('RGB', (width, height))
    corner = (width - size[0]) // 2, (height - size[1]) // 2
    padded.paste(image.resize(size, filtered), corner)
    return np.asarray(padded)
  box = (0.0, 0.0, float(columns), float(rows))
  if how == 'crop':
    # The largest part of the frame that has the wanted shape.
    scale = min(rows / height, shown / width)
    used_rows, used_columns = scale * height, scale * width / aspect
    top, left = (rows - used_rows) / 2, (columns - used_columns) / 2
    box = (left, top, left + used_columns, top + used_rows)
  return np.asarray(image.resize((width, height), filtered, box=box))
