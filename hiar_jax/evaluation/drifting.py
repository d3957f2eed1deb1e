"""Who a video stays: identity in the drifting world, against the truth.

The caption says shape and motion. What else a video shows is compared with what
it showed in its own first frames, and, where its first frames were given and
true, with that scene gone on, whose truth is known for every frame:

  hue          of the shape, degrees, 0..180
  gradient     of the ground's two hues, root mean square over the frame, as a
               share of its chroma
  texture      correlation of what is behind the shape, -1..1: angle, period,
               phase and kind at once
  size         of the shape, |log2| of the area's ratio
  speed        |log2| of the ratio of px per frame
  sharpness    |log2| of the ratio of the Laplacian's variance
  saturation   |log2| of the ratio of the shape's chroma

0 is the same, but for the texture, where 1 is. With it what a drift must be
read beside: whether a shape is visible, is the prompt's, and moves as it says.

F frames, H height, W width, K equal parts of a video.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hiar_jax.data import drifting
from hiar_jax.evaluation import drifting_frames, tables

# No config trains on the scenes of this seed.
_HELD_OUT_SEED = 99
# One's own start: so many frames, a block of the package's models.
_START = 3
# Steps are taken over this many frames: a measured place is off by .1 px.
_STRIDE = 3
# Turns a frame that tell a circle from straight lines, radians a stride.
_LEAST_TURN = 0.13
MIN_FRAMES = 2 * _STRIDE + 2

IDENTITY = (
  *('hue', 'gradient', 'texture', 'size', 'speed', 'sharpness', 'saturation'),
)
# The others' curves: what the drift is read beside.
BESIDE = ('visible', 'shape_ok', 'overlap', 'motion')


@dataclasses.dataclass(frozen=True, eq=False)
class Identity:
  """One video; curves are means over K equal parts, numbers over the video.

  Attributes:
    numbers: each of IDENTITY over all but the first part; `visible` and
      `shape_ok`, shares of the frames; `overlap` with the prompt's shape where
      one is seen, intersection over union, 0 where none is; `motion`, px per
      frame; `motion_ok`, 1 if it moves in the prompt's manner and at a speed
      of the world; `semantic`, the mean of `shape_ok` and `motion_ok`.
    curves: each of IDENTITY and BESIDE, [K]; NaN where nothing is visible.
  """

  numbers: dict[str, float]
  curves: dict[str, np.ndarray]


def identity(
  video_FHWC: np.ndarray,
  prompt: str,
  cfg: drifting.WorldConfig,
  *,
  parts: int,
  truth: drifting.Scene | None = None,
) -> Identity:
  """Measures one video, uint8 [F, H, W, 3].

  Args:
    video_FHWC: of the world's size.
    prompt: names shape and motion.
    cfg: the world.
    parts: K, at most a third of the frames.
    truth: of as many frames; None: the video's own start.

  Raises:
    ValueError: if it is of another size, too short, or the prompt names no
      shape or motion.
  """
  count = len(video_FHWC)
  if count < MIN_FRAMES or parts * _STRIDE > count:
    raise ValueError(
      f'a video of {count} frames is too short for {parts} parts of at least '
      f'{_STRIDE} frames, and {MIN_FRAMES} in all'
    )
  shape, motion = drifting.parse_prompt(prompt)
  if shape is None or motion is None:
    raise ValueError(f'{prompt!r} does not name a shape and a motion')
  frames = drifting_frames.measure(video_FHWC, cfg)
  if truth is None:
    reference = _own_start(frames)
  else:
    reference = _true(truth, video_FHWC.shape[0], cfg)
  likeness = drifting_frames.shape_likeness(frames, cfg)
  best = np.stack([likeness[s] for s in drifting.SHAPES]).argmax(0)
  right = (best == drifting.SHAPES.index(shape)) & frames.visible_F
  speed_F = _speed(frames)
  chroma = np.linalg.norm(frames.chroma_F2, axis=-1)

  curves = {
    'hue': _parts(
      drifting_frames.hue_distance(frames.chroma_F2, reference.hue), parts
    ),
    'gradient': _parts(
      drifting_frames.plane_distance(frames.plane_FHW2, reference.plane), parts
    ),
    'texture': _parts(
      drifting_frames.texture_likeness(
        frames, reference.texture, reference.known
      ),
      parts,
    ),
    'size': _ratio(_parts(frames.area_F, parts), reference.area),
    'speed': _ratio(_parts(speed_F, parts, np.nanmedian), reference.speed),
    'sharpness': _ratio(_parts(frames.sharpness_F, parts), reference.sharpness),
    'saturation': _ratio(_parts(chroma, parts), reference.chroma),
    'visible': _parts(frames.visible_F, parts),
    'shape_ok': _parts(right, parts),
    'overlap': _parts(likeness[shape], parts),
    'motion': _parts(speed_F, parts, np.nanmedian),
  }
  numbers = {name: _mean(curves[name][1:]) for name in IDENTITY}
  pace = _median(speed_F)
  numbers |= {
    'visible': float(frames.visible_F.mean()),
    'shape_ok': float(right.mean()),
    'overlap': float(likeness[shape].mean()),
    'motion': pace,
    'motion_ok': float(
      _manner(frames) == motion
      and cfg.speed[0] / drifting_frames.TOLERANCE
      < pace
      < cfg.speed[1] * drifting_frames.TOLERANCE
    ),
  }
  numbers['semantic'] = (numbers['shape_ok'] + numbers['motion_ok']) / 2
  return Identity(numbers, curves)


@dataclasses.dataclass(frozen=True, eq=False)
class _Reference:
  """What a video is compared with; `known`: pixels that show the texture."""

  hue: float
  plane: np.ndarray
  texture: np.ndarray
  known: np.ndarray | None
  area: float
  speed: float
  sharpness: float
  chroma: float


def _own_start(frames):
  first = _cut(frames, slice(_START))
  texture, known = drifting_frames.own_texture(first)
  chroma = np.array([_mean(c) for c in first.chroma_F2.T])
  return _Reference(
    hue=float(np.arctan2(chroma[1], chroma[0]) / (2 * np.pi)),
    plane=first.plane_FHW2.mean(0),
    texture=texture,
    known=known,
    area=_mean(first.area_F),
    # Two strides: less shows no speed.
    speed=_median(_speed(_cut(frames, slice(2 * _STRIDE + 1)))),
    sharpness=float(first.sharpness_F.mean()),
    chroma=float(np.linalg.norm(chroma)),
  )


def _true(scene, count, cfg):
  if len(scene.positions) != count:
    raise ValueError(
      f'a truth of {len(scene.positions)} frames for a video of {count}'
    )
  video = drifting.render(scene, cfg)
  return _Reference(
    hue=scene.hue,
    plane=drifting.gradient(scene, cfg),
    texture=drifting.texture(scene, cfg),
    known=None,
    area=drifting_frames.unit_area(scene.shape) * scene.radius**2,
    speed=scene.speed,
    sharpness=float(drifting_frames.measure(video, cfg).sharpness_F.mean()),
    chroma=drifting.OBJECT_CHROMA,
  )


def _cut(frames, part):
  return drifting_frames.Frames(
    **{
      field.name: getattr(frames, field.name)[part]
      for field in dataclasses.fields(frames)
    }
  )


def _speed(frames):
  """Px per frame around each frame: [F], NaN where it is not seen."""
  centre = frames.centre_F2
  steps = np.linalg.norm(centre[_STRIDE:] - centre[:-_STRIDE], axis=-1)
  # As many as frames: the ends repeat what is next to them.
  before = _STRIDE // 2
  return np.pad(steps / _STRIDE, (before, _STRIDE - before), 'edge')


def _manner(frames):
  """The kind of motion: circling turns all the time, and one way."""
  steps = frames.centre_F2[_STRIDE:] - frames.centre_F2[:-_STRIDE]
  ahead, back = steps[_STRIDE:], steps[:-_STRIDE]
  turn = np.arctan2(
    back[:, 1] * ahead[:, 0] - back[:, 0] * ahead[:, 1],
    np.sum(back * ahead, -1),
  )
  return 'circling' if abs(_median(turn)) > _LEAST_TURN else 'gliding'


def _parts(values, count, reduce=None):
  reduce = _mean if reduce is None else reduce
  with np.errstate(all='ignore'):
    return np.array(
      [
        reduce(part) if np.isfinite(part).any() else np.nan
        for part in np.array_split(np.asarray(values, np.float64), count)
      ]
    )


def _ratio(values, reference):
  # What stands still or is grey is off by a factor, not by infinity.
  reference = max(reference, 1e-6)
  return np.abs(np.log2(np.maximum(values, 0.1 * reference) / reference))


def _mean(values):
  values = np.asarray(values, np.float64)
  values = values[np.isfinite(values)]
  return float(values.mean()) if values.size else float('nan')


def _median(values):
  values = np.asarray(values, np.float64)
  values = values[np.isfinite(values)]
  return float(np.median(values)) if values.size else float('nan')


# --- What programs ask for, see `evaluation.measures`.


def open_scores(config: Mapping[str, Any]) -> 'HeldOutScores':
  """For `evaluation.measures`.

  Raises:
    ValueError: if the config is of another world.
  """
  if 'world' not in config:
    raise ValueError("measures='drifting' needs the world in the config")
  return HeldOutScores(drifting.WorldConfig(**config['world']))


def open_identities(config: Mapping[str, Any]) -> 'HeldOutScores':
  """For `evaluation.measures`; errors as `open_scores`."""
  return open_scores(config)


def open_measures(config: Mapping[str, Any]) -> 'HeldOutScores':
  """For `evaluation.measures`; errors as `open_scores`."""
  return open_scores(config)


@dataclasses.dataclass(frozen=True)
class HeldOutScores:
  """Videos against held-out scenes; see `measures.Scores` and `Identities`.

  Attributes:
    cfg: the world.
  """

  cfg: drifting.WorldConfig
  reads: tuple[str, ...] = ('world',)

  def prompts(self, count: int) -> tuple[str, ...]:
    return tuple(self._scene(i).caption for i in range(count))

  def true_videos(
    self, count: int, num_frames: int | None = None
  ) -> np.ndarray:
    cfg = self._cfg(num_frames)
    return np.stack(
      [drifting.render(self._scene(i, num_frames), cfg) for i in range(count)]
    )

  def identity(
    self, video_FHWC: np.ndarray, number: int, *, parts: int, given: int
  ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    count = len(video_FHWC)
    scene = self._scene(number, count)
    measured = identity(
      *(video_FHWC, scene.caption, self.cfg),
      parts=parts,
      truth=scene if given else None,
    )
    return measured.numbers, measured.curves

  def score(
    self, videos: Sequence[np.ndarray], prompts: Sequence[str]
  ) -> dict[str, float]:
    """Means over videos of `Identity.numbers`, against their own start.

    Raises:
      ValueError: if there are no videos, or not as many as prompts.
    """
    if not len(videos) or len(videos) != len(prompts):
      raise ValueError(f'{len(videos)} videos for {len(prompts)} prompts')
    rows = [
      identity(video, prompt, self.cfg, parts=min(5, len(video) // _STRIDE))
      for video, prompt in zip(videos, prompts, strict=True)
    ]
    return {
      name: _mean([row.numbers[name] for row in rows])
      for name in rows[0].numbers
    }

  def measure(
    self, videos_BFHWC: np.ndarray, prompts: Sequence[str]
  ) -> dict[str, float]:
    """As `score`; {} of short videos or of another size."""
    size = (self.cfg.height, self.cfg.width)
    if videos_BFHWC.shape[2:4] != size or videos_BFHWC.shape[1] < MIN_FRAMES:
      return {}
    return self.score(list(videos_BFHWC), prompts)

  def table(self, rows: Mapping[str, Mapping[str, float]]) -> str:
    return '\n'.join(tables.format_rows(_COLUMNS, rows))

  def _cfg(self, num_frames):
    return dataclasses.replace(
      self.cfg, num_frames=num_frames or self.cfg.num_frames
    )

  def _scene(self, number, num_frames=None):
    return drifting.sample_scene(self._cfg(num_frames), _HELD_OUT_SEED, number)


_COLUMNS = {
  'visible': ('visible', '.2f'),
  'shape ok': ('shape_ok', '.2f'),
  'overlap': ('overlap', '.2f'),
  'px/frame': ('motion', '.2f'),
  'motion ok': ('motion_ok', '.2f'),
  'hue deg': ('hue', '.1f'),
  'gradient': ('gradient', '.3f'),
  'texture': ('texture', '.3f'),
  'size': ('size', '.2f'),
  'speed': ('speed', '.2f'),
  'sharp': ('sharpness', '.2f'),
  'saturat.': ('saturation', '.2f'),
}
