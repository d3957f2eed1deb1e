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
import functools
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.ndimage

from hiar_jax.data import bouncing

# Fewer have no quarters to compare.
MIN_FRAMES = 8

# The least contrast of an object, in units of the colour error: half of what
# the least distinct pair of the world's colours has.
_MIN_CONTRAST = 0.12
# Of the world's own range, how far areas, radii and speeds may be off before
# an object or its motion counts as another thing.
_TOLERANCE = 1.5
# No frame is scored higher, so that one lucky frame does not lift a mean.
_MAX_DB = 60.0
# Of the fit, in px. The measured place and area are within half a pixel.
_STEPS = (0.5, 0.25, 0.12, 0.06)
# Frames measured at once: bounds the memory, whatever the video's length.
_CHUNK = 64
_WORLD = bouncing.WorldConfig()
# No config trains on the scenes of this seed.
_HELD_OUT_SEED = 99


@dataclasses.dataclass(frozen=True, eq=False)
class FrameMeasures:
  """What is seen in each frame, whatever the prompt.

  Attributes:
    background_F3: RGB in [0, 255], the median of the border.
    colour_F3: RGB in [0, 255], the median of the object's inside.
    centre_F2: (y, x) in px, as in `data.bouncing`; the frame's middle if no
      object is visible.
    area_F: px the object covers.
    visible_F: whether there is an object of plausible area and contrast.
  """

  background_F3: np.ndarray
  colour_F3: np.ndarray
  centre_F2: np.ndarray
  area_F: np.ndarray
  visible_F: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class VideoScore:
  """One video against its prompt; NaN where the prompt leaves it open.

  Attributes:
    visible: share of the frames with an object of plausible area.
    background_error: mean over the frames, 0..1.
    colour_error: mean over the frames with an object, 0..1.
    shape: the one of bouncing.SHAPES that fits the video best.
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
    The numbers of `VideoScore` by name, quarters as `ideal_db_q1` ..
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
  for name in _BY_QUARTER:
    quarters = np.stack([getattr(s, f'{name}_by_quarter') for s in scores])
    for quarter in range(4):
      result[f'{name}_q{quarter + 1}'] = _mean(quarters[:, quarter])
    result[f'{name}_drift'] = _mean(quarters[:, 3] - quarters[:, 0])
  return result


def _says_everything(caption: str) -> bool:
  terms = bouncing.parse_prompt(caption)
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
  asked = bouncing.parse_prompt(prompt)
  frames = measure_frames(video_FHWC, cfg)
  best_F = np.argmin(_shape_errors(video_FHWC, frames, cfg), axis=0)
  votes = np.bincount(
    best_F, weights=frames.visible_F, minlength=len(bouncing.SHAPES)
  )
  seen = bouncing.SHAPES[int(np.argmax(votes))]

  db_F = _ideal_db(
    video_FHWC,
    frames,
    asked.shape or seen,
    bouncing.PALETTE.get(asked.colour),
    bouncing.BACKGROUNDS.get(asked.background),
    cfg,
  )
  if asked.shape is None:
    shape_correct_F = np.full(len(video_FHWC), np.nan)
  else:
    is_asked_F = best_F == bouncing.SHAPES.index(asked.shape)
    # A frame without an object does not show the shape asked for.
    shape_correct_F = (is_asked_F & frames.visible_F).astype(np.float64)

  pair_visible = frames.visible_F[1:] & frames.visible_F[:-1]
  steps = np.linalg.norm(np.diff(frames.centre_F2, axis=0), axis=-1)
  steps = np.where(pair_visible, steps, np.nan)
  motion = _median(steps)
  known = steps[pair_visible]
  return VideoScore(
    visible=float(frames.visible_F.mean()),
    background_error=_colour_error(
      frames.background_F3, bouncing.BACKGROUNDS.get(asked.background)
    ),
    colour_error=_colour_error(
      frames.colour_F3[frames.visible_F], bouncing.PALETTE.get(asked.colour)
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


def format_table(results: Mapping[str, Mapping[str, float]]) -> str:
  """Lays out results of `evaluate_prompts`: a row each, numbers side by side.

  Args:
    results: by the name of what was evaluated, e.g. {'student': {...}}.

  Returns:
    Lines of plain text; NaN is shown as '-'.
  """
  label_width = max(map(len, ('', *results)))
  lines = ['  '.join((' ' * label_width, *_COLUMNS))]
  for label, numbers in results.items():
    cells = [label.ljust(label_width)]
    for heading, (name, style) in _COLUMNS.items():
      value = numbers[name]
      cell = '-' if np.isnan(value) else format(value, style)
      cells.append(cell.rjust(len(heading)))
    lines.append('  '.join(cells))
  return '\n'.join(lines)


def measure_frames(
  video_FHWC: np.ndarray, cfg: bouncing.WorldConfig = _WORLD
) -> FrameMeasures:
  """Finds background and object in every frame of a uint8 [F, H, W, 3]."""
  _, h, w, _ = video_FHWC.shape
  areas = [
    _unit_area(shape) * radius**2
    for shape in bouncing.SHAPES
    for radius in (cfg.small_radius[0], cfg.large_radius[1])
  ]
  least, most = min(areas) / _TOLERANCE, max(areas) * _TOLERANCE
  border = np.ones((h, w), bool)
  border[2:-2, 2:-2] = False
  background, colour, centre, area, visible = [], [], [], [], []
  for frame in video_FHWC.astype(np.float32):
    behind = np.median(frame[border], axis=0)
    contrast_HW = _colour_distance(frame, behind)
    # The smallest object covers 2 % of a frame: this is its own contrast,
    # and no single pixel's.
    level = np.quantile(contrast_HW, 0.99)
    mask = _largest_part(contrast_HW > 0.5 * max(level, _MIN_CONTRAST))
    inside = mask & (contrast_HW > 0.8 * level)
    count = mask.sum()
    is_object = level > _MIN_CONTRAST and least < count < most
    background.append(behind)
    area.append(count)
    visible.append(is_object)
    colour.append(np.median(frame[inside], axis=0) if is_object else behind)
    centre.append(
      np.add(scipy.ndimage.center_of_mass(mask * contrast_HW), 0.5)
      if is_object
      else (h / 2, w / 2)
    )
  return FrameMeasures(
    background_F3=np.array(background),
    colour_F3=np.array(colour),
    centre_F2=np.array(centre),
    area_F=np.array(area),
    visible_F=np.array(visible),
  )


def _shape_errors(video_FHWC, frames, cfg):
  """How badly each shape, where the object is, covers what it covers: [S, F].

  No search: a shape of the measured area at the measured place is off by a
  fraction of a pixel, the wrong shape by several.
  """
  return np.stack(
    [
      _by_chunk(
        lambda video, part, shape=shape: _coverage_error(
          _measured_coverage(video, part),
          shape,
          _first_guess(shape, part, cfg),
          cfg,
        ),
        video_FHWC,
        frames,
      )
      for shape in bouncing.SHAPES
    ]
  )


def _ideal_db(video_FHWC, frames, shape, rgb, background_rgb, cfg):
  """PSNR of every frame against the ideal object, fitted to it: [F]."""

  def chunk_db(video, part):
    fit_F3 = _fit(video, part, shape, cfg)
    behind = _asked_or_seen(background_rgb, part.background_F3)
    front = _asked_or_seen(rgb, part.colour_F3)
    cover = _draw(shape, fit_F3, cfg)[..., None]
    ideal = behind + cover * (front - behind)
    mse_F = np.mean((video - ideal) ** 2, axis=(1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(mse_F, 1e-9))

  return np.minimum(_by_chunk(chunk_db, video_FHWC, frames), _MAX_DB)


def _fit(video_FHWC, frames, shape, cfg):
  """Moves and scales a shape, one coordinate at a time: (y, x, radius) [F, 3].

  A frame without an object keeps its guess: fitted to nothing, the shape would
  shrink, and a missing object would cost next to nothing.
  """
  cover_FHW = _measured_coverage(video_FHWC, frames)
  fit_F3 = _first_guess(shape, frames, cfg)
  least_F = _coverage_error(cover_FHW, shape, fit_F3, cfg)
  for step in _STEPS:
    for move in (*np.eye(3), *-np.eye(3)):
      candidate_F3 = _within_bounds(fit_F3 + step * move, cfg)
      error_F = _coverage_error(cover_FHW, shape, candidate_F3, cfg)
      better = (error_F < least_F) & frames.visible_F
      fit_F3 = np.where(better[:, None], candidate_F3, fit_F3)
      least_F = np.where(better, error_F, least_F)
  return fit_F3


def _first_guess(shape, frames, cfg):
  """A shape of the measured area at the measured place: [F, 3]."""
  usual = (cfg.small_radius[0] + cfg.large_radius[1]) / 2
  radius_F = np.sqrt(frames.area_F / _unit_area(shape))
  radius_F = np.where(frames.visible_F, radius_F, usual)
  guess_F3 = np.concatenate([frames.centre_F2, radius_F[:, None]], axis=1)
  return _within_bounds(guess_F3, cfg)


def _within_bounds(fit_F3, cfg):
  radius = np.clip(
    fit_F3[:, 2:],
    cfg.small_radius[0] / _TOLERANCE,
    cfg.large_radius[1] * _TOLERANCE,
  )
  return np.concatenate([fit_F3[:, :2], radius], axis=1)


def _coverage_error(cover_FHW, shape, fit_F3, cfg):
  return np.mean((_draw(shape, fit_F3, cfg) - cover_FHW) ** 2, axis=(1, 2))


def _by_chunk(function, video_FHWC, frames):
  """Applies function(video, measures) to a few frames at a time: [F]."""
  results = []
  for begin in range(0, len(video_FHWC), _CHUNK):
    part = slice(begin, begin + _CHUNK)
    measures = FrameMeasures(
      **{
        field.name: getattr(frames, field.name)[part]
        for field in dataclasses.fields(frames)
      }
    )
    results.append(function(video_FHWC[part], measures))
  return np.concatenate(results)


def _measured_coverage(video_FHWC, frames):
  """Share of the object's colour in each pixel: [F, H, W] in [0, 1]."""
  axis_F3 = (frames.colour_F3 - frames.background_F3).astype(np.float32)
  # Where nothing is seen the axis is zero, and so is the share.
  axis_F3 /= np.maximum(np.sum(axis_F3**2, axis=-1, keepdims=True), 1.0)
  behind = frames.background_F3[:, None, None].astype(np.float32)
  share_FHW = np.einsum('fhwc,fc->fhw', video_FHWC - behind, axis_F3)
  return np.clip(share_FHW, 0, 1)


def _draw(shape, fit_F3, cfg):
  return bouncing.coverage(
    shape, fit_F3[:, :2], fit_F3[:, 2], height=cfg.height, width=cfg.width
  )


def _asked_or_seen(rgb, seen_F3):
  """Colours [F or 1, 1, 1, 3]: the prompt's, else the frame's own."""
  colours = seen_F3 if rgb is None else np.array([rgb])
  return colours[:, None, None].astype(np.float32)


@functools.cache
def _unit_area(shape: str) -> float:
  """Area of a shape of radius 1, from a large drawing of it."""
  cover = bouncing.coverage(
    shape, np.array([[64.0, 64.0]]), 60.0, height=128, width=128
  )
  return float(cover.sum()) / 60.0**2


def _largest_part(mask):
  """The largest connected part of a mask; specks elsewhere are not it."""
  # Diagonal neighbours count: a thin ring must not fall apart.
  parts, count = scipy.ndimage.label(mask, structure=np.ones((3, 3)))
  if count == 0:
    return mask
  sizes = np.bincount(parts.ravel())
  return parts == 1 + np.argmax(sizes[1:])


def _colour_distance(a, b):
  return np.linalg.norm(np.subtract(a, b), axis=-1) / np.sqrt(3 * 255**2)


def _colour_error(colours_F3, asked_rgb):
  if asked_rgb is None:
    return float('nan')
  return _mean(_colour_distance(colours_F3, np.array(asked_rgb)))


def _is_motion(motion, asked, cfg):
  # Between the words lies the middle of the gap between their ranges.
  between = (cfg.slow_speed[1] + cfg.fast_speed[0]) / 2
  low = between if asked == 'fast' else cfg.slow_speed[0] / _TOLERANCE
  high = between if asked == 'slowly' else cfg.fast_speed[1] * _TOLERANCE
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
