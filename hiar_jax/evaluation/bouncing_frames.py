"""What is seen in single frames of the bouncing world, and how well shapes fit.

Every frame is read on its own: background, object, place. Shapes are drawn
where the object is and compared with what it covers.

F frames, H height, W width, S shapes.
"""

import dataclasses
import functools

import numpy as np
import scipy.ndimage

from hiar_jax.data import bouncing, small_worlds

# The least contrast of an object, in units of the colour error: half of what
# the least distinct pair of the world's colours has.
_MIN_CONTRAST = 0.12
# Of the world's own range, how far areas, radii and speeds may be off before
# an object or its motion counts as another thing.
TOLERANCE = 1.5
# No frame is scored higher, so that one lucky frame does not lift a mean.
_MAX_DB = 60.0
# Of the fit, in px. The measured place and area are within half a pixel.
_STEPS = (0.5, 0.25, 0.12, 0.06)
# Frames measured at once: bounds the memory, whatever the video's length.
_CHUNK = 64
_WORLD = bouncing.WorldConfig()


@dataclasses.dataclass(frozen=True, eq=False)
class FrameMeasures:
  """What is seen in each frame, whatever the prompt.

  Attributes:
    background_F3: RGB in [0, 255], the median of the border.
    colour_F3: RGB in [0, 255], the median of the object's inside.
    centre_F2: (y, x) in px, as in `data.bouncing`; the frame's middle if no
      object is visible.
    area_F: px the object covers.
    visible_F: whether there is an object of plausible area and contrast, over
      a flat background.
  """

  background_F3: np.ndarray
  colour_F3: np.ndarray
  centre_F2: np.ndarray
  area_F: np.ndarray
  visible_F: np.ndarray


def measure_frames(
  video_FHWC: np.ndarray, cfg: bouncing.WorldConfig = _WORLD
) -> FrameMeasures:
  """Finds background and object in every frame of a uint8 [F, H, W, 3]."""
  _, h, w, _ = video_FHWC.shape
  areas = [
    _unit_area(shape) * radius**2
    for shape in small_worlds.SHAPES
    for radius in (cfg.small_radius[0], cfg.large_radius[1])
  ]
  least, most = min(areas) / TOLERANCE, max(areas) * TOLERANCE
  border = np.ones((h, w), bool)
  border[2:-2, 2:-2] = False
  background, colour, centre, area, visible = [], [], [], [], []
  for frame in video_FHWC.astype(np.float32):
    behind = np.median(frame[border], axis=0)
    contrast_HW = colour_distance(frame, behind)
    # The smallest object covers 2 % of a frame: this is its own contrast,
    # and no single pixel's.
    level = np.quantile(contrast_HW, 0.99)
    mask = _largest_part(contrast_HW > 0.5 * max(level, _MIN_CONTRAST))
    inside = mask & (contrast_HW > 0.8 * level)
    if not inside.any():  # The level is that of something smaller elsewhere.
      inside = mask
    count = mask.sum()
    # An object never fills more than a quarter of the border.
    is_flat = np.quantile(contrast_HW[border], 0.7) < _MIN_CONTRAST
    is_object = level > _MIN_CONTRAST and least < count < most and is_flat
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


def shape_errors(
  video_FHWC: np.ndarray, frames: FrameMeasures, cfg: bouncing.WorldConfig
) -> np.ndarray:
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
      for shape in small_worlds.SHAPES
    ]
  )


def ideal_db(
  video_FHWC: np.ndarray,
  frames: FrameMeasures,
  shape: str,
  rgb: tuple[int, int, int] | None,
  background_rgb: tuple[int, int, int] | None,
  cfg: bouncing.WorldConfig,
) -> np.ndarray:
  """PSNR of every frame against the ideal object, fitted to it: [F].

  Args:
    video_FHWC: uint8.
    frames: what was measured of it.
    shape: of the ideal object.
    rgb: its colour; None: the frame's own.
    background_rgb: likewise.
    cfg: the world.
  """

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
    cfg.small_radius[0] / TOLERANCE,
    cfg.large_radius[1] * TOLERANCE,
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


def colour_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Euclidean, over the last axis: 0 = equal, 1 = black against white."""
  return np.linalg.norm(np.subtract(a, b), axis=-1) / np.sqrt(3 * 255**2)
