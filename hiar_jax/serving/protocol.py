"""What goes over the WebSocket: JSON commands in, JSON events and frames out.

A binary message is one frame, or a segment of some: a header of 36 bytes,
big-endian, and the bytes of the picture or segment.

  0   4 bytes  'HIAR'
  4   uint8    version, 1
  5   uint8    kind: 1 JPEG, 2 WebP, 3 a segment of fragmented MP4
  6   uint16   length of the header, 36; a later version may have a longer one
  8   uint32   block, from 0
  12  uint32   frame of the video, from 0, the segment's first; given ones count
  16  uint32   number of the prompt that the block was made for, from 0
  20  uint32   frames not shown so far, because they came too late
  24  float64  seconds from the session's first frame to when this one is due
  32  uint32   frames that the message has, 1 of pictures

Of a session's segments the first one is led by `ftyp` and `moov`. All of them
one after the other are a file.
"""

import dataclasses
import json
import struct
from typing import Any, NoReturn

VERSION = 1
FORMATS = {'jpeg': 1, 'webp': 2, 'mp4': 3}
_HEADER = struct.Struct('>4sBBHIIIIdI')
_MAGIC = b'HIAR'
_MAX_SEED = 2**96


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one server takes on; every number is told to a client in `hello`.

  Attributes:
    sessions: videos that are made at a time.
    waiting: sessions that may wait for a place.
    session_s: seconds after which a session ends if others wait.
    prompt_chars: characters of a prompt.
    message_bytes: of a message to the server.
    upload_bytes: of a picture or video to go on from.
    uploads: that are kept for a session to come.
    uploads_bytes: of their frames, as pixels.
    video_blocks: of a whole video.
    record_frames: that can be downloaded, the last ones.
    record_bytes: likewise; of the pictures as they were sent.
    sockets: connections of any kind.
    idle_s: seconds until a connection must have said what it wants.
    drain_s: seconds that whole videos have to be finished in, when the server
      is told to end.
  """

  sessions: int = 4
  waiting: int = 16
  session_s: float = 600.0
  prompt_chars: int = 2000
  message_bytes: int = 2**16
  upload_bytes: int = 32 * 2**20
  uploads: int = 8
  uploads_bytes: int = 512 * 2**20
  video_blocks: int = 400
  record_frames: int = 14400
  record_bytes: int = 256 * 2**20
  sockets: int = 256
  idle_s: float = 20.0
  drain_s: float = 20.0


class Refused(ValueError):
  """A request that cannot be granted.

  Attributes:
    code: one word, for programs.
    status: of HTTP.
  """

  def __init__(self, code: str, message: str, status: int = 400):
    super().__init__(message)
    self.code, self.status = code, status

  def as_json(self) -> dict[str, Any]:
    return {'type': 'error', 'code': self.code, 'message': str(self)}


@dataclasses.dataclass(frozen=True)
class Start:
  """Begins a video, instead of the one under way if there is one.

  Attributes:
    prompt: what it shows.
    seed: names the noise.
    mode: of the stream; None: the server's.
    format: of the frames, one of FORMATS.
    upload: id of what it goes on from.
  """

  prompt: str
  seed: int = 0
  mode: str | None = None
  format: str = 'jpeg'
  upload: str | None = None


@dataclasses.dataclass(frozen=True)
class Prompt:
  """Changes what the video shows.

  Attributes:
    prompt: from the next block on that is not begun.
    hurry: frames that were made for earlier prompts are not shown any more.
    recache: in mode 'block_first', what is remembered of the video is read
      anew for the prompt; see `sampling.block_stream`.
  """

  prompt: str
  hurry: bool = False
  recache: bool = False


@dataclasses.dataclass(frozen=True)
class Pause:
  """Stands still; nothing is made meanwhile."""


@dataclasses.dataclass(frozen=True)
class Resume:
  """Goes on after `Pause`."""


@dataclasses.dataclass(frozen=True)
class Stop:
  """Ends the video; it can be downloaded for a while."""


@dataclasses.dataclass(frozen=True)
class Ping:
  """Is answered by `pong`.

  Attributes:
    id: comes back.
  """

  id: int = 0


Command = Start | Prompt | Pause | Resume | Stop | Ping
COMMANDS: dict[str, type[Command]] = {
  'start': Start,
  'prompt': Prompt,
  'pause': Pause,
  'resume': Resume,
  'stop': Stop,
  'ping': Ping,
}


@dataclasses.dataclass(frozen=True)
class VideoRequest:
  """A whole video, the body of POST /v1/videos.

  Attributes:
    prompt: what it shows.
    num_blocks: length.
    seed: names the noise.
    mode: see `Start`.
    upload: see `Start`.
    scale: whole factor of enlargement; None makes it watchable.
  """

  prompt: str
  num_blocks: int = 7
  seed: int = 0
  mode: str | None = None
  upload: str | None = None
  scale: int | None = None


def parse_command(text: str | bytes, limits: Limits) -> Command:
  """A message of a client.

  Raises:
    Refused: telling what is wrong with it, and what would be right.
  """
  if isinstance(text, bytes):
    _refuse('commands are text messages of JSON, not binary ones')
  told = _parse_object(text)
  kind = told.pop('type', None)
  if not isinstance(kind, str) or kind not in COMMANDS:
    _refuse(f'type {_show(kind)} is not one of {sorted(COMMANDS)}', 'unknown')
  return _build(COMMANDS[kind], told, kind, limits)


def parse_video_request(body: bytes, limits: Limits) -> VideoRequest:
  """The body of POST /v1/videos; errors as `parse_command`."""
  try:
    text = body.decode()
  except UnicodeDecodeError:
    _refuse('the body is not UTF-8')
  return _build(VideoRequest, _parse_object(text), 'a video', limits)


def pack_frame(
  picture: bytes,
  *,
  format: str,
  block: int,
  frame: int,
  prompt: int,
  dropped: int,
  due_s: float,
  frames: int = 1,
) -> bytes:
  """A binary message; the fields are those at the top."""
  numbers = (block, frame, prompt, dropped)
  header = _HEADER.pack(
    *(_MAGIC, VERSION, FORMATS[format], _HEADER.size), *numbers, due_s, frames
  )
  return header + picture


@dataclasses.dataclass(frozen=True)
class Frame:
  """An unpacked binary message; see the top of the module."""

  format: str
  block: int
  frame: int
  prompt: int
  dropped: int
  due_s: float
  frames: int
  picture: bytes


def unpack_frame(message: bytes) -> Frame:
  """Inverse of `pack_frame`.

  Raises:
    ValueError: if it is no frame, or of a version to come.
  """
  if len(message) < _HEADER.size:
    raise ValueError(f'{len(message)} bytes are no frame')
  fields = _HEADER.unpack_from(message)
  magic, version, kind, length, block, frame, prompt, dropped, *rest = fields
  due_s, frames = rest
  if magic != _MAGIC or version != VERSION:
    raise ValueError(f'no frame of version {VERSION}: {message[:8]!r}')
  formats = {number: name for name, number in FORMATS.items()}
  picture = message[length:]
  return Frame(
    *(formats[kind], block, frame, prompt, dropped),
    due_s=due_s,
    frames=frames,
    picture=picture,
  )


def _parse_object(text: str) -> dict[str, Any]:
  try:
    told = json.loads(text, parse_constant=_refuse_constant)
  except RecursionError:
    _refuse('the JSON is nested too deeply')
  except ValueError as error:
    _refuse(f'not JSON: {error}')
  if not isinstance(told, dict):
    _refuse(f'{_show(told)} is not a JSON object')
  return told


def _refuse_constant(name: str) -> NoReturn:
  raise ValueError(f'{name} is no number of JSON')


def _build(kind, told, name, limits):
  """The dataclass `kind` of what was told, each value checked."""
  fields = {field.name: field for field in dataclasses.fields(kind)}
  for key in told:
    if key not in fields:
      known = f'one of {sorted(fields)}' if fields else 'known: it takes none'
      _refuse(f'{name}: {_show(key)} is not {known}', 'unknown')
  for key, field in fields.items():
    if key not in told:
      if field.default is dataclasses.MISSING:
        _refuse(f'{name}: {key!r} is missing')
      continue
    value = told[key]
    if value is None and field.default is None:
      continue
    problem = _problem(key, value, limits)
    if problem:
      _refuse(f'{name}: {key} {problem}')
  if 'prompt' in told:
    told = {**told, 'prompt': told['prompt'].strip()}
  return kind(**told)


def _problem(key: str, value: Any, limits: Limits) -> str | None:
  """What is wrong with a value, as the end of a sentence."""
  if key == 'prompt':
    if not isinstance(value, str) or not value.strip():
      return f'{_show(value)} is not a text'
    if len(value) > limits.prompt_chars:
      return f'has {len(value)} characters; {limits.prompt_chars} are allowed'
    if any(ord(c) < 32 and c not in '\t\n\r' for c in value):
      return 'has control characters'
    # Lone surrogates, which JSON can spell and UTF-8 cannot.
    if any('\ud800' <= c <= '\udfff' for c in value):
      return 'is not Unicode text'
  elif key in ('hurry', 'recache'):
    if not isinstance(value, bool):
      return f'{_show(value)} is neither true nor false'
  elif key == 'format':
    if not isinstance(value, str) or value not in FORMATS:
      return f'{_show(value)} is not one of {sorted(FORMATS)}'
  elif key in ('mode', 'upload'):
    if not isinstance(value, str) or len(value) > 64:
      return f'{_show(value)} is not a short text'
  else:
    least, most = {
      'seed': (0, _MAX_SEED - 1),
      'num_blocks': (1, limits.video_blocks),
      'scale': (1, 16),
      'id': (0, 2**53),
    }[key]
    if isinstance(value, bool) or not isinstance(value, int):
      return f'{_show(value)} is not a whole number'
    if not least <= value <= most:
      return f'{_show(value)} is not in {least}..{most}'
  return None


def _refuse(message: str, code: str = 'bad_request') -> NoReturn:
  raise Refused(code, message)


def _show(value: Any) -> str:
  """A value for a message, cut short."""
  text = json.dumps(value, ensure_ascii=True)
  return text if len(text) <= 60 else f'{text[:57]}...'
