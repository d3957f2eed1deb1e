"""A stream in a notebook's cell: it plays, takes prompts, and leaves a picture.

  stream = pipe.stream('a red disc')
  preview = stream.show()

A thread makes the blocks and shows their frames at their rate. With ipywidgets
there are a box for prompts and a button to stop; without, the frames alone. The
picture below is part of the notebook: it is there when the kernel is gone.
"""

# B batch, F frames, H W height and width

import collections
import contextlib
import io
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from hiar_jax.sampling import video

_QUALITY = 90
_SHEET_COLUMNS = 7
_SHEET_S = 6.0
# Seconds between two pictures that are put into the notebook.
_SAVE_S = 10.0
_KEPT_S = 120.0
_LATE_S = 0.5


class Preview:
  """A stream that plays in the cell that made it, until it is stopped.

  Attributes:
    error: that ended it, or kept its last picture from being saved; or None.
  """

  def __init__(
    self,
    stream: Any,
    *,
    fps: float | None = None,
    height: int | None = None,
    keep_s: float = _KEPT_S,
  ):
    """Displays it, and starts the thread.

    Args:
      stream: a `streaming.Stream` of one video.
      fps: frames a second; None: the stream's.
      height: of what is shown, in px; None makes it watchable.
      keep_s: seconds of the video that `video` has at the end.

    Raises:
      ValueError: if the stream is of several videos, or no rate is known.
      ModuleNotFoundError: if there is no notebook.
    """
    from IPython import display

    if len(stream.prompts) != 1:
      raise ValueError(
        f'a stream of {len(stream.prompts)} videos; the preview shows one'
      )
    fps = stream.fps if fps is None else fps
    if fps is None or not fps > 0:
      raise ValueError(f'fps={fps} is not the rate of a video')
    self.error: BaseException | None = None
    self._stream, self._fps, self._height = stream, fps, height
    self._frames: collections.deque[np.ndarray] = collections.deque(
      maxlen=max(1, round(keep_s * fps))
    )
    self._block, self._shown = -1, 0
    self._asked: tuple[int, float] | None = None
    self._said = ''
    self._stopped = threading.Event()
    stream.ahead = 0
    self._display = display
    self._widgets = _widgets(self)
    if self._widgets is None:
      self._screen = display.display(
        _Bytes('image/jpeg', _blank()), display_id=True
      )
    else:
      display.display(self._widgets.box)
    self._picture = display.display(
      _Bytes('image/png', _blank()), display_id=True
    )
    self._thread = threading.Thread(
      target=self._run, name='hiar-preview', daemon=True
    )
    self._thread.start()
    # What the first prompt with `recache` would stand still for.
    threading.Thread(
      target=stream.compile_recache, name='hiar-compile', daemon=True
    ).start()

  def __repr__(self) -> str:
    state = 'stopped' if self._stopped.is_set() else 'playing'
    return f'Preview({self._stream.prompts[0]!r}, {state})'

  @property
  def playing(self) -> bool:
    """Whether it still goes on."""
    return self._thread.is_alive()

  @property
  def video(self) -> video.Video:
    """The last seconds, as they were shown.

    Raises:
      ValueError: if there is no frame yet.
    """
    frames = list(self._frames)
    if not frames:
      raise ValueError('nothing was shown yet')
    return video.Video(np.stack(frames), self._fps, self._stream.prompts[0])

  def send(self, prompt: str, **options: Any) -> int:
    """Changes the prompt, see `Stream.send`; the block from which it shows."""
    at = self._stream.send(prompt, **options)
    self._asked = at, time.monotonic()
    self._say(f'shows from block {at} on')
    return at

  def wait(self, seconds: float) -> None:
    """Returns when so much more of the video was shown, or it is over."""
    end = self._shown + seconds * self._fps
    while self._shown < end and self.playing:
      time.sleep(0.05)

  def stop(self) -> None:
    """Ends the preview, not the stream; the picture shows the end."""
    self._stopped.set()
    if threading.current_thread() is not self._thread:
      self._thread.join()

  def _run(self) -> None:
    try:
      self._play()
    except Exception as error:
      self.error = error
      self._say(f'ended: {error}')
      traceback.print_exc()
    self._stopped.set()
    try:
      self._save()
    except Exception as error:
      # There may be no kernel's client any more; what is below stays as it was.
      self.error = self.error or error
      self._say(f'the picture of the end was not saved: {error}')
      traceback.print_exc()
    if self._widgets is not None:
      with contextlib.suppress(Exception):  # Nobody may be there any more.
        self._widgets.close()

  def _play(self) -> None:
    due = saved = time.monotonic()
    for frames_BFHWC in self._stream:
      self._block += 1
      for frame in frames_BFHWC[0]:
        wait = due - time.monotonic()
        if wait < -_LATE_S:
          due = time.monotonic()
        if self._stopped.wait(max(0.0, wait)):
          return
        self._show(frame)
        due += 1 / self._fps
      if time.monotonic() - saved > _SAVE_S or self._block == 0:
        self._save()
        saved = time.monotonic()

  def _show(self, frame: np.ndarray) -> None:
    self._frames.append(frame)
    self._shown += 1
    data = _encode(frame, self._scale(frame), 'JPEG')
    if self._widgets is None:
      self._screen.update(_Bytes('image/jpeg', data))
    else:
      self._widgets.picture.value = data
    if self._asked is not None and self._block >= self._asked[0]:
      seconds = time.monotonic() - self._asked[1]
      self._asked = None
      self._say(f'first changed frame after {seconds:.1f} s')

  def _scale(self, frame: np.ndarray) -> int:
    if self._height is None:
      return video.watchable_scale(frame.shape[0])
    return max(1, round(self._height / frame.shape[0]))

  def _say(self, text: str) -> None:
    self._said = text
    if self._widgets is not None:
      with contextlib.suppress(OSError):  # Nobody may be there any more.
        self._widgets.told.value = text

  def _save(self) -> None:
    """Puts a picture of the last seconds into the notebook."""
    frames = list(self._frames)
    if not frames:
      return
    last = frames[-max(1, round(_SHEET_S * self._fps)) :]
    shown = video.Video(np.stack(last), self._fps, self._stream.prompts[0])
    buffer = io.BytesIO()
    columns = min(_SHEET_COLUMNS, len(last))
    shown.contact_sheet(columns=columns).save(buffer, format='PNG')
    self._picture.update(_Bytes('image/png', buffer.getvalue()))


class _Bytes:
  """A picture as IPython displays it."""

  def __init__(self, kind: str, data: bytes):
    self._kind, self._data = kind, data

  def _repr_mimebundle_(
    self, include: Sequence[str] = (), exclude: Sequence[str] = ()
  ) -> dict[str, bytes]:
    del include, exclude
    return {self._kind: self._data}


class _Widgets:
  """The picture, a box for prompts and a button, of ipywidgets.

  Attributes:
    box: all of it.
    picture: shows a frame.
    told: a line of text.
  """

  def __init__(self, preview: Preview, ipywidgets: Any):
    self.picture = ipywidgets.Image(value=_blank(), format='jpeg')
    self.told = ipywidgets.Label()
    self._prompt = ipywidgets.Text(
      value=preview._stream.prompts[0],
      placeholder='what the video shows',
      layout=ipywidgets.Layout(width='28em'),
    )
    self._send = ipywidgets.Button(description='Change it')
    self._stop = ipywidgets.Button(description='Stop', icon='stop')

    def change(unused_widget: Any) -> None:
      try:
        preview.send(self._prompt.value)
      except ValueError as error:
        self.told.value = str(error)

    self._send.on_click(change)
    self._stop.on_click(lambda unused: preview._stopped.set())
    self.box = ipywidgets.VBox(
      [
        self.picture,
        ipywidgets.HBox([self._prompt, self._send, self._stop]),
        self.told,
      ]
    )

  def close(self) -> None:
    """Shows that there is nothing more to press."""
    for widget in (self._prompt, self._send, self._stop):
      widget.disabled = True


def _widgets(preview: Preview) -> _Widgets | None:
  """None without ipywidgets."""
  try:
    import ipywidgets
  except ModuleNotFoundError:
    print("pip install 'hiar_jax[live]' for a prompt box and a stop button")
    return None
  return _Widgets(preview, ipywidgets)


def _encode(frame: np.ndarray, scale: int, kind: str) -> bytes:
  image = Image.fromarray(frame)
  size = (scale * image.width, scale * image.height)
  image = image.resize(size, Image.Resampling.NEAREST)
  buffer = io.BytesIO()
  image.save(buffer, format=kind, quality=_QUALITY)
  return buffer.getvalue()


def _blank() -> bytes:
  return _encode(np.zeros((8, 8, 3), np.uint8), 1, 'PNG')
