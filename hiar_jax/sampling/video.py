"""A finished video: frames, and the ways to look at them."""

# F frames, H W height and width, h w latent rows and columns, C channels

import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from hiar_jax.runtime import contact_sheets, video_io

_WATCHABLE_HEIGHT = 512  # px; smaller frames are enlarged to at least this.


@dataclasses.dataclass(frozen=True, eq=False)
class Video:
  """A finished video.

  Attributes:
    frames: uint8 [F, H, W, 3].
    fps: frames a second.
    prompt: that it was made for.
    latents: float32 [F, h, w, C] that the frames were decoded from, or None.
    seed: that makes it again alone, or None.
  """

  frames: np.ndarray
  fps: float
  prompt: str = ''
  latents: np.ndarray | None = None
  seed: int | None = None

  def __len__(self) -> int:
    """Number of frames."""
    return len(self.frames)

  def __getitem__(self, index: Any) -> Any:
    """A frame, uint8 [H, W, 3]; of a slice a Video, without latents."""
    frames = self.frames[index]
    if isinstance(index, slice):
      return dataclasses.replace(self, frames=frames, latents=None)
    return frames

  def __iter__(self) -> Iterator[np.ndarray]:
    """Frame by frame."""
    return iter(self.frames)

  def __array__(
    self, dtype: Any = None, copy: bool | None = None
  ) -> np.ndarray:
    """The frames, for np.asarray(video)."""
    return np.array(self.frames, dtype=dtype, copy=copy)

  def __repr__(self) -> str:
    return f'Video({self.prompt!r}, {list(self.shape)}, fps={self.fps:g})'

  @property
  def shape(self) -> tuple[int, int, int, int]:
    """(F, H, W, 3)."""
    return self.frames.shape

  @property
  def scale(self) -> int:
    """See `watchable_scale`."""
    return watchable_scale(self.shape[1])

  def save(self, path: str | pathlib.Path, *, scale: int | None = None) -> None:
    """Writes an mp4 that a browser plays.

    Args:
      path: ends in .mp4; '~' is one's home.
      scale: whole factor of enlargement; None makes it watchable (`scale`).

    Raises:
      ValueError, OSError: as `video_io.VideoWriter`.
    """
    scale = self.scale if scale is None else scale
    path = pathlib.Path(path).expanduser()
    video_io.write_video(path, self.frames, fps=self.fps, scale=scale)

  def contact_sheet(
    self,
    path: str | pathlib.Path | None = None,
    *,
    columns: int = 7,
    scale: int = 2,
  ) -> Image.Image:
    """Evenly spaced frames in one picture, also written to `path` as PNG."""
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / 'sheet.png' if path is None else path
      contact_sheets.write(
        path, self.frames, captions=self.prompt, columns=columns, scale=scale
      )
      with Image.open(path) as sheet:
        return sheet.copy()

  def _repr_html_(self) -> str:
    """What a notebook shows: a player with the video inside."""
    return video_io.to_html(
      self.frames, fps=self.fps, scale=self.scale, caption=self.prompt
    )


def watchable_scale(height: int) -> int:
  """Whole factor that makes frames at least 512 px high."""
  return max(1, -(-_WATCHABLE_HEIGHT // height))
