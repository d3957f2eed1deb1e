"""What a viewer is sent of a block: pictures, or a segment of a video."""

# F frames, H W height and width

import io
import itertools
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from hiar_jax.serving import fragments

_QUALITY = 90


class Piece(NamedTuple):
  """A message's load: bytes, and how many frames they are."""

  data: bytes
  frames: int


class Encoder(Protocol):
  """Of one session; its thread encodes while the loop sends.

  Attributes:
    mime: of the video, or of a picture.
  """

  mime: str

  def encode(self, frames_FHW3: np.ndarray) -> list[Piece]:
    """Of uint8 frames; each may be left out without harm to the others."""

  def load(self, piece: Piece) -> bytes:
    """What is sent of a piece; those that are sent, in their order."""

  def decode(self, data: bytes) -> np.ndarray:
    """Frames of a piece's data, uint8 [F, H, W, 3]."""


def encoder(format: str, height: int, width: int, fps: float) -> Encoder:
  """Of frames of a size, in one of `protocol.FORMATS`."""
  return _Video(height, width, fps) if format == 'mp4' else _Pictures(format)


class _Pictures:
  """Every frame is a piece."""

  def __init__(self, format: str):
    self._format, self.mime = format, f'image/{format}'

  def encode(self, frames_FHW3: np.ndarray) -> list[Piece]:
    return [Piece(picture(frame, self._format), 1) for frame in frames_FHW3]

  def load(self, piece: Piece) -> bytes:
    return piece.data

  def decode(self, data: bytes) -> np.ndarray:
    return read_picture(data)[None]


class _Video:
  """A block is a segment, or several of a second at most.

  Times have no gaps, whatever was left out: a segment begins where the last one
  that was sent ended.
  """

  def __init__(self, height: int, width: int, fps: float):
    self._segments = fragments.Segments(height, width, fps)
    self.mime = self._segments.mime
    self._longest = max(1, round(fps))
    self._number, self._frames = itertools.count(1), 0

  def encode(self, frames_FHW3: np.ndarray) -> list[Piece]:
    count = -(-len(frames_FHW3) // self._longest)
    parts = np.array_split(frames_FHW3, count) if count else []
    return [Piece(self._segments.encode(part), len(part)) for part in parts]

  def load(self, piece: Piece) -> bytes:
    number, time = next(self._number), self._segments.time_of(self._frames)
    self._frames += piece.frames
    segment = fragments.stamped(piece.data, number, time)
    return self._segments.begin + segment if number == 1 else segment

  def decode(self, data: bytes) -> np.ndarray:
    return fragments.decode(self._segments.begin, data)


def picture(frame_HW3: np.ndarray, format: str) -> bytes:
  """A frame as a JPEG or WebP."""
  buffer = io.BytesIO()
  image = Image.fromarray(frame_HW3)
  if format == 'jpeg':
    image.save(buffer, 'JPEG', quality=_QUALITY, subsampling=0)
  else:
    image.save(buffer, 'WEBP', quality=_QUALITY, method=2)
  return buffer.getvalue()


def read_picture(data: bytes) -> np.ndarray:
  """Inverse of `picture`, as far as that goes: uint8 [H, W, 3]."""
  with Image.open(io.BytesIO(data)) as image:
    return np.asarray(image.convert('RGB'))


Decode = Callable[[bytes], np.ndarray]
