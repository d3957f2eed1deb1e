"""Videos as files: mp4 out and in, a tag for notebooks.

The ffmpeg binary comes inside the imageio-ffmpeg wheel, so that Python alone is
enough to write H.264. Frames are handed over block by block as they are made:
the length of a video costs no memory.

`imageio_ffmpeg.read_frames` reads. Its `write_frames` would not do to write:

- it forks with a Python hook, to shield ffmpeg from Ctrl-C, in a process that
  has jax's threads; its switch against that takes the shield away as well;
- it tells neither ffmpeg's exit status nor its words: a video whose end found
  no room on the disk would look finished.
"""

import base64
import contextlib
import errno
import math
import os
import pathlib
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from typing import IO, Any, NoReturn, Self

import numpy as np

# F frames, H height, W width; pixels are uint8 RGB, [F, H, W, 3].

_FFMPEG = 'IMAGEIO_FFMPEG_EXE'
# Macroblocks of a frame, and along a side, at H.264's highest level 6.2.
_MAX_BLOCKS, _MAX_BLOCKS_ALONG = 139_264, 1055
# Bytes of a name; a file system takes 255, and some are added.
_LONGEST_NAME = 200
# Each of some 2 s plays without those after it.
_FRAGMENTS = (
  '+empty_moov+default_base_moof+frag_keyframe',
  *('-frag_duration', '2000000'),
)
# Of which a file's times are exact enough to be read again.
_FPS_RANGE = (0.001, 1000)
_FILTERS = {'nearest': 'neighbor', 'lanczos': 'lanczos'}


class VideoWriter:
  """Streams frames into an H.264 mp4 that a browser plays.

  Use it as a context manager. The file appears under its name when the writer
  closes without an error; until then, and after an error, whatever had that
  name before is untouched. The header is moved to the front of the closed file,
  so a browser starts before it has all of it. (A fragmented file would play
  when cut short, but many players cannot seek in one; and what was written
  before an interruption is never under the final name anyway.)

  What took hours, a stream, is written with `keeps`: in fragments, which play
  whatever happens after them, and made one file when it closes. An error then
  ends the video where it is; of a process that was killed the fragments lie in
  `.NAME.mp4.PROCESS.part`, which plays as well.

  Attributes:
    kept: after an error, that the file has what was written before it.
  """

  def __init__(
    self,
    path: str | pathlib.Path,
    *,
    fps: float,
    scale: int = 1,
    resampling: str = 'nearest',
    crf: int = 14,
    keeps: bool = False,
  ):
    """Checks the arguments; ffmpeg starts with the first frames.

    Args:
      path: ends in .mp4.
      fps: frames a second, > 0.
      scale: whole factor of enlargement, >= 1.
      resampling: of the enlargement: 'nearest' shows the pixels as they are,
        'lanczos' smooths.
      crf: x264's quality, 0 (lossless) to 51; 14 shows no loss.
      keeps: an error leaves what was written before it, under the name.

    Raises:
      ValueError: if an argument is out of its range.
      OSError: if the file cannot be written.
    """
    if not 0 < fps < math.inf:
      raise ValueError(f'fps={fps} is not positive and finite')
    if not _FPS_RANGE[0] <= fps <= _FPS_RANGE[1]:
      raise ValueError(
        f'fps={fps} is not between {_FPS_RANGE[0]} and {_FPS_RANGE[1]}'
      )
    if scale < 1:
      raise ValueError(f'scale={scale} is not a whole number >= 1')
    if resampling not in _FILTERS:
      raise ValueError(
        f'resampling={resampling!r} is not one of {sorted(_FILTERS)}'
      )
    self.path = pathlib.Path(path)
    if self.path.suffix.lower() != '.mp4':
      raise ValueError(f'video file {self.path} does not end in .mp4')
    check_writable(self.path)
    check_ffmpeg()
    self.num_frames = 0
    self._fps = fps
    self._scale = scale
    self._resampling = resampling
    self._crf, self._keeps, self.kept = crf, keeps, False
    self._size: tuple[int, int] | None = None
    self._partial = self.path.with_name(f'.{self.path.name}.{os.getpid()}.part')
    self._process: subprocess.Popen[bytes] | None = None
    self._messages: IO[bytes] | None = None

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self, error_type: object, error: object, traceback: object
  ) -> None:
    if error_type is None:
      self.close()
    elif self._keeps and self._process is not None:
      # The error is what is told, not what comes of saving what there is.
      with contextlib.suppress(OSError):
        self.close()
        self.kept = True
    else:
      self.discard()

  def append(self, frames: np.ndarray) -> None:
    """Adds a block of frames.

    Args:
      frames: uint8 [F, H, W, 3]; H and W as in the first block.

    Raises:
      ValueError: on another type or shape.
      OSError: if ffmpeg stops, for example on a full disk.
    """
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
      raise ValueError(
        'frames must be uint8 [F, H, W, 3], not '
        f'{frames.dtype} {list(frames.shape)}'
      )
    if not len(frames):
      return
    if self._process is None:
      self._start(*frames.shape[1:3])
    if frames.shape[1:3] != self._size:
      raise ValueError(
        f'frames are {frames.shape[1:3]}, the video is {self._size}'
      )
    try:
      _stdin(self._process).write(np.ascontiguousarray(frames).data)
    except BrokenPipeError:
      self._fail()
    self.num_frames += len(frames)

  def close(self) -> None:
    """Finishes the file and gives it its name.

    Raises:
      ValueError: if no frame was appended.
      OSError: if ffmpeg fails.
    """
    if self._process is None:
      raise ValueError(f'no frames were written to {self.path}')
    # A dead ffmpeg is reported below, with its own words.
    with contextlib.suppress(BrokenPipeError):
      _stdin(self._process).close()
    if self._process.wait():
      self._fail()
    self._close_messages()
    self._process = None
    if self._keeps:
      self._join()
    self._partial.replace(self.path)

  def discard(self) -> None:
    """Stops and leaves no file behind."""
    if self._process is not None:
      self._process.kill()
      with contextlib.suppress(BrokenPipeError):
        _stdin(self._process).close()
      self._process.wait()
      self._close_messages()
      self._process = None
    self._partial.unlink(missing_ok=True)

  def _join(self) -> None:
    """Makes one file of fragments, if there is room for it beside them."""
    import imageio_ffmpeg

    joined = self._partial.with_suffix('.joined')
    command = [
      *(imageio_ffmpeg.get_ffmpeg_exe(), '-nostdin', '-v', 'error', '-y'),
      *('-i', str(self._partial.absolute()), '-c', 'copy'),
      *('-movflags', '+faststart', '-f', 'mp4', str(joined.absolute())),
    ]
    done = subprocess.run(command, capture_output=True, start_new_session=True)
    if done.returncode:
      joined.unlink(missing_ok=True)
    else:
      joined.replace(self._partial)

  def _start(self, height: int, width: int) -> None:
    import imageio_ffmpeg

    self._size = (height, width)
    filters = (
      f'scale={width * self._scale}:{height * self._scale}'
      f':flags={_FILTERS[self._resampling]}+accurate_rnd+full_chroma_int'
      ':out_color_matrix=bt709:out_range=tv,'
      # yuv420p halves the colour planes, so sizes must be even.
      'pad=ceil(iw/2)*2:ceil(ih/2)*2,'
      'setparams=color_primaries=bt709:color_trc=bt709'
    )
    command = [
      *(imageio_ffmpeg.get_ffmpeg_exe(), '-nostdin', '-v', 'error', '-y'),
      *('-f', 'rawvideo', '-pix_fmt', 'rgb24', '-s', f'{width}x{height}'),
      *('-r', f'{self._fps:g}', '-i', 'pipe:0', '-vf', filters, '-an'),
      # At this quality half the processor time of 'medium' for the same size.
      *('-c:v', 'libx264', '-preset', 'veryfast', '-crf', str(self._crf)),
      *('-pix_fmt', 'yuv420p', '-f', 'mp4', '-movflags'),
      *(_FRAGMENTS if self._keeps else ('+faststart',)),
      str(self._partial.absolute()),
    ]
    # A file, not a pipe: nobody reads while frames are written.
    self._messages = tempfile.TemporaryFile()
    self._process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stderr=self._messages,
      # A Ctrl-C in the terminal is for Python alone, which then closes the
      # file; ffmpeg would be stopped with frames still on their way.
      start_new_session=True,
    )

  def _close_messages(self) -> None:
    if self._messages is not None:
      self._messages.close()

  def _fail(self) -> NoReturn:
    assert self._process is not None and self._messages is not None
    self._process.wait()
    self._messages.seek(0)
    message = self._messages.read().decode(errors='replace').strip()
    full = os.strerror(errno.ENOSPC)
    message = full if full in message else message
    if self._keeps and self._partial.exists():
      self._close_messages()
      self._process = None
      self._partial.replace(self.path)
      self.kept = True
    else:
      self.discard()
    raise OSError(f'ffmpeg could not write {self.path}: {message}')


def _stdin(process: subprocess.Popen[bytes] | None) -> IO[bytes]:
  """That of a process which was started with a pipe."""
  assert process is not None and process.stdin is not None
  return process.stdin


def write_video(
  path: str | pathlib.Path, frames: np.ndarray, *, fps: float, scale: int = 1
) -> None:
  """Writes uint8 frames [F, H, W, 3] as one mp4; errors as `VideoWriter`."""
  with VideoWriter(path, fps=fps, scale=scale) as writer:
    writer.append(frames)


def read_video(path: str | pathlib.Path) -> tuple[np.ndarray, float]:
  """Reads a video file.

  Returns:
    uint8 frames [F, H, W, 3] and the frames per second.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if ffmpeg finds no video in it.
  """
  import imageio_ffmpeg

  path = pathlib.Path(path)
  if not path.exists():
    raise FileNotFoundError(f'no video at {path}')
  described: dict[str, Any] | None = None
  frames: Sequence[bytes] = ()
  with _without_fork(), warnings.catch_warnings():
    # It leaves the process's pipes to the garbage collector.
    warnings.simplefilter('ignore', ResourceWarning)
    source = imageio_ffmpeg.read_frames(path)
    # What it raises on other files: IndexError where ffmpeg names no video,
    # RuntimeError in the middle of a frame.
    with contextlib.suppress(IndexError, OSError, RuntimeError):
      described = next(source)
      frames = list(source)
    del source
  if described is None:
    raise ValueError(f'{path} has no video that ffmpeg can read')
  if not frames or not described['fps']:
    raise ValueError(f'ffmpeg could not decode {path}')
  width, height = described['size']
  pixels = np.frombuffer(b''.join(frames), np.uint8)
  return pixels.reshape(-1, height, width, 3), described['fps']


@contextlib.contextmanager
def _without_fork() -> Iterator[None]:
  """ffmpeg is started without a Python hook between fork and exec.

  imageio-ffmpeg's own switch. Ctrl-C then reaches ffmpeg too, which, where it
  reads, is as well.
  """
  name = 'IMAGEIO_FFMPEG_NO_PREVENT_SIGINT'
  before = os.environ.get(name)
  os.environ[name] = '1'
  try:
    yield
  finally:
    if before is None:
      del os.environ[name]
    else:
      os.environ[name] = before


def check_ffmpeg() -> None:
  """Raises before long work if ffmpeg could not write after it.

  Raises:
    OSError: in one sentence.
  """
  import imageio_ffmpeg

  named = os.environ.get(_FFMPEG)
  try:
    found = imageio_ffmpeg.get_ffmpeg_exe()
    subprocess.run([found, '-version'], capture_output=True, check=True)
  except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
    if named:
      raise OSError(
        f'{_FFMPEG}={named} is no ffmpeg that can be run ({error}); without '
        'the variable, the one of the package imageio-ffmpeg is used'
      ) from error
    raise OSError(
      f'there is no ffmpeg to write videos with ({error}): install the '
      f'package imageio-ffmpeg again, or name one in {_FFMPEG}'
    ) from error


def check_size(height: int, width: int, scale: int) -> None:
  """Raises ValueError if H.264 has no frames of height x width times scale."""
  height, width = height * scale, width * scale
  blocks = -(-height // 16), -(-width // 16)
  if blocks[0] * blocks[1] > _MAX_BLOCKS or max(blocks) > _MAX_BLOCKS_ALONG:
    raise ValueError(
      f'scale={scale} makes frames of {height}x{width}, larger than H.264 has '
      f'them ({_MAX_BLOCKS * 256 / 1e6:.1f} million pixels)'
    )


def check_writable(path: str | pathlib.Path) -> None:
  """Raises before long work if a file could not be written after it.

  Args:
    path: of a file to come; its folder must exist.

  Raises:
    OSError: FileNotFoundError, NotADirectoryError, IsADirectoryError or
      PermissionError, in one sentence.
  """
  path = pathlib.Path(path)
  folder = path.parent
  if not folder.exists():
    raise FileNotFoundError(f'cannot write {path}: no folder {folder}')
  if not folder.is_dir():
    raise NotADirectoryError(f'cannot write {path}: {folder} is not a folder')
  if (length := len(os.fsencode(path.name))) > _LONGEST_NAME:
    raise OSError(
      f'cannot write {path}: its name has {length} bytes, {_LONGEST_NAME} are '
      'the most'
    )
  if path.is_dir():
    raise IsADirectoryError(f'cannot write {path}: it is a folder')
  # Only an attempt tells about read-only file systems and quotas.
  try:
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as error:
    raise PermissionError(
      f'cannot write {path}: {error.strerror or error}'
    ) from error


def to_html(
  video: np.ndarray, *, fps: float, scale: int = 4, caption: str = ''
) -> str:
  """A <video> tag with the mp4 inside, for a notebook.

  Args:
    video: uint8 [F, H, W, 3].
    fps: frames a second.
    scale: whole factor of enlargement.
    caption: shown under the video.
  """
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'video.mp4'
    write_video(path, video, fps=fps, scale=scale)
    data = base64.b64encode(path.read_bytes()).decode()
  escaped = (
    caption.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')
  )
  return (
    '<figure><video controls autoplay loop muted playsinline '
    f'src="data:video/mp4;base64,{data}"></video>'
    f'<figcaption>{escaped}</figcaption></figure>'
  )
