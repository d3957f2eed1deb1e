"""The picture or video that a video goes on from, as people see it.

F frames, H W height and width.
"""

import collections
import itertools
import os
import pathlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from hiar_jax.data import clips

# A picture's time and its pixels, which are made when they are asked for.
_Timed = tuple[float, float, Any]

# Seconds by which a container's duration may be off.
_MARGIN = 1.0
# Rates that differ by less are one.
_SAME_RATE = 0.005
_ANIMATED = ('GIF', 'WEBP', 'PNG', 'AVIF')
_HEIC = (b'ftypheic', b'ftypheix', b'ftyphevc', b'ftypmif1', b'ftypmsf1')
# As browsers show what is left transparent.
_BACKGROUND = 'white'


def read(
  path: str | os.PathLike,
  height: int,
  width: int,
  *,
  fps: float,
  last: int | None = None,
  fit: str = 'crop',
) -> tuple[np.ndarray, list[str]]:
  """Reads a picture, or a video's end, at a given size and rate.

  Turned as the file says, laid over white where it is transparent, and brought
  to the size. Frames of a video are chosen by their times.

  Args:
    path: of a picture, animated or not, or of a video.
    height: H in px.
    width: W in px.
    fps: frames a second of what is returned.
    last: how many frames to keep, the last ones; no more are decoded than that
      takes. None: all.
    fit: how another shape is brought to the size, see `clips.fit`.

  Returns:
    uint8 [F, H, W, 3], 1 for a picture; and what was done to the frames, a line
    each.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is neither, is damaged, or `last` is not positive.
  """
  if last is not None and last < 1:
    raise ValueError(f'the last {last} frames of {path}: at least 1 is needed')
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'no image or video at {path}')
  fitted = _Fit(path, height, width, fit)
  try:
    with warnings.catch_warnings():
      # Of a hundred million pixels; of twice as many it is an error.
      warnings.simplefilter('ignore', Image.DecompressionBombWarning)
      with Image.open(path) as image:
        _check_pixels(image, path)
        frames, rate = _of_picture(image, fitted, fps, last)
  except UnidentifiedImageError:
    _check_no_heic(path)
    frames, rate = _of_video(path, fitted, fps, last)
  except Image.DecompressionBombError as error:
    raise ValueError(f'{path} is too large: {error}') from error
  except (OSError, SyntaxError) as error:
    raise ValueError(f'{path} is damaged: {error}') from error
  notes = list(fitted.notes)
  if rate and abs(rate / fps - 1) > _SAME_RATE:
    notes.append(f'{path}: {rate:.4g} frames a second, read at {fps:g}')
  return np.stack(frames), notes


def _check_pixels(image: Image.Image, path: pathlib.Path) -> None:
  if image.mode == 'F':
    raise ValueError(
      f'{path} has pixels of floating point, whose white is not known; save it '
      'with 8 or 16 bits'
    )


def _check_no_heic(path: pathlib.Path) -> None:
  """Says what phones save; FFmpeg would read it as a video that is damaged."""
  with path.open('rb') as file:
    if file.read(12)[4:] in _HEIC:
      raise ValueError(
        f'{path} is a HEIC picture, whatever its name; save it as JPEG or PNG'
      )


class _Fit:
  """Brings frames to a size, and notes what that did to them."""

  def __init__(self, path: pathlib.Path, height: int, width: int, how: str):
    if how not in clips.FITS:
      raise ValueError(f'fit={how!r} is not one of {clips.FITS}')
    self.notes: list[str] = []
    self._path, self._size, self._how = path, (height, width), how

  def __call__(self, pixels: np.ndarray, aspect: float = 1.0) -> np.ndarray:
    height, width = self._size
    rows, columns = pixels.shape[:2]
    ratio = columns * aspect * height / (rows * width)
    if abs(ratio - 1) > 0.01 and not self.notes:
      part = 1 - min(ratio, 1 / ratio)
      side, other = 'width', 'height'
      if ratio < 1:
        side, other = other, side
      done = {
        'crop': f'{part:.0%} of its {side} is cut off at the edges',
        'pad': f'{part:.0%} of the {other} is black bars',
        'stretch': f'its {side} is made {part:.0%} less, beside its {other}',
      }
      self.notes.append(
        f'{self._path}: {columns}x{rows} is not the shape of {width}x{height}; '
        + done[self._how]
      )
    return clips.fit(pixels, aspect, height, width, self._how)


def _of_picture(
  image: Image.Image, fit: _Fit, fps: float, last: int | None
) -> tuple[list[np.ndarray], float | None]:
  """Frames of a picture; of an animated one at the rate."""
  count = getattr(image, 'n_frames', 1)
  if count == 1 or image.format not in _ANIMATED:
    return [fit(_pixels(image))], None
  durations = []
  for index in range(count):
    image.seek(index)
    image.load()  # A frame's duration is known then.
    durations.append(max(image.info.get('duration', 100), 10) / 1000)
  starts = np.concatenate([[0.0], np.cumsum(durations)])
  number = max(1, round(starts[-1] * fps))
  # From the end, so that the last frame is the last one that is shown.
  times = starts[-2] - np.arange(number)[::-1] / fps
  times = times[times >= -1e-6][-last if last else None :]
  shown = {}
  chosen = np.searchsorted(starts[:-1], times + 1e-6, side='right') - 1
  for index in sorted(set(chosen.tolist())):
    image.seek(index)
    shown[index] = fit(_pixels(image))
  return [shown[index] for index in chosen.tolist()], count / starts[-1]


def _pixels(image: Image.Image) -> np.ndarray:
  """uint8 [H, W, 3], upright and without transparency."""
  image = ImageOps.exif_transpose(image)
  if image.mode.startswith('I'):  # 16 bits of grey, which PIL would clip.
    grey = np.asarray(image).astype(np.int64)
    grey = np.clip(np.round(grey / 257), 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, -1)
  if image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info:
    image = image.convert('RGBA')
    under = Image.new('RGBA', image.size, _BACKGROUND)
    image = Image.alpha_composite(under, image)
  return np.asarray(image.convert('RGB'))


def _of_video(
  path: pathlib.Path,
  fit: _Fit,
  fps: float,
  last: int | None,
  seeks: bool = True,
) -> tuple[list[np.ndarray], float | None]:
  """Frames of a video at the rate, and the rate of the file."""
  import av

  try:
    with av.open(clips.address(path)) as container:
      stream = clips.video_stream(container, path)
      aspect = float(stream.sample_aspect_ratio or 1)
      rate = float(stream.average_rate or 0) or None
      timed = clips.timed(container, stream)
      chosen: Iterable[Any] = _forward(timed, fps)
      if last is not None:
        if seeks:
          _seek_to_end(container, stream, last / fps + _MARGIN)
        chosen = _backward(timed, fps, last)
      # One after another: a decoded frame is large before it is fitted.
      frames = [fit(*clips.upright(frame, aspect)) for frame in chosen]
  except av.FFmpegError as error:
    raise ValueError(
      f'{path} is neither a picture nor a video that can be decoded '
      f'({error.strerror})'
    ) from error
  if not frames and last is not None and seeks:
    # Some files are sought beyond their end.
    return _of_video(path, fit, fps, last, seeks=False)
  if not frames:
    raise ValueError(f'{path} has no frame that can be decoded')
  return frames, rate


def _forward(timed: Iterable[_Timed], fps: float) -> Iterator[Any]:
  """Frames that are nearest to 0, 1 / fps, ... after the first."""
  count, start = 0, None
  before: tuple[float, Any] = (-1e9, None)  # The first frame is nearer.
  for time, _, frame in timed:
    start = time if start is None else start
    now = time - start
    while count / fps <= now + 1e-6:
      wanted = count / fps
      late = now - wanted <= wanted - before[0]
      yield frame if late else before[1]
      count += 1
    before = (now, frame)


def _backward(timed: Iterable[_Timed], fps: float, last: int) -> list[Any]:
  """Frames that are nearest to 0, 1 / fps, ... before the last, in order."""
  kept: collections.deque[tuple[float, Any]] = collections.deque()
  for time, _, frame in timed:
    kept.append((time, frame))
    # One more stays, for it may be the nearest.
    while len(kept) > 2 and kept[1][0] < time - last / fps:
      kept.popleft()
  if not kept:
    return []
  end = kept[-1][0]
  times = np.array([time for time, _ in kept])
  span = end - times[0]
  chosen = [
    int(np.argmin(np.abs(times - (end - k / fps))))
    for k in itertools.takewhile(lambda k: k / fps <= span + 1e-6, range(last))
  ]
  return [kept[index][1] for index in reversed(chosen)]


def _seek_to_end(container: Any, stream: Any, seconds: float) -> None:
  """Goes to a key frame that many seconds before the end, if it is known."""
  import av

  if stream.duration and stream.time_base:
    length = float(stream.duration * stream.time_base)
  elif container.duration:
    length = container.duration / 1e6
  else:
    return
  start = float((stream.start_time or 0) * stream.time_base)
  wanted = start + length - seconds
  if wanted > start:
    try:
      container.seek(int(wanted / stream.time_base), stream=stream)
    except av.FFmpegError:
      return  # Some files cannot be; all of it is decoded then.
