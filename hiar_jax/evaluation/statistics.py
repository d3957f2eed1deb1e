"""What any video shows without a judge, and how much of it drifts.

Every number is read from the pixels: nothing is learnt and no prompt is known.
Frames are taken one at a time, so an hour or 4K costs no more memory than two
frames.

  of a frame   saturation   mean HSV saturation, 0..1
               sharpness    variance of the Laplacian (4 neighbours) of the
                            luma in 0..255
               contrast     standard deviation of the luma, 0..1
               colour       mean luma and chroma (Y, Cb, Cr), 0..1, -.5...5
  of two in    similarity   correlation of their lumas, -1..1
  a row        difference   mean absolute difference of their pixels, 0..1
               motion       mean displacement of the 5 % of blocks that move
                            most, in % of the shorter side, see
                            `evaluation.motion`

Drift follows the score of the HiAR paper in shape: five equal segments, six
numbers in each, the slope of a line through the five, slopes normalised and
summed with weights. The paper's are MUSIQ, CLIP-IQA, the cosine of DINOv2 and
LPIPS of consecutive frames, saturation and sharpness; its normaliser and its
weights were not published. Ours are the six below, and so are the normaliser
and the weights: its numbers and ours do not compare.

A frozen video has no drift, a grey one neither. So a drift never comes alone:
`Summary` has motion and what stands for quality beside it.

F frames, P = F - 1 pairs, K segments.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from hiar_jax.evaluation import motion

SEGMENTS = 5
# Two in each segment, so that each has a pair of its own.
MIN_FRAMES = 2 * SEGMENTS
# A change this large counts as 1. What has a zero is compared with its own mean
# over the video, but with no less than the floor given here; the mean colour
# and the similarity, which have none, with what is a great change to the eye.
DRIFT_FLOORS = {
  'saturation': 0.05,
  'sharpness': 10.0,
  'contrast': 0.02,
  'difference': 0.005,
}
DRIFT_SCALES = {'colour': 0.1, 'similarity': 0.1}
_DRIFTING = (*DRIFT_FLOORS, *DRIFT_SCALES)
# Equal, and in all 1.
DRIFT_WEIGHTS = dict.fromkeys(_DRIFTING, 1 / len(_DRIFTING))
# Of the video, at each end, as Helios compares them.
END_SHARE = 0.15

# Of the videos that training samples: drift with what it must be read beside.
SAMPLED = (
  *('motion', 'motion_drift', 'sharpness', 'contrast', 'saturation'),
  *('similarity', 'jump', 'drift'),
)

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
# Blocks are matched at this many px of the shorter side, or fewer.
_MOTION_SIDE = 128
_MOVING_SHARE = 0.05


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
  """The numbers of every frame and pair of one video; units at the top.

  Attributes:
    height: of a frame, in px.
    width: likewise.
    saturation: [F].
    sharpness: [F].
    contrast: [F].
    colour: [F, 3].
    similarity: [P].
    difference: [P].
    motion: [P].
  """

  height: int
  width: int
  saturation: np.ndarray
  sharpness: np.ndarray
  contrast: np.ndarray
  colour: np.ndarray
  similarity: np.ndarray
  difference: np.ndarray
  motion: np.ndarray

  @property
  def num_frames(self) -> int:
    return len(self.saturation)

  def by_segment(self, count: int = SEGMENTS) -> dict[str, np.ndarray]:
    """Means over equal parts of the video, [K] or [K, 3] by name."""
    return {name: parts(getattr(self, name), count) for name in SERIES}


SERIES = tuple(
  field.name
  for field in dataclasses.fields(Statistics)
  if field.name not in ('height', 'width')
)


@dataclasses.dataclass(frozen=True)
class Summary:
  """One video in a row of numbers.

  Attributes:
    num_frames: of the video.
    motion: mean over the video, % of the shorter side a frame.
    sharpness: mean over the video; with contrast and saturation what stands
      for quality where nothing is learnt.
    contrast: likewise.
    saturation: likewise.
    similarity: likewise.
    difference: likewise.
    jump: how far the greatest difference of two frames in a row is above the
      median one, 0..1: a cut, a thing that is suddenly elsewhere or gone.
    drift: the paper's score in shape, 0 = none; see `drift_parts`.
    drift_ends: the same sum over |first 15 % - last 15 %|.
    drift_first: the same sum over |segment - first segment|, mean of the four.
    drift_parts: what each of the six gives to `drift`, by name; they sum up
      to it.
    motion_drift: slope of the motion over the segments, as last minus first,
      divided by the mean motion: -1 is a video that comes to rest.
  """

  num_frames: int
  motion: float
  sharpness: float
  contrast: float
  saturation: float
  similarity: float
  difference: float
  jump: float
  drift: float
  drift_ends: float
  drift_first: float
  drift_parts: dict[str, float]
  motion_drift: float


def measure(frames: Iterable[np.ndarray]) -> Statistics:
  """Measures a video frame by frame.

  Args:
    frames: uint8 [H, W, 3], all of one size, such as an array [F, H, W, 3] or
      a `runtime.frame_reader.FrameReader`.

  Raises:
    ValueError: if there are fewer than MIN_FRAMES frames, or a frame is of
      another type or size, or smaller than 16x16.
  """
  numbers: dict[str, list[float]] = {name: [] for name in SERIES}
  before, shape = None, None
  for index, frame in enumerate(frames):
    frame = np.asarray(frame)
    shape = shape or frame.shape
    _check_frame(frame, shape, index)
    after = _Frame(frame)
    for name in ('saturation', 'sharpness', 'contrast', 'colour'):
      numbers[name].append(getattr(after, name)())
    if before is not None:
      numbers['similarity'].append(_correlation(before.luma, after.luma))
      numbers['difference'].append(_difference(before.frame, after.frame))
      numbers['motion'].append(_motion(before, after))
    before = after
  count = len(numbers['saturation'])
  if count < MIN_FRAMES:
    raise ValueError(
      f'{count} frame{"" if count == 1 else "s"}; at least {MIN_FRAMES} are '
      f'needed, two in each of {SEGMENTS} segments'
    )
  assert shape is not None  # There were frames.
  return Statistics(
    height=shape[0],
    width=shape[1],
    **{name: np.array(values, np.float64) for name, values in numbers.items()},
  )


def parts(values: np.ndarray, count: int = SEGMENTS) -> np.ndarray:
  """Means over so many equal parts of a series: [K] or [K, C]."""
  return np.stack([p.mean(axis=0) for p in np.array_split(values, count)])


def rise(segments: np.ndarray) -> np.ndarray:
  """Of the straight line through [K] or [K, C] segments, from first to last."""
  line = np.arange(len(segments)) - (len(segments) - 1) / 2
  return (len(segments) - 1) * np.tensordot(line, segments, 1) / np.sum(line**2)


def of_frame(frame: np.ndarray) -> dict[str, float]:
  """The numbers of one frame by itself, uint8 [H, W, 3]; by name.

  Raises:
    ValueError: see `measure`.
  """
  _check_frame(frame, frame.shape, 0)
  measured = _Frame(frame)
  return {
    name: getattr(measured, name)()
    for name in ('saturation', 'sharpness', 'contrast')
  }


def of_pair(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
  """The numbers of one frame, and of it and the one before; by name.

  Those of `Statistics` but for the colour, for curves of a video that is being
  made.

  Args:
    before: uint8 [H, W, 3].
    after: likewise.

  Raises:
    ValueError: see `measure`.
  """
  for index, frame in enumerate((before, after)):
    _check_frame(frame, before.shape, index)
  first, second = _Frame(before), _Frame(after)
  return {
    'saturation': second.saturation(),
    'sharpness': second.sharpness(),
    'contrast': second.contrast(),
    'similarity': _correlation(first.luma, second.luma),
    'difference': _difference(before, after),
    'motion': _motion(first, second),
  }


def summarise(statistics: Statistics) -> Summary:
  """The row of numbers of one video."""
  means = {name: getattr(statistics, name).mean() for name in SERIES}
  segments = statistics.by_segment()
  rises = {name: rise(values) for name, values in segments.items()}
  ends = {
    name: _end(getattr(statistics, name), -1)
    - _end(getattr(statistics, name), 0)
    for name in _DRIFTING
  }
  from_first = [
    sum(
      _weighted({n: v[k] - v[0] for n, v in segments.items()}, means).values()
    )
    for k in range(1, SEGMENTS)
  ]
  drift_parts = _weighted(rises, means)
  difference = statistics.difference
  return Summary(
    num_frames=statistics.num_frames,
    **{
      name: float(means[name])
      for name in (
        *('motion', 'sharpness', 'contrast'),
        *('saturation', 'similarity', 'difference'),
      )
    },
    jump=float(difference.max() - np.median(difference)),
    drift=sum(drift_parts.values()),
    drift_ends=sum(_weighted(ends, means).values()),
    drift_first=float(np.mean(from_first)),
    drift_parts=drift_parts,
    motion_drift=float(rises['motion'] / means['motion'])
    if means['motion'] > 0
    else 0.0,
  )


def open_measures(config: Any) -> 'SampleMeasures':
  """For `evaluation.measures`; reads nothing of the config."""
  del config
  return SampleMeasures()


class SampleMeasures:
  """The row of numbers, of videos with no known prompts."""

  def prompts(self, count: int) -> tuple[str, ...]:
    """None are known."""
    del count
    return ()

  def measure(
    self, videos_BFHWC: np.ndarray, prompts: tuple[str, ...]
  ) -> dict[str, float]:
    """Means over the videos of `SAMPLED`; {} below MIN_FRAMES."""
    del prompts
    if videos_BFHWC.shape[1] < MIN_FRAMES:
      return {}
    rows = [summarise(measure(video)) for video in videos_BFHWC]
    return {
      name: float(np.mean([getattr(row, name) for row in rows]))
      for name in SAMPLED
    }


def _weighted(changes, means):
  """Each change normalised and weighted, by name."""
  parts = {}
  for name, weight in DRIFT_WEIGHTS.items():
    scale = DRIFT_SCALES.get(name)
    if scale is None:
      scale = max(means[name], DRIFT_FLOORS[name])
    parts[name] = float(weight * np.linalg.norm(changes[name]) / scale)
  return parts


def _end(values, which):
  count = max(1, round(END_SHARE * len(values)))
  part = values[:count] if which == 0 else values[-count:]
  return part.mean(axis=0)


class _Frame:
  """A frame with what several measures need of it."""

  def __init__(self, frame: np.ndarray):
    self.frame = frame
    # A channel at a time: several times faster than along the last axis.
    self._rgb = np.moveaxis(frame, 2, 0)
    self.luma = np.zeros(frame.shape[:2], np.float32)
    for weight, channel in zip(_LUMA, self._rgb, strict=True):
      self.luma += weight * channel
    step = max(1, math.ceil(min(self.luma.shape) / _MOTION_SIDE))
    self.step = step
    self.small = _shrink(self.luma, step)

  def saturation(self) -> float:
    red, green, blue = self._rgb
    most = np.maximum(np.maximum(red, green), blue)
    least = np.minimum(np.minimum(red, green), blue)
    share = np.divide(most - least, np.maximum(most, 1), dtype=np.float32)
    return float(share.mean())

  def sharpness(self) -> float:
    y = self.luma
    laplacian = y[:-2, 1:-1] + y[2:, 1:-1] + y[1:-1, :-2] + y[1:-1, 2:]
    laplacian -= 4 * y[1:-1, 1:-1]
    return float(laplacian.var(dtype=np.float64))

  def contrast(self) -> float:
    return float(self.luma.std(dtype=np.float64)) / 255

  def colour(self) -> np.ndarray:
    # Sums of bytes are exact.
    sums = [channel.sum(dtype=np.int64) for channel in self._rgb]
    red, _, blue = rgb = np.array(sums) / (255 * self.luma.size)
    luma = rgb @ _LUMA
    return np.array([luma, (blue - luma) / 1.772, (red - luma) / 1.402])


def _motion(before, after):
  lengths = motion.displacements(before.small, after.small)
  count = math.ceil(_MOVING_SHARE * len(lengths))
  most = np.partition(lengths, -count)[-count:].mean()
  return float(100 * most / min(before.small.shape))


def _correlation(a, b):
  """Of two pictures; of two without any contrast 1."""
  a, b = a - a.mean(), b - b.mean()
  # A level of 255 over all of the picture is no contrast.
  least = a.size * 0.5**2
  top = float(np.vdot(a, b)) + least
  return top / math.sqrt(
    (float(np.vdot(a, a)) + least) * (float(np.vdot(b, b)) + least)
  )


def _difference(a, b):
  # Of bytes, without a float copy of both.
  return float((np.maximum(a, b) - np.minimum(a, b)).mean()) / 255


def _shrink(luma, step):
  """Means of step x step px; what is left over at the ends is cut."""
  if step == 1:
    return luma
  height, width = (side // step for side in luma.shape)
  return (
    luma[: height * step, : width * step]
    .reshape(height, step, width, step)
    .mean(axis=(1, 3))
  )


def _check_frame(frame, shape, index):
  if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
    raise ValueError(
      f'frame {index} must be uint8 [H, W, 3], not {frame.dtype} '
      f'{list(frame.shape)}'
    )
  if frame.shape != shape:
    raise ValueError(
      f'frame {index} is {frame.shape[0]}x{frame.shape[1]} px, those before '
      f'it are {shape[0]}x{shape[1]}'
    )
  if min(frame.shape[:2]) < 2 * motion.BLOCK:
    raise ValueError(
      f'frames of {frame.shape[0]}x{frame.shape[1]} px are too small to '
      f'measure; at least {2 * motion.BLOCK}x{2 * motion.BLOCK} are needed'
    )
