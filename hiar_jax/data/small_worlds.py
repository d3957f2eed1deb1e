"""What the small worlds of moving shapes have in common.

A world is a module with a frozen config of ranges, `sample_scene`, which draws
a scene's truth from (seed, index), and `render`. Here is how chance is drawn,
how a shape covers pixels, and the sources of captions and videos by number that
the seams of `training.inputs` take.

F frames, H height, W width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from hiar_jax.runtime import provenance

SHAPES = ('disc', 'square', 'triangle', 'ring')

# Of a shape's radius: the half side of the square, the hole of the ring.
_SQUARE_HALF_SIDE = 0.85
_RING_HOLE = 0.5


def uniforms(seed: int, index: int, num: int) -> np.ndarray:
  """`num` uniform numbers of scene `index` of the world `seed`.

  The draw is counter based (Philox keyed by seed and index): it does not depend
  on what was drawn before, nor on the process or host.

  Raises:
    ValueError: if seed or index is not in [0, 2**64).
  """
  if not (0 <= seed < 2**64 and 0 <= index < 2**64):
    raise ValueError(f'seed={seed} and index={index} must be in [0, 2**64)')
  key = np.array([seed, index], np.uint64)
  # Plain uniform numbers only: numpy keeps their stream fixed across versions,
  # but not that of its derived distributions.
  return np.random.Generator(np.random.Philox(key=key)).random(num)


def pick(options: tuple[str, ...], u: float) -> str:
  """One of the options, by a uniform number."""
  return options[int(u * len(options))]


def between(bounds: tuple[float, float], u: float) -> float:
  """A number of [low, high), by a uniform one."""
  return float(bounds[0] + (bounds[1] - bounds[0]) * u)


def coverage(
  shape: str,
  positions_F2: np.ndarray,
  radius: float | np.ndarray,
  *,
  height: int,
  width: int,
  edge: float = 1.0,
) -> np.ndarray:
  """The share of each pixel that a shape covers, from its signed distance.

  Args:
    shape: one of SHAPES.
    positions_F2: centres (y, x) in px.
    radius: in px, a number or one per frame [F].
    height: of the frame in px.
    width: of the frame in px.
    edge: px over which it fades.

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
  return np.clip(np.float32(0.5) - distance / np.float32(edge), 0, 1)


@dataclasses.dataclass(frozen=True)
class Captions:
  """Captions of a world's scenes by number; see `data.prompts.Prompts`.

  Attributes:
    world: config of what the scenes are drawn from.
    seed: of the scenes; another seed is another (held-out) set.
    length: number of them.
    source: the world's name, of the class.
  """

  world: Any
  seed: int
  length: int = 2**20

  source: ClassVar[str]

  def scene(self, index: int) -> Any:
    """The truth, caption included, of element `index`."""
    raise NotImplementedError

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, index: int) -> Any:
    return self.scene(index).caption

  def identity(self) -> dict[str, Any]:
    """Without the length: more than are used change nothing."""
    world = provenance.jsonable(self.world)
    return {'source': self.source, 'world': world, 'seed': self.seed}


def video_shape(world: Any) -> tuple[int, int, int, int]:
  """(F, H, W, 3) of a world's videos."""
  return (world.num_frames, world.height, world.width, 3)


def scene_options(
  world: type,
  config: Mapping[str, Any],
  *,
  seed: int | None = None,
  length: int = 2**20,
) -> dict[str, Any]:
  """Arguments of a source, from a config.

  Args:
    world: class of the world's config.
    config: its section `world`, and `world_seed`, the seed unless given.
    seed: of the scenes.
    length: number of them.
  """
  return {
    'world': world(**config['world']),
    'seed': config['world_seed'] if seed is None else seed,
    'length': length,
  }
