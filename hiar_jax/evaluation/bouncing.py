"""How well a video keeps its prompt, measured: the bouncing world only.

Because a scene is a shape of one colour over a flat background, a generated
video can be measured without a learned judge. Every frame is read on its own
(background, object, place), the four shapes are compared with what was found,
and the prompt says which of them, in which colours, it should have been.

Colour errors are Euclidean RGB distances, 0 = equal, 1 = black against white.
Quarters are those of the video's length; drift = last minus first quarter.

F frames, H height, W width.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hiar_jax.data import bouncing, bouncing_words, small_worlds
from hiar_jax.evaluation import bouncing_frames, tables

# Fewer have no quarters to compare.
MIN_FRAMES = 8

_WORLD = bouncing.WorldConfig()
# No config trains on the scenes of this seed.
_HELD_OUT_SEED = 99


@dataclasses.dataclass(frozen=True, eq=False)
class VideoScore:
  """One video against its prompt; NaN where the prompt leaves it open.

  Attributes:
    visible: share of the frames with an object of plausible area.
    background_error: mean over the frames, 0..1.
    colour_error: mean over the frames with an object, 0..1.
    shape: the one of small_worlds.SHAPES that fits the video best.
    shape_correct: share of the frames in which the prompt's shape fits best.
    motion: median step of the centre, px per frame; NaN without an object.
    motion_correct: 1.0 if it moves at all, as fast as the prompt says, or
      0.0.
    steadiness: share of the steps within 25 % and 0.25 px of the median; a
      bounce is a short step.
    ideal_db: mean over the frames of the PSNR against the prompt's own
      object, drawn at the place and size that fit the frame, in the prompt's
      colours; what the prompt leaves open is taken from the frame. A frame
      without an object is compared with one of middling size at its centre.
      At most 60.
    ideal_db_by_quarter: [4].
    motion_by_quarter: [4].
    shape_correct_by_quarter: [4].
  """

  visible: float
  background_error: float
  colour_error: float
  shape: str
  shape_correct: float
  motion: float
  motion_correct: float
  steadiness: float
  ideal_db: float
  ideal_db_by_quarter: np.ndarray
  motion_by_quarter: np.ndarray
  shape_correct_by_quarter: np.ndarray


def held_out_scenes(
  cfg: bouncing.WorldConfig, num: int
) -> list[bouncing.Scene]:
  """Scenes of no training set, with captions that say everything.

  So every number of `VideoScore` is defined.
  """
  scenes = (
    bouncing.sample_scene(cfg, _HELD_OUT_SEED, index)
    for index in itertools.count()
  )
  full = (scene for scene in scenes if _says_everything(scene.caption))
  return list(itertools.islice(full, num))


def evaluate_prompts(
  videos: Sequence[np.ndarray],
  prompts: Sequence[str],
  cfg: bouncing.WorldConfig = _WORLD,
) -> dict[str, float]:
  """Means over videos, each scored against its own prompt.

  Args:
    videos: uint8 [F, H, W, 3] each; lengths may differ.
    prompts: as many.
    cfg: the world; its num_frames plays no part.

  Returns:
    The numbers of `VideoScore` by name, `no_video`, how many are none of this
    world, quarters as `ideal_db_q1` ..
    `ideal_db_q4`, and their drift as `ideal_db_drift`. A number that no
    prompt asks for is NaN.

  Raises:
    ValueError: if there are no videos, or not as many as prompts.
  """
  if not len(videos) or len(videos) != len(prompts):
    raise ValueError(f'{len(videos)} videos for {len(prompts)} prompts')
  scores = [
    evaluate_video(video, prompt, cfg)
    for video, prompt in zip(videos, prompts, strict=True)
  ]
  result = {
    name: _mean([getattr(score, name) for score in scores]) for name in _SCALARS
  }
  result['no_video'] = sum(not _is_of_world(score.visible) for score in scores)
  for name in _BY_QUARTER:
    quarters = np.stack([getattr(s, f'{name}_by_quarter') for s in scores])
    for quarter in range(4):
      result[f'{name}_q{quarter + 1}'] = _mean(quarters[:, quarter])
    result[f'{name}_drift'] = _mean(quarters[:, 3] - quarters[:, 0])
  return result


def open_measures(config: Mapping[str, Any]) -> 'SampleMeasures':
  """For `evaluation.measures`.

  Args:
    config: of a phase; has `world` and `world_seed`.

  Raises:
    ValueError: if it is of another world.
  """
  missing = {'world', 'world_seed'} - {*config}
  if missing:
    raise ValueError(
      "measures='bouncing' needs the small world's "
      f'{" and ".join(sorted(missing))} in the config'
    )
  return SampleMeasures(
    bouncing.WorldConfig(**config['world']), config['world_seed']
  )


@dataclasses.dataclass(frozen=True)
class SampleMeasures:
  """Scores of videos against captions of the world.

  Attributes:
    cfg: the world.
    seed: of the training's scenes.
  """

  cfg: bouncing.WorldConfig
  seed: int

  def prompts(self, count: int) -> tuple[str, ...]:
    """Captions of the next seed: as the training's, but none of its scenes."""
    return tuple(
      bouncing.sample_scene(self.cfg, self.seed + 1, index).caption
      for index in range(count)
    )

  def measure(
    self, videos_BFHWC: np.ndarray, prompts: Sequence[str]
  ) -> dict[str, float]:
    """Means of `_SAMPLED`; {} of short videos or of another size."""
    size = (self.cfg.height, self.cfg.width)
    if videos_BFHWC.shape[2:4] != size or videos_BFHWC.shape[1] < MIN_FRAMES:
      return {}
    measured = evaluate_prompts(list(videos_BFHWC), prompts, self.cfg)
    return {name: measured[name] for name in _SAMPLED}


def open_scores(config: Mapping[str, Any]) -> 'HeldOutScores':
  """For `evaluation.measures`.

  Raises:
    ValueError: if the config is of another world.
  """
  if 'world' not in config:
    raise ValueError(
      "measures='bouncing' needs the small world's world in the config"
    )
  return HeldOutScores(bouncing.WorldConfig(**config['world']))


@dataclasses.dataclass(frozen=True)
class HeldOutScores:
  """Videos against captions of `held_out_scenes`; see `measures.Scores`.

  Attributes:
    cfg: the world.
  """

  cfg: bouncing.WorldConfig
  reads: tuple[str, ...] = ('world',)

  def prompts(self, count: int) -> tuple[str, ...]:
    return tuple(scene.caption for scene in held_out_scenes(self.cfg, count))

  def true_videos(
    self, count: int, num_frames: int | None = None
  ) -> np.ndarray:
    cfg = dataclasses.replace(
      self.cfg, num_frames=num_frames or self.cfg.num_frames
    )
    scenes = held_out_scenes(cfg, count)
    return np.stack([bouncing.render(scene, cfg) for scene in scenes])

  def score(
    self, videos: Sequence[np.ndarray], prompts: Sequence[str]
  ) -> dict[str, float]:
    return evaluate_prompts(videos, prompts, self.cfg)

  def table(self, rows: Mapping[str, Mapping[str, float]]) -> str:
    return format_table(rows)


def _says_everything(caption: str) -> bool:
  terms = bouncing_words.parse_prompt(caption)
  return all(getattr(terms, f.name) for f in dataclasses.fields(terms))


def evaluate_video(
  video_FHWC: np.ndarray, prompt: str, cfg: bouncing.WorldConfig = _WORLD
) -> VideoScore:
  """Scores one video, uint8 [F, H, W, 3], against its prompt.

  Raises:
    ValueError: if the video is not uint8 RGB of the world's size, or has
      fewer than 8 frames.
  """
  video_FHWC = np.asarray(video_FHWC)
  _check_video(video_FHWC, cfg)
  asked = bouncing_words.parse_prompt(prompt)
  frames = bouncing_frames.measure_frames(video_FHWC, cfg)
  best_F = np.argmin(
    bouncing_frames.shape_errors(video_FHWC, frames, cfg), axis=0
  )
  votes = np.bincount(
    best_F, weights=frames.visible_F, minlength=len(small_worlds.SHAPES)
  )
  seen = small_worlds.SHAPES[int(np.argmax(votes))]

  db_F = bouncing_frames.ideal_db(
    video_FHWC,
    frames,
    asked.shape or seen,
    _rgb(bouncing.PALETTE, asked.colour),
    _rgb(bouncing.BACKGROUNDS, asked.background),
    cfg,
  )
  if asked.shape is None:
    shape_correct_F = np.full(len(video_FHWC), np.nan)
  else:
    is_asked_F = best_F == small_worlds.SHAPES.index(asked.shape)
    # A frame without an object does not show the shape asked for.
    shape_correct_F = (is_asked_F & frames.visible_F).astype(np.float64)

  pair_visible = frames.visible_F[1:] & frames.visible_F[:-1]
  steps = np.linalg.norm(np.diff(frames.centre_F2, axis=0), axis=-1)
  steps = np.where(pair_visible, steps, np.nan)
  # Of noise, where something is seen now and then, nothing moves.
  if not _is_of_world(frames.visible_F.mean()):
    steps[:] = np.nan
    pair_visible[:] = False
  motion = _median(steps)
  known = steps[pair_visible]
  return VideoScore(
    visible=float(frames.visible_F.mean()),
    background_error=_colour_error(
      frames.background_F3, _rgb(bouncing.BACKGROUNDS, asked.background)
    ),
    colour_error=_colour_error(
      frames.colour_F3[frames.visible_F], _rgb(bouncing.PALETTE, asked.colour)
    ),
    shape=seen,
    shape_correct=_mean(shape_correct_F),
    motion=motion,
    motion_correct=float(_is_motion(motion, asked.motion, cfg)),
    steadiness=_mean(np.abs(known - motion) <= 0.25 * motion + 0.25),
    ideal_db=_mean(db_F),
    ideal_db_by_quarter=_by_quarter(_mean, db_F),
    motion_by_quarter=_by_quarter(_median, steps),
    shape_correct_by_quarter=_by_quarter(_mean, shape_correct_F),
  )


def _is_of_world(visible: float) -> bool:
  """Whether a video shows an object on a flat background most of the time."""
  return visible >= 0.5


def format_table(results: Mapping[str, Mapping[str, float]]) -> str:
  """Lays out results of `evaluate_prompts`: a row each, numbers side by side.

  Args:
    results: by the name of what was evaluated, e.g. {'student': {...}}.

  Returns:
    Lines of plain text; NaN is shown as '-'.
  """
  lines = tables.format_rows(_COLUMNS, results)
  for label, numbers in results.items():
    if numbers['no_video']:
      lines.append(
        f'{label}: {numbers["no_video"]:.0f} videos are none of this world: no '
        'object on a flat background in most of their frames'
      )
  return '\n'.join(lines)


def _rgb(
  colours: Mapping[str, tuple[int, int, int]], name: str | None
) -> tuple[int, int, int] | None:
  return None if name is None else colours[name]


def _colour_error(colours_F3, asked_rgb):
  if asked_rgb is None:
    return float('nan')
  return _mean(bouncing_frames.colour_distance(colours_F3, np.array(asked_rgb)))


def _is_motion(motion, asked, cfg):
  # Between the words lies the middle of the gap between their ranges.
  between = (cfg.slow_speed[1] + cfg.fast_speed[0]) / 2
  low = (
    between
    if asked == 'fast'
    else cfg.slow_speed[0] / bouncing_frames.TOLERANCE
  )
  high = (
    between
    if asked == 'slowly'
    else cfg.fast_speed[1] * bouncing_frames.TOLERANCE
  )
  return low <= motion <= high


def _by_quarter(reduce, values):
  return np.array([reduce(part) for part in np.array_split(values, 4)])


def _mean(values):
  values = np.asarray(values, np.float64)
  values = values[~np.isnan(values)]
  return float(values.mean()) if values.size else float('nan')


def _median(values):
  values = np.asarray(values, np.float64)
  values = values[~np.isnan(values)]
  return float(np.median(values)) if values.size else float('nan')


def _check_video(video_FHWC, cfg):
  expected = (cfg.height, cfg.width, 3)
  if video_FHWC.dtype != np.uint8 or video_FHWC.shape[1:] != expected:
    raise ValueError(
      f'a video must be uint8 [F, {cfg.height}, {cfg.width}, 3], not '
      f'{video_FHWC.dtype} {list(video_FHWC.shape)}'
    )
  if len(video_FHWC) < MIN_FRAMES:
    raise ValueError(
      f'a video of {len(video_FHWC)} frames has no quarters to compare; at '
      f'least {MIN_FRAMES} are needed'
    )


_SCALARS = (
  'visible',
  'background_error',
  'colour_error',
  'shape_correct',
  'motion',
  'motion_correct',
  'steadiness',
  'ideal_db',
)
_SAMPLED = (
  'motion',
  'motion_drift',
  'ideal_db',
  'ideal_db_drift',
  'shape_correct',
  'colour_error',
)
_BY_QUARTER = ('ideal_db', 'motion', 'shape_correct')
_COLUMNS = {
  'visible': ('visible', '.2f'),
  'backgr. err': ('background_error', '.3f'),
  'colour err': ('colour_error', '.3f'),
  'shape ok': ('shape_correct', '.2f'),
  'px/frame': ('motion', '.2f'),
  'motion ok': ('motion_correct', '.2f'),
  'steady': ('steadiness', '.2f'),
  'ideal dB': ('ideal_db', '.1f'),
  'dB drift': ('ideal_db_drift', '+.1f'),
  'px drift': ('motion_drift', '+.2f'),
}
