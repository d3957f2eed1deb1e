"""Frames as fragmented MP4: H.264 in segments that decode on their own.

A segment (moof, mdat) begins with a picture that needs no other, so that one
may be left out, and the next is decoded all the same. `Segments.begin` (ftyp,
moov) comes before the first. Segments one after the other are a file that
plays, and what the MediaSource of a browser takes.

libx264 is the one that comes with PyAV, in this process: a block costs no pipe,
and its last frame does not wait for the next one, as in ffmpeg's own muxer. The
boxes are those of ISO/IEC 14496-12, avcC of 14496-15.
"""

# F frames, H W height and width

import fractions
import io
import itertools
import struct
from collections.abc import Iterator

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import Colorspace

TIMESCALE = 90_000
_CRF = 18
_BT709, _LIMITED = 1, 1
_MATRIX = struct.pack('>9I', 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
# A first sample that needs no other; others do.
_KEY, _OTHER = 0x02000000, 0x01010000
# Of a segment as `encode` leaves it: number in mfhd, time in tfdt.
_NUMBER_AT, _TIME_AT = 20, 68


class Segments:
  """Encodes blocks of frames of one size, each into one segment.

  Attributes:
    begin: the bytes that come before the first segment.
    mime: such as 'video/mp4; codecs="avc1.42c00d"'.
  """

  def __init__(self, height: int, width: int, fps: float):
    """Opens the encoder."""
    # Colours have half the sides.
    self._size = height + height % 2, width + width % 2
    self._duration = round(TIMESCALE / fps)
    context = av.CodecContext.create('libx264', 'w')
    context.height, context.width = self._size
    context.pix_fmt = 'yuv420p'
    context.time_base = fractions.Fraction(1, TIMESCALE)
    context.framerate = fractions.Fraction(TIMESCALE, self._duration)
    context.colorspace = context.color_primaries = _BT709
    context.color_trc, context.color_range = _BT709, _LIMITED
    context.thread_count = 1
    context.options = {
      'preset': 'veryfast',
      # No frame waits for later ones.
      'tune': 'zerolatency',
      'crf': str(_CRF),
      # Only where a segment begins.
      'forced-idr': '1',
      'x264-params': 'keyint=infinite:scenecut=0:repeat-headers=0:annexb=1',
    }
    context.flags |= av.codec.context.Flags.global_header
    context.open()
    self._context, self._numbers = context, itertools.count()
    units = list(_units(context.extradata or b''))
    (sps,) = [unit for unit in units if unit[0] & 31 == 7]
    (pps,) = [unit for unit in units if unit[0] & 31 == 8]
    self.begin = _begin(*self._size, sps, pps)
    self.mime = f'video/mp4; codecs="avc1.{sps[1:4].hex()}"'

  def encode(self, frames_FHW3: np.ndarray) -> bytes:
    """A segment of uint8 frames; its number and time are still 0."""
    samples = []
    for i, frame in enumerate(frames_FHW3):
      down, right = self._size[0] - len(frame), self._size[1] - len(frame[0])
      frame = np.pad(frame, ((0, down), (0, right), (0, 0)), 'edge')
      picture = av.VideoFrame.from_ndarray(frame, 'rgb24').reformat(
        format='yuv420p', dst_colorspace=Colorspace.ITU709
      )
      picture.pts = next(self._numbers) * self._duration
      picture.pict_type = PictureType.I if i == 0 else PictureType.NONE
      packets = self._context.encode(picture)
      samples.append(
        b''.join(
          struct.pack('>I', len(unit)) + unit
          for packet in packets
          for unit in _units(bytes(packet))
        )
      )
    return _segment(samples, self._duration)

  def time_of(self, frame: int) -> int:
    """Of a frame, in units of `TIMESCALE`."""
    return frame * self._duration


def stamped(segment: bytes, number: int, time: int) -> bytes:
  """A segment with its place among those that are sent.

  Args:
    segment: of `Segments.encode`.
    number: from 1, rising.
    time: of its first frame, in units of `TIMESCALE`.
  """
  whole = bytearray(segment)
  struct.pack_into('>I', whole, _NUMBER_AT, number)
  struct.pack_into('>Q', whole, _TIME_AT, time)
  return bytes(whole)


def decode(begin: bytes, segment: bytes) -> np.ndarray:
  """Frames of one segment, uint8 [F, H, W, 3].

  Args:
    begin: `Segments.begin`.
    segment: any one; no other is needed.
  """
  with av.open(io.BytesIO(begin + segment), 'r', format='mp4') as file:
    frames = [
      frame.to_ndarray(format='rgb24') for frame in file.decode(video=0)
    ]
  return np.stack(frames)


def split(data: bytes) -> tuple[bytes, bytes]:
  """What comes before the first segment, and the rest."""
  at = 0
  while at + 8 <= len(data) and data[at + 4 : at + 8] != b'moof':
    at += max(8, struct.unpack_from('>I', data, at)[0])
  return data[:at], data[at:]


def _units(stream: bytes) -> Iterator[bytes]:
  """NAL units of what is separated by start codes."""
  for part in stream.replace(b'\0\0\0\1', b'\0\0\1').split(b'\0\0\1'):
    if part := part.rstrip(b'\0'):
      yield part


def _box(kind: bytes, *parts: bytes) -> bytes:
  body = b''.join(parts)
  return struct.pack('>I', 8 + len(body)) + kind + body


def _full(kind: bytes, version: int, flags: int, *parts: bytes) -> bytes:
  return _box(kind, struct.pack('>I', version << 24 | flags), *parts)


def _begin(height: int, width: int, sps: bytes, pps: bytes) -> bytes:
  """ftyp and moov of one track of video, without samples."""
  config = _box(
    b'avcC',
    *(b'\1', sps[1:4], b'\xff\xe1', struct.pack('>H', len(sps)), sps),
    *(b'\1', struct.pack('>H', len(pps)), pps),
  )
  colours = _box(b'colr', b'nclx', struct.pack('>3HB', *[_BT709] * 3, 0))
  entry = _box(
    b'avc1',
    struct.pack('>6xH16x', 1),
    struct.pack(
      '>HHIIIH32xHh', width, height, 72 << 16, 72 << 16, 0, 1, 24, -1
    ),
    *(config, colours),
  )
  samples = _box(
    b'stbl',
    _full(b'stsd', 0, 0, struct.pack('>I', 1), entry),
    *(_full(kind, 0, 0, bytes(4)) for kind in (b'stts', b'stsc', b'stco')),
    _full(b'stsz', 0, 0, bytes(8)),
  )
  own = _full(b'url ', 0, 1)
  media = _box(
    b'mdia',
    _full(b'mdhd', 0, 0, struct.pack('>4IHH', 0, 0, TIMESCALE, 0, 0x55C4, 0)),
    _full(b'hdlr', 0, 0, struct.pack('>4x4s12x', b'vide'), b'video\0'),
    _box(
      b'minf',
      _full(b'vmhd', 0, 1, bytes(8)),
      _box(b'dinf', _full(b'dref', 0, 0, struct.pack('>I', 1), own)),
      samples,
    ),
  )
  track = _full(
    *(b'tkhd', 0, 3),
    struct.pack('>5I8x4H', 0, 0, 1, 0, 0, 0, 0, 0, 0),
    *(_MATRIX, struct.pack('>II', width << 16, height << 16)),
  )
  movie = _full(
    *(b'mvhd', 0, 0),
    struct.pack('>4IIH10x', 0, 0, TIMESCALE, 0, 1 << 16, 1 << 8),
    *(_MATRIX, bytes(24), struct.pack('>I', 2)),
  )
  extends = _full(b'trex', 0, 0, struct.pack('>5I', 1, 1, 0, 0, 0))
  return _box(b'ftyp', b'iso6', bytes(4), b'iso6avc1mp41') + _box(
    b'moov', movie, _box(b'trak', track, media), _box(b'mvex', extends)
  )


def _segment(samples: list[bytes], duration: int) -> bytes:
  """moof and mdat of samples, the first of which needs no other."""
  # Durations and flags are the track's, but for the first sample's flags.
  header = _full(b'tfhd', 0, 0x020028, struct.pack('>3I', 1, duration, _OTHER))
  time = _full(b'tfdt', 1, 0, bytes(8))
  sizes = struct.pack(f'>{len(samples)}I', *map(len, samples))

  def moof(offset: int) -> bytes:
    run = struct.pack('>IiI', len(samples), offset, _KEY) + sizes
    return _box(
      b'moof',
      _full(b'mfhd', 0, 0, bytes(4)),
      _box(b'traf', header, time, _full(b'trun', 0, 0x000205, run)),
    )

  return moof(len(moof(0)) + 8) + _box(b'mdat', *samples)
