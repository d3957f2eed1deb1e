"""Clips that a codec is trained on: whole videos, and a crop of each."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from hiar_jax.data import videos

# Told apart from other streams of the same seed.
_CROP_STREAM = 2


class Clips(Protocol):
  """Videos by number, each with a crop; a grain RandomAccessDataSource.

  Attributes:
    shape: (F, H, W, 3) of every video.
    crop: side of the square crops in px.
  """

  @property
  def shape(self) -> tuple[int, int, int, int]: ...

  @property
  def crop(self) -> int: ...

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """`video` uint8 [F, H, W, 3] and `crop` uint8 [F, crop, crop, 3]."""


@dataclasses.dataclass(frozen=True)
class RandomCrops:
  """A crop anywhere in every video, by seed and index only; see `Clips`.

  Attributes:
    videos: that are cut.
    crop: side of the square crop in px.
    seed: of the places, in [0, 2**64).
  """

  videos: videos.Videos
  crop: int
  seed: int = 0

  def __post_init__(self) -> None:
    side = min(self.shape[1:3])
    if not 1 <= self.crop <= side:
      raise ValueError(f'clips.crop={self.crop} is not in [1, {side}]')
    if not 0 <= self.seed < 2**64:
      raise ValueError(f'clips.seed={self.seed} is not in [0, 2**64)')

  @property
  def shape(self) -> tuple[int, int, int, int]:
    return self.videos.shape

  def __len__(self) -> int:
    return len(self.videos)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    video = self.videos[index]
    bits = np.random.Philox(
      key=np.array([self.seed, index], np.uint64),
      counter=np.array([0, 0, 0, _CROP_STREAM], np.uint64),
    )
    draw = np.random.Generator(bits).random(2)
    room = np.array(video.shape[1:3]) - self.crop
    top, left = (draw * (room + 1)).astype(int)
    area = np.s_[:, top : top + self.crop, left : left + self.crop]
    return {'video': video, 'crop': video[area]}


def open_clips(
  options: Mapping[str, Any], config: Mapping[str, Any]
) -> RandomCrops:
  """Clips of a folder's videos; the seam of `training.inputs`.

  Args:
    options: `crop`, maybe `seed`, and those of `videos.open_videos`.
    config: is not looked at.
  """
  own = {name: options[name] for name in ('crop', 'seed') if name in options}
  if 'crop' not in own:
    raise ValueError('clips.crop is missing')
  others = {name: value for name, value in options.items() if name not in own}
  return RandomCrops(videos.open_videos(others, config), **own)
