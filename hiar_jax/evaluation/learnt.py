"""What learnt judges say of any video, and how much of that drifts.

The HiAR paper's drift is of MUSIQ, CLIP-IQA, the cosine of DINOv2 and the LPIPS
distance of frames in a row, saturation and sharpness. The first, second and
fourth come from pyiqa, the third from timm: PyTorch, which only the process of
`hiar-jax evaluate learnt` imports, and weights that these libraries fetch on
first use. Its normaliser and weights were not published; ours are those of
`statistics`, so that its numbers and ours do not compare.

N frames of a batch, S frames that are looked at, K parts of a video.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from hiar_jax.evaluation import folders, statistics
from hiar_jax.runtime import frame_reader

PAPER = ('musiq', 'clipiqa', 'dinov2', 'lpips')
_DINOV2 = 'vit_small_patch14_dinov2.lvd142m'
_MISSING = (
  'judges need pyiqa and timm: pip install "hiar_jax[learnt]" (into an '
  'environment of its own, if it should not share one with JAX)'
)
# A change as large as the judge's mean over the video counts as 1, or as large
# as this where the mean is smaller, or by itself a great change to the eye.
_FLOORS = {'musiq': 5.0, 'clipiqa': 0.05, 'lpips': 0.005}
_SCALES = {'dinov2': 0.1}
_BATCH = 16
_VERSION = 1
# Of the frame, by rule and not by a judge; the paper's other two.
_BY_RULE = ('saturation', 'sharpness')


class Judge(NamedTuple):
  """A model that gives a frame, or two in a row, a number.

  name: of it.
  of_pairs: whether it is asked about frames and those after them.
  ask: [N] numbers of uint8 frames [N, H, W, 3], and as many after them if it
    is of pairs.
  """

  name: str
  of_pairs: bool
  ask: Callable[..., np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Judged:
  """One video.

  Attributes:
    name: of the file, without the ending.
    path: of the file.
    means: over the frames that were looked at, by judge; saturation and
      sharpness too.
    drift: sum of `drift_parts`, 0 = none.
    drift_parts: by the same names: the rise of the line through five equal
      segments, normalised, with equal weights.
    curves: by the same names, means over equal parts of the video.
  """

  name: str
  path: pathlib.Path
  means: dict[str, float]
  drift: float
  drift_parts: dict[str, float]
  curves: dict[str, list[float]]

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self) | {'path': str(self.path)}

  @classmethod
  def from_json(cls, fields: dict[str, Any]) -> Self:
    return cls(**(fields | {'path': pathlib.Path(fields['path'])}))


def open_judges(names: Sequence[str], device: str = '') -> list[Judge]:
  """Loads judges, and their weights where they are not there yet.

  Args:
    names: of pyiqa's metrics (of one frame, or of two), or 'dinov2'.
    device: of PyTorch; '': a GPU if there is one.

  Raises:
    ValueError: if the libraries are missing, a name is not known or twice, or
      weights cannot be had.
  """
  if not names or len({*names}) != len(names):
    raise ValueError(f'judges {",".join(names)!r} must be different names')
  try:
    import pyiqa
    import timm
    import torch
  except ImportError as error:
    raise ValueError(f'{_MISSING}; {error}') from error
  known = {*pyiqa.list_models(), 'dinov2'}
  unknown = [name for name in names if name not in known]
  if unknown:
    raise ValueError(
      f'{", ".join(unknown)} is no judge; there are dinov2 and those of pyiqa: '
      f'{", ".join(sorted(known - {"dinov2"}))}'
    )
  place = torch.device(
    device or ('cuda' if torch.cuda.is_available() else 'cpu')
  )
  judges = []
  for name in names:
    try:
      if name == 'dinov2':
        judges.append(_dinov2(timm, torch, place))
      else:
        judges.append(_pyiqa(pyiqa, torch, name, place))
    except (OSError, RuntimeError) as error:
      message = ' '.join(str(error).split())
      raise ValueError(f'judge {name} cannot be loaded: {message}') from error
  return judges


def way(judges: Sequence[Judge], every: int) -> folders.Way[Judged]:
  """How the videos of a folder are measured.

  Args:
    judges: asked, see `open_judges`.
    every: so many frames one is looked at, and with pairs the one after it.

  Raises:
    ValueError: if `every` is not positive.
  """
  if every < 1:
    raise ValueError(f'every={every} must be at least 1')
  names = ','.join(judge.name for judge in judges)

  def measure(path, progress):
    return _measure_file(path, judges, every, progress)

  return folders.Way(f'{_VERSION} {names} {every}', measure, Judged.from_json)


def _measure_file(path, judges, every, progress):
  path = pathlib.Path(path)
  series: dict[str, list] = {
    name: [] for name in (*(j.name for j in judges), *_BY_RULE)
  }
  with frame_reader.FrameReader(path) as reader:
    for frames, after in _batches(_pairs(reader, every, progress)):
      for judge in judges:
        asked = (frames, after) if judge.of_pairs else (frames,)
        series[judge.name].extend(np.asarray(judge.ask(*asked)).ravel())
      for frame in frames:
        told = statistics.of_frame(frame)
        for name in _BY_RULE:
          series[name].append(told[name])
  count = len(series[_BY_RULE[0]])
  if count < statistics.SEGMENTS:
    raise ValueError(
      f'{path}: {count} frame{"" if count == 1 else "s"} to look at, one of '
      f'{every}; {statistics.SEGMENTS} are needed'
    )
  return _judged(path, {n: np.array(v, np.float64) for n, v in series.items()})


def _judged(path, series):
  means = {name: float(values.mean()) for name, values in series.items()}
  parts = {
    name: abs(float(statistics.rise(statistics.parts(values))))
    / _scale(name, means[name])
    / len(series)
    for name, values in series.items()
  }
  points = min(folders.POINTS, len(series[_BY_RULE[0]]))
  return Judged(
    name=path.stem,
    path=path,
    means=means,
    drift=sum(parts.values()),
    drift_parts=parts,
    curves={
      name: statistics.parts(values, points).tolist()
      for name, values in series.items()
    },
  )


def _scale(name, mean):
  if name in _SCALES:
    return _SCALES[name]
  floors = statistics.DRIFT_FLOORS | _FLOORS
  return max(abs(mean), floors.get(name, 1e-3))


def _pairs(frames, every, progress):
  """Each frame that is looked at, with the one after it."""
  for index, (before, after) in enumerate(itertools.pairwise(frames)):
    progress()
    if index % every == 0:
      yield before, after


def _batches(pairs):
  while batch := list(itertools.islice(pairs, _BATCH)):
    yield tuple(np.stack(frames) for frames in zip(*batch, strict=True))


# --- PyTorch.


def _pyiqa(pyiqa, torch, name, device):
  metric = pyiqa.create_metric(name, device=device)

  def ask(*frames):
    with torch.no_grad():
      return metric(*(_tensor(torch, f, device) for f in frames)).cpu().numpy()

  return Judge(name, metric.metric_mode == 'FR', ask)


def _dinov2(timm, torch, device):
  model = timm.create_model(
    _DINOV2, pretrained=True, num_classes=0, img_size=224
  )
  model = model.to(device).eval()
  settings = timm.data.resolve_model_data_config(model)
  mean, std = (
    torch.tensor(settings[key], device=device)[:, None, None]
    for key in ('mean', 'std')
  )

  def features(frames):
    x = torch.nn.functional.interpolate(
      _tensor(torch, frames, device),
      size=(224, 224),
      mode='bicubic',
      antialias=True,
    )
    return torch.nn.functional.normalize(model((x - mean) / std), dim=-1)

  def ask(frames, after):
    with torch.no_grad():
      return (features(frames) * features(after)).sum(-1).cpu().numpy()

  return Judge('dinov2', True, ask)


def _tensor(torch, frames_NHWC, device):
  tensor = torch.from_numpy(np.ascontiguousarray(frames_NHWC)).to(device)
  return tensor.permute(0, 3, 1, 2).float() / 255
