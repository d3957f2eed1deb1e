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

from hiar_jax.data import bouncing_words
from hiar_jax.data.bouncing_words import (
  BACKGROUNDS,
  MOTIONS,
  PALETTE,
  SHAPES,
  SIZES,
)
from hiar_jax.runtime import provenance

# What the seam of `data.prompts` asks a source for.
examples = bouncing_words.examples
reword = bouncing_words.reword
unknown_words = bouncing_words.unknown_words

# What the sources here read of a config beside their own section.
READS = ('world', 'world_seed')

# Of a shape's radius: the half side of the square, the hole of the ring.
_SQUARE_HALF_SIDE = 0.85
_RING_HOLE = 0.5
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
  if not (0 <= seed < 2**64 and 0 <= index < 2**64):
    raise ValueError(f'seed={seed} and index={index} must be in [0, 2**64)')
  key = np.array([seed, index], np.uint64)
  # Plain uniform numbers only: numpy keeps their stream fixed across versions,
  # but not that of its derived distributions.
  u = np.random.Generator(np.random.Philox(key=key)).random(12)
  shape = _pick(SHAPES, u[0])
  colour = _pick(tuple(PALETTE), u[1])
  background = _pick(tuple(BACKGROUNDS), u[2])
  size = _pick(SIZES, u[3])
  motion = _pick(MOTIONS, u[4])
  radius = _between(
    cfg.small_radius if size == 'small' else cfg.large_radius, u[5]
  )
  speed = _between(
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
    _pick(bouncing_words.FREE_CAPTIONS, u[11])
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


def coverage(
  shape: str,
  positions_F2: np.ndarray,
  radius: float | np.ndarray,
  *,
  height: int,
  width: int,
) -> np.ndarray:
  """The share of each pixel that a shape covers, from its signed distance.

  Args:
    shape: one of SHAPES.
    positions_F2: centres (y, x) in px.
    radius: in px, a number or one per frame [F].
    height: of the frame in px.
    width: of the frame in px.

  Returns:
    float32 [F, H, W] in [0, 1].

  Raises:
    ValueError: if the shape is unknown.
  """
  positions_F2 = np.asarray(positions_F2, np.float32)
  r = np.asarray(radius, np.float32)
  r = r[:, None, None] if r.ndim else r
  y = np.arange(height, dtype=np.float32) + 0.5 - positions_F2[:, :1]
  x = np.arange(width, dtype=np.float32) + 0.5 - positions_F2[:, 1:]
  y, x = y[:, :, None], np.abs(x[:, None, :])
  if shape == 'disc':
    distance = np.sqrt(y * y + x * x) - r
  elif shape == 'ring':
    hole = np.float32(_RING_HOLE)
    middle, half_width = r * (1 + hole) / 2, r * (1 - hole) / 2
    distance = np.abs(np.sqrt(y * y + x * x) - middle) - half_width
  elif shape == 'square':
    distance = np.maximum(np.abs(y), x) - np.float32(_SQUARE_HALF_SIDE) * r
  elif shape == 'triangle':
    # Equilateral, apex up, centroid at the centre: three half planes.
    side = np.float32(np.sqrt(0.75)) * x - np.float32(0.5) * y
    distance = np.maximum(y, side) - r / 2
  else:
    raise ValueError(f'shape={shape!r} is not one of {SHAPES}')
  return np.clip(np.float32(0.5) - distance, 0, 1)


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


@dataclasses.dataclass(frozen=True)
class Captions:
  """Captions of a world's scenes by number; see `data.prompts.Prompts`.

  Attributes:
    world: what the scenes are drawn from.
    seed: of the scenes; another seed is another (held-out) set.
    length: number of them.
  """

  world: WorldConfig
  seed: int
  length: int = 2**20

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, index: int) -> Any:
    return sample_scene(self.world, self.seed, index).caption

  def identity(self) -> dict[str, Any]:
    """Without the length: more than are used change nothing."""
    world = provenance.jsonable(self.world)
    return {'source': 'bouncing', 'world': world, 'seed': self.seed}


class Scenes(Captions):
  """Videos of a world's scenes by number; see `data.videos.Videos`."""

  @property
  def captions(self) -> Captions:
    return Captions(self.world, self.seed, self.length)

  @property
  def shape(self) -> tuple[int, int, int, int]:
    return (self.world.num_frames, self.world.height, self.world.width, 3)

  def __getitem__(self, index: int) -> np.ndarray:
    return render(sample_scene(self.world, self.seed, index), self.world)


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
    return (self.world.num_frames, self.world.height, self.world.width, 3)

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
  return Captions(**_scene_options(config, **options))


def open_videos(
  options: Mapping[str, Any], config: Mapping[str, Any]
) -> Scenes:
  """The videos of a config's world; arguments as `open_prompts`."""
  return Scenes(**_scene_options(config, **options))


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
  scenes = _scene_options(config, **options)
  scenes['world'] = dataclasses.replace(scenes['world'], num_frames=frames)
  return ObjectClips(crop=crop, **scenes)


def _scene_options(config, *, seed=None, length=2**20):
  return {
    'world': WorldConfig(**config['world']),
    'seed': config['world_seed'] if seed is None else seed,
    'length': length,
  }


def _pick(options: tuple[str, ...], u: float) -> str:
  return options[int(u * len(options))]


def _between(bounds: tuple[float, float], u: float) -> float:
  return float(bounds[0] + (bounds[1] - bounds[0]) * u)
