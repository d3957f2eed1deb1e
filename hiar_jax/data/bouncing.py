"""The bouncing world: captioned videos of one coloured shape, made on the fly.

A scene is a shape of one colour that moves at constant speed over a flat
background and is reflected by the frame's edges. Everything about it follows
from (seed, index), so a data set of any length needs no files, and its truth
(positions, colours) is known exactly.

Coordinates are (y, x) in pixels, y down; the frame spans [0, height] x
[0, width] and pixel (i, j) has its centre at (i + 0.5, j + 0.5).

F frames, H height, W width.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from hiar_jax.data import bouncing_words, small_worlds
from hiar_jax.data.bouncing_words import (
  BACKGROUNDS,
  MOTIONS,
  PALETTE,
  SHAPES,
  SIZES,
)
from hiar_jax.data.small_worlds import between, pick

# What the seam of `data.prompts` asks a source for.
examples = bouncing_words.examples
reword = bouncing_words.reword
unknown_words = bouncing_words.unknown_words

coverage = small_worlds.coverage

# What the sources here read of a config beside their own section.
READS = ('world', 'world_seed')

# Told apart from the Philox stream of the scene, which starts at counter 0.
_CROP_STREAM = 2


@dataclasses.dataclass(frozen=True)
class WorldConfig:
  """What the scenes are drawn from; ranges are [low, high), lengths in px.

  A shape's radius is the radius of the circle it stays inside.
  """

  height: int = 64
  width: int = 64
  num_frames: int = 21
  small_radius: tuple[float, float] = (8.1, 9.9)
  large_radius: tuple[float, float] = (12.6, 15.4)
  slow_speed: tuple[float, float] = (0.8, 1.2)
  fast_speed: tuple[float, float] = (2.0, 2.8)
  free_caption_rate: float = 0.4

  def __post_init__(self):
    if self.num_frames < 1:
      raise ValueError(f'num_frames={self.num_frames} is not positive')
    widest = 2 * max(self.small_radius[1], self.large_radius[1])
    if widest >= min(self.height, self.width):
      raise ValueError(
        f'a shape {widest} px wide has no room to move in a '
        f'{self.height}x{self.width} frame'
      )


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
  """One video's truth.

  Attributes:
    shape: one of SHAPES.
    colour: a key of PALETTE; `rgb` is its value.
    background: a key of BACKGROUNDS; `background_rgb` is its value.
    size: one of SIZES; `radius` in px follows from it.
    motion: one of MOTIONS; `speed` in px per frame follows from it.
    positions: float64 [F, 2], the shape's centre (y, x) in px.
    velocity: float64 [2], (y, x) in px per frame, before the first bounce.
    caption: what a person might have written about the video.
  """

  shape: str
  colour: str
  rgb: tuple[int, int, int]
  background: str
  background_rgb: tuple[int, int, int]
  size: str
  radius: float
  motion: str
  speed: float
  positions: np.ndarray
  velocity: np.ndarray
  caption: str


def sample_scene(cfg: WorldConfig, seed: int, index: int) -> Scene:
  """Draws scene number `index` of the world `seed`.

  The draw is counter based (Philox keyed by seed and index): it does not depend
  on what was drawn before, nor on the process or host.

  Args:
    cfg: the ranges to draw from.
    seed: in [0, 2**64).
    index: in [0, 2**64).

  Raises:
    ValueError: if seed or index is out of range.
  """
  u = small_worlds.uniforms(seed, index, 12)
  shape = pick(SHAPES, u[0])
  colour = pick(tuple(PALETTE), u[1])
  background = pick(tuple(BACKGROUNDS), u[2])
  size = pick(SIZES, u[3])
  motion = pick(MOTIONS, u[4])
  radius = between(
    cfg.small_radius if size == 'small' else cfg.large_radius, u[5]
  )
  speed = between(
    cfg.slow_speed if motion == 'slowly' else cfg.fast_speed, u[6]
  )
  direction = 2 * np.pi * u[7]
  velocity = speed * np.array([np.sin(direction), np.cos(direction)])
  room = np.array([cfg.height, cfg.width]) - 2 * radius
  path = room * u[8:10] + velocity * np.arange(cfg.num_frames)[:, None]
  # A bounce between two walls is a straight path folded into a triangle wave.
  positions = radius + room - np.abs(np.mod(path, 2 * room) - room)
  scene = Scene(
    shape=shape,
    colour=colour,
    rgb=PALETTE[colour],
    background=background,
    background_rgb=BACKGROUNDS[background],
    size=size,
    radius=radius,
    motion=motion,
    speed=speed,
    positions=positions,
    velocity=velocity,
    caption='',
  )
  is_free = u[10] < cfg.free_caption_rate
  template = (
    pick(bouncing_words.FREE_CAPTIONS, u[11])
    if is_free
    else bouncing_words.CAPTION
  )
  caption = template.format(
    size=size,
    colour=colour,
    shape=shape,
    motion=motion,
    background=background,
    pace='slow' if motion == 'slowly' else 'fast',
  )
  return dataclasses.replace(scene, caption=caption)


def render(scene: Scene, cfg: WorldConfig) -> np.ndarray:
  """Draws a scene: uint8 [F, H, W, 3]."""
  cover_FHW = coverage(
    scene.shape,
    scene.positions,
    scene.radius,
    height=cfg.height,
    width=cfg.width,
  )
  return composite(cover_FHW, scene.rgb, scene.background_rgb)


def videos(cfg: WorldConfig, seed: int, num: int) -> Iterator[np.ndarray]:
  """The videos of scenes 0 .. num - 1 of the world `seed`, one at a time."""
  for index in range(num):
    yield render(sample_scene(cfg, seed, index), cfg)


def composite(
  cover_FHW: np.ndarray,
  rgb: tuple[int, int, int],
  background_rgb: tuple[int, int, int],
) -> np.ndarray:
  """Paints `rgb` over a flat background by coverage: uint8 [F, H, W, 3]."""
  # 256 blends in a table: far fewer multiplications than one per pixel.
  share = np.linspace(0, 1, 256)[:, None]
  blends = np.rint(
    share * np.array(rgb) + (1 - share) * np.array(background_rgb)
  )
  level_FHW = (cover_FHW * 255 + np.float32(0.5)).astype(np.uint8)
  return np.take(blends.astype(np.uint8), level_FHW, axis=0)


class Captions(small_worlds.Captions):
  """Captions of the scenes by number; see `data.prompts.Prompts`."""

  source = 'bouncing'

  def scene(self, index: int) -> Scene:
    return sample_scene(self.world, self.seed, index)


class Scenes(Captions):
  """Videos of a world's scenes by number; see `data.videos.Videos`."""

  @property
  def captions(self) -> Captions:
    return Captions(self.world, self.seed, self.length)

  @property
  def shape(self) -> tuple[int, int, int, int]:
    return small_worlds.video_shape(self.world)

  def __getitem__(self, index: int) -> np.ndarray:
    return render(self.scene(index), self.world)


@dataclasses.dataclass(frozen=True)
class ObjectClips:
  """Videos with a crop around their object; see `data.crops.Clips`.

  Most pixels of the world are flat: what can be learnt is around the object.

  Attributes:
    world: what the scenes are drawn from.
    seed: of the scenes and of the crops.
    crop: side of the square crop in px.
    length: number of elements.
  """

  world: WorldConfig
  seed: int
  crop: int
  length: int = 2**20

  def __post_init__(self) -> None:
    side = min(self.world.height, self.world.width)
    if not 1 <= self.crop <= side:
      raise ValueError(f'crop={self.crop} is not in [1, {side}]')

  @property
  def shape(self) -> tuple[int, int, int, int]:
    return small_worlds.video_shape(self.world)

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """`video` uint8 [F, H, W, 3] and `crop` uint8 [F, crop, crop, 3]."""
    scene = self.scene(index)
    video = render(scene, self.world)
    bits = np.random.Philox(
      key=np.array([self.seed, index], np.uint64),
      counter=np.array([0, 0, 0, _CROP_STREAM], np.uint64),
    )
    draw = np.random.Generator(bits).random(3)
    positions = scene.positions.astype(np.float32)
    centre = positions[int(draw[0] * len(positions))]
    # Anywhere that has some of the object in it.
    corner = centre - self.crop * (0.25 + 0.5 * draw[1:])
    room = np.array(video.shape[1:3]) - self.crop
    top, left = np.clip(np.rint(corner), 0, room).astype(int)
    area = np.s_[:, top : top + self.crop, left : left + self.crop]
    return {'video': video, 'crop': video[area]}

  def scene(self, index: int) -> Scene:
    """The truth, caption included, of element `index`."""
    return sample_scene(self.world, self.seed, index)


def open_prompts(
  options: Mapping[str, Any], config: Mapping[str, Any]
) -> Captions:
  """The captions of a config's world; the seam of `training.inputs`.

  Args:
    options: may have `seed` and `length`.
    config: its section `world`, and `world_seed`, the seed unless given.
  """
  return Captions(**small_worlds.scene_options(WorldConfig, config, **options))


def open_videos(
  options: Mapping[str, Any], config: Mapping[str, Any]
) -> Scenes:
  """The videos of a config's world; arguments as `open_prompts`."""
  return Scenes(**small_worlds.scene_options(WorldConfig, config, **options))


def open_clips(
  options: Mapping[str, Any], config: Mapping[str, Any]
) -> ObjectClips:
  """Clips of a config's world, for its codec.

  Args:
    options: `crop`, and maybe `num_frames`, `seed` and `length`.
    config: as of `open_prompts`.
  """
  options = dict(options)
  crop = options.pop('crop', None)
  if crop is None:
    raise ValueError('clips.crop is missing')
  frames = options.pop('num_frames', config['world']['num_frames'])
  scenes = small_worlds.scene_options(WorldConfig, config, **options)
  scenes['world'] = dataclasses.replace(scenes['world'], num_frames=frames)
  return ObjectClips(crop=crop, **scenes)
