"""Anyone's video file, a frame at a time: its length costs no memory.

`video_io.read_video` gives all frames at once and takes what ffmpeg can make of
a file. Measures must not take a damaged file for a shorter video: this reader
says what is wrong with it.
"""

import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import IO, Self

import numpy as np

# What ffmpeg says about a file whose end is missing, and about damage inside.
_BAD = re.compile(
  r'partial file|ended prematurely|[Tt]runcat|corrupt|conceal'
  r'|[Ee]rror while decoding|[Ii]nvalid|missing picture'
)
# Frames short of what the header announces, before a file counts as cut:
# headers round.
_SLACK = 3


class FrameReader:
  """Decodes a video's frames one after another; a context.

  Iterating gives uint8 [H, W, 3] frames in display order, each once, turned as
  a player would turn them.

  Attributes:
    path: of the file.
    fps: frames a second, as the file says.
    num_read: frames given so far.
  """

  def __init__(self, path: str | os.PathLike):
    """Looks into the file.

    Args:
      path: any format that ffmpeg reads.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is empty, has no video, or its header is missing; one
        line that names it.
    """
    self.path = pathlib.Path(path)
    self.num_read = 0
    self._process: subprocess.Popen | None = None
    self._messages: IO[bytes] | None = None
    if not self.path.is_file():
      raise FileNotFoundError(f'no video at {self.path}')
    if not self.path.stat().st_size:
      raise ValueError(f'{self.path} is empty')
    described = subprocess.run(
      # Without an output ffmpeg describes the streams and returns an error.
      [_ffmpeg(), '-nostdin', '-i', str(self.path)],
      capture_output=True,
      check=False,
    ).stderr.decode(errors='replace')
    # Cover pictures of sound files are streams of video by name.
    lines = [
      line
      for line in described.splitlines()
      if 'Video: ' in line and 'attached pic' not in line
    ]
    if not lines:
      raise ValueError(f'{self.path} {self._why_no_video(described)}')
    rate = re.search(r'([\d.]+) fps', lines[0])
    if not rate:
      raise ValueError(
        f'{self.path} is truncated or damaged: no frame is whole'
      )
    self.fps = float(rate[1])
    length = re.search(r'Duration: (\d+):(\d+):([\d.]+)', described)
    hours, minutes, seconds = length.groups() if length else (0, 0, 0)
    self._announced = self.fps * (
      3600 * int(hours) + 60 * int(minutes) + float(seconds)
    )

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *unused_error: object) -> None:
    self.close()

  def close(self) -> None:
    """Stops decoding."""
    if self._process is not None:
      self._process.kill()
      if self._process.stdout is not None:
        self._process.stdout.close()
      self._process.wait()
      if self._messages is not None:
        self._messages.close()
      self._process = None

  def __iter__(self) -> Iterator[np.ndarray]:
    """Starts at the first frame.

    Raises:
      ValueError: after the last frame that can be read, if there should be
        more; one line that names the file.
    """
    self.close()
    self.num_read = 0
    # A file, not a pipe: nobody reads while frames are decoded.
    self._messages = tempfile.TemporaryFile()
    self._process = subprocess.Popen(
      [
        *(_ffmpeg(), '-nostdin', '-v', 'error'),
        *('-i', str(self.path), '-an', '-sn', '-fps_mode', 'passthrough'),
        # A picture with a header each: sizes are those after turning.
        *('-f', 'image2pipe', '-c:v', 'ppm', '-pix_fmt', 'rgb24', '-'),
      ],
      stdout=subprocess.PIPE,
      stderr=self._messages,
    )
    frames = self._process.stdout
    assert frames is not None  # It is a pipe.
    try:
      while (frame := _read_ppm(frames)) is not None:
        self.num_read += 1
        yield frame
      self._check_end()
    finally:
      self.close()

  def _check_end(self) -> None:
    assert self._process is not None and self._messages is not None
    failed = self._process.wait()
    self._messages.seek(0)
    said = self._messages.read().decode(errors='replace').strip()
    short = self.num_read < self._announced - _SLACK
    if not self.num_read:
      raise ValueError(
        f'{self.path} is truncated or damaged: no frame is whole'
      )
    if failed or (said and (short or _BAD.search(said))):
      of = f' of {self._announced:.0f}' if short else ''
      raise ValueError(
        f'{self.path} is truncated or damaged: {self.num_read}{of} frames can '
        'be read'
      )

  def _why_no_video(self, described):
    if 'Audio: ' in described:
      return 'has sound but no video'
    with self.path.open('rb') as file:
      is_mp4 = file.read(8)[4:] == b'ftyp'
    if is_mp4 and 'moov atom not found' in described:
      return 'is truncated: its header is missing'
    return 'has no video that ffmpeg can read'


def _ffmpeg() -> str:
  import imageio_ffmpeg

  return imageio_ffmpeg.get_ffmpeg_exe()


def _read_ppm(pipe: IO[bytes]) -> np.ndarray | None:
  if not pipe.readline():  # b'P6'
    return None
  width, height = map(int, pipe.readline().split())
  pipe.readline()  # The greatest value, 255.
  pixels = pipe.read(height * width * 3)
  if len(pixels) < height * width * 3:
    return None
  return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)
