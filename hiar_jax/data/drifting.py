"""The drifting world: what its captions leave open, only the context can carry.

A scene is a shape of one hue that moves over a still background of two hues
with a texture. The caption names the shape and the kind of its motion; hues,
gradient, texture, size and speed come from ranges, and nothing but the frames
before says what they are. So a model that goes on block by block can drift,
and how far it did is known exactly: every frame's truth follows from
(seed, index), however many there are.

Hues are angles in a plane of chroma (Cb, Cr) at a luma of their own: the same
step of hue is the same step of colour, red to orange or green to cyan, and a
gradient between two of them is a plane over the frame.

Coordinates are (y, x) in pixels, y down; the frame spans [0, height] x
[0, width] and pixel (i, j) has its centre at (i + 0.5, j + 0.5).

F frames, H height, W width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from hiar_jax.data import small_worlds
from hiar_jax.data.small_worlds import between, pick

SHAPES = ('disc', 'square', 'triangle')
MOTIONS = ('gliding', 'circling')
TEXTURES = ('stripes', 'dots')

# Luma in 0..1, and the length of the chroma: with the texture's amplitude no
# colour leaves the range of a pixel, whatever the hue.
OBJECT_LUMA, OBJECT_CHROMA = 0.72, 0.155
GROUND_LUMA, GROUND_CHROMA = 0.38, 0.15
TEXTURE_AMPLITUDE = 0.08
# Rows are R, G, B; columns Y, Cb, Cr (BT.601, full range).
RGB_OF_YCC = np.array(
  [[1.0, 0.0, 1.402], [1.0, -0.344136, -0.714136], [1.0, 1.772, 0.0]]
)
coverage = small_worlds.coverage

# What the sources here read of a config beside their own section.
READS = ('world', 'world_seed')

_WORDS = {'ball': 'disc', 'circle': 'disc', 'box': 'square'}


@dataclasses.dataclass(frozen=True)
class WorldConfig:
  """What the scenes are drawn from; ranges are [low, high), lengths in px.

  Attributes:
    height: of a frame.
    width: of a frame.
    num_frames: of a video.
    radius: of the circle that a shape stays inside.
    speed: px per frame, along the path.
    orbit: radius of the circle that a circling shape's centre runs on.
    period: of the texture.
    hue_step: between the two hues of the background, in turns, either way.
    edge: px over which a shape's edge fades; 1 is a sharp one.
    shapes: of SHAPES, those that there are.
  """

  height: int = 24
  width: int = 24
  num_frames: int = 15
  radius: tuple[float, float] = (4.2, 5.8)
  speed: tuple[float, float] = (0.5, 1.4)
  orbit: tuple[float, float] = (3.0, 5.5)
  period: tuple[float, float] = (6.0, 10.0)
  hue_step: tuple[float, float] = (0.12, 0.38)
  edge: float = 1.0
  shapes: tuple[str, ...] = SHAPES

  def __post_init__(self):
    if not self.shapes or {*self.shapes} - {*SHAPES}:
      raise ValueError(f'shapes={self.shapes} are not some of {SHAPES}')
    if self.edge < 1:
      raise ValueError(f'edge={self.edge} is below 1, a pixel')
    if self.num_frames < 1:
      raise ValueError(f'num_frames={self.num_frames} is not positive')
    for field in ('radius', 'speed', 'orbit', 'period', 'hue_step'):
      low, high = getattr(self, field)
      if not 0 < low <= high:
        raise ValueError(f'{field}={(low, high)} does not rise from above 0')
    widest = 2 * (self.radius[1] + self.orbit[1])
    if widest >= min(self.height, self.width):
      raise ValueError(
        f'a circling shape needs {widest} px, and has no room to do so in a '
        f'{self.height}x{self.width} frame'
      )


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
  """One video's truth. Angles are in turns, 0..1.

  Attributes:
    shape: one of SHAPES.
    motion: one of MOTIONS.
    hue: of the shape.
    ground_hues: of the background, where the gradient begins and ends.
    gradient_angle: the direction it runs in, from +x towards +y.
    texture: one of TEXTURES.
    texture_angle: of the stripes' normal, or of the dots' grid.
    texture_period: in px.
    texture_phase: [2], along that normal and across it.
    radius: of the shape, px.
    speed: px per frame.
    positions: float64 [F, 2], the shape's centre (y, x) in px.
    caption: shape and motion, and no more.
  """

  shape: str
  motion: str
  hue: float
  ground_hues: tuple[float, float]
  gradient_angle: float
  texture: str
  texture_angle: float
  texture_period: float
  texture_phase: np.ndarray
  radius: float
  speed: float
  positions: np.ndarray
  caption: str


def sample_scene(cfg: WorldConfig, seed: int, index: int) -> Scene:
  """Draws scene number `index` of the world `seed`.

  The draw is counter based (Philox keyed by seed and index): it does not depend
  on what was drawn before, on the process, nor on cfg.num_frames: a longer
  video of a scene begins with the shorter one.

  Args:
    cfg: the ranges to draw from.
    seed: in [0, 2**64).
    index: in [0, 2**64).

  Raises:
    ValueError: if seed or index is out of range.
  """
  u = small_worlds.uniforms(seed, index, 18)
  shape, motion = pick(tuple(cfg.shapes), u[0]), pick(MOTIONS, u[1])
  step = between(cfg.hue_step, u[4]) * (1 if u[5] < 0.5 else -1)
  radius, speed = between(cfg.radius, u[11]), between(cfg.speed, u[12])
  size = np.array([cfg.height, cfg.width], np.float64)
  place = _glide if motion == 'gliding' else _circle
  return Scene(
    shape=shape,
    motion=motion,
    hue=float(u[2]),
    ground_hues=(float(u[3]), float((u[3] + step) % 1)),
    gradient_angle=float(u[6]),
    texture=pick(TEXTURES, u[7]),
    texture_angle=float(u[8]),
    texture_period=between(cfg.period, u[9]),
    texture_phase=np.array([u[10], u[17]]),
    radius=radius,
    speed=speed,
    positions=place(
      size, radius, speed, u[13:17], np.arange(cfg.num_frames), cfg
    ),
    caption=f'a {shape} {motion}',
  )


def _glide(size, radius, speed, u, time_F, cfg):
  """Straight on, reflected by the edges: a triangle wave in each direction."""
  del cfg
  room = size - 2 * radius
  angle = 2 * np.pi * u[0]
  velocity = speed * np.array([np.sin(angle), np.cos(angle)])
  path = room * u[1:3] + velocity * time_F[:, None]
  return radius + room - np.abs(np.mod(path, 2 * room) - room)


def _circle(size, radius, speed, u, time_F, cfg):
  """Round a centre, at the scene's speed, one way or the other."""
  orbit = between(cfg.orbit, u[3])
  centre = radius + orbit + (size - 2 * (radius + orbit)) * u[1:3]
  turn = np.sign(u[0] - 0.5) * speed / orbit
  angle = 4 * np.pi * u[0] + turn * time_F
  return centre + orbit * np.stack([np.sin(angle), np.cos(angle)], -1)


def render(scene: Scene, cfg: WorldConfig) -> np.ndarray:
  """Draws a scene: uint8 [F, H, W, 3]."""
  cover_FHW = coverage(
    *(scene.shape, scene.positions, scene.radius),
    height=cfg.height,
    width=cfg.width,
    edge=cfg.edge,
  )[..., None]
  ground = background(scene, cfg)
  video = ground + cover_FHW * (object_rgb(scene) - ground)
  return np.rint(255 * np.clip(video, 0, 1)).astype(np.uint8)


def object_rgb(scene: Scene) -> np.ndarray:
  """The shape's colour: float32 [3] in 0..1."""
  chroma = OBJECT_CHROMA * chroma_of_hue(scene.hue)
  return _rgb(np.array([OBJECT_LUMA, *chroma]))


def background(scene: Scene, cfg: WorldConfig) -> np.ndarray:
  """What is behind the shape: float32 [H, W, 3] in 0..1."""
  luma = GROUND_LUMA + TEXTURE_AMPLITUDE * texture(scene, cfg)
  return _rgb(np.concatenate([luma[..., None], gradient(scene, cfg)], -1))


def gradient(scene: Scene, cfg: WorldConfig) -> np.ndarray:
  """Chroma (Cb, Cr) behind the shape, a plane over the frame: [H, W, 2]."""
  y, x = _grid(cfg)
  angle = 2 * np.pi * scene.gradient_angle
  along = x * np.cos(angle) + y * np.sin(angle)
  share = (along - along.min()) / (along.max() - along.min())
  start, end = map(chroma_of_hue, scene.ground_hues)
  return GROUND_CHROMA * (start + share[..., None] * (end - start))


def texture(scene: Scene, cfg: WorldConfig) -> np.ndarray:
  """The texture, -1..1: [H, W]."""
  y, x = _grid(cfg)
  angle = 2 * np.pi * scene.texture_angle
  along = x * np.cos(angle) + y * np.sin(angle)
  across = y * np.cos(angle) - x * np.sin(angle)
  waves = [
    np.sin(2 * np.pi * (way / scene.texture_period + phase))
    for way, phase in zip((along, across), scene.texture_phase, strict=True)
  ]
  return waves[0] if scene.texture == 'stripes' else waves[0] * waves[1]


def chroma_of_hue(hue: float | np.ndarray) -> np.ndarray:
  """Unit (Cb, Cr) of a hue in turns: [..., 2]."""
  angle = 2 * np.pi * np.asarray(hue)
  return np.stack([np.cos(angle), np.sin(angle)], -1)


def parse_prompt(prompt: str) -> tuple[str | None, str | None]:
  """The shape and the motion that a prompt names; None where it names none."""
  words = [_WORDS.get(word, word) for word in prompt.lower().split()]
  return (
    next((word for word in words if word in SHAPES), None),
    next((word for word in words if word in MOTIONS), None),
  )


def unknown_words(prompt: str) -> list[str]:
  """What a prompt lacks for a model of this world, a sentence each."""
  found = parse_prompt(prompt)
  return [
    f'{prompt!r} names no {name} that the model was taught: {", ".join(known)}'
    for value, name, known in zip(
      found, ('shape', 'motion'), (SHAPES, MOTIONS), strict=True
    )
    if value is None
  ]


class Captions(small_worlds.Captions):
  """Captions of the scenes by number; see `data.prompts.Prompts`."""

  source = 'drifting'

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


def _grid(cfg):
  return np.mgrid[: cfg.height, : cfg.width] + 0.5


def _rgb(ycc):
  return (ycc @ RGB_OF_YCC.T).astype(np.float32)
