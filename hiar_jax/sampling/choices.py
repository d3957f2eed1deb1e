"""What a caller chooses of how a video is made; the rest is the weights' own.

One list of names for `load`, a call, a stream and the flags of `generate`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from hiar_jax import noise_schedule, rollout
from hiar_jax.models import quantised

_TRAIN_STEPS = 1000
_OF_ROLLOUT = (
  *('context', 'window', 'sink', 'positions', 'frames_per_block'),
  'past_dtype',
)


@dataclasses.dataclass(frozen=True)
class Choices:
  """None of a value: as the weights were trained, or their config says.

  Attributes:
    order: one of rollout.ORDERS.
    context: of the past in step-first orders, one of rollout.CONTEXTS.
    window: latent frames that attention sees, own block and sink included.
    sink: first frames that stay visible for ever.
    positions: of the sink, one of rollout.POSITIONS.
    steps: how many, evenly spaced, or their falling indices in (0, 1000]; the
      same for every block.
    shift: of the schedule that the steps are of.
    frames_per_block: latent frames of a block.
    height: of the frames in px, a multiple of 16 for Wan's weights.
    width: likewise.
    past_dtype: 8 bits that the past is held in, one of quantised.KINDS.
    tiles: bands of rows that Wan's VAE decodes a frame in, one after the other:
      the same frames in less memory.

  Raises:
    TypeError: naming a choice that there is not.
    ValueError: naming the value that does not fit.
  """

  order: str | None = None
  context: str | None = None
  window: int | None = None
  sink: int | None = None
  positions: str | None = None
  steps: int | Sequence[int] | None = None
  shift: float | None = None
  frames_per_block: int | None = None
  height: int | None = None
  width: int | None = None
  past_dtype: str | None = None
  tiles: int | None = None

  def __post_init__(self):
    if self.past_dtype not in (None, *quantised.KINDS):
      raise ValueError(
        f'past_dtype={self.past_dtype!r} is not one of {quantised.KINDS}'
      )
    if self.order is not None and self.order not in rollout.ORDERS:
      raise ValueError(f'order={self.order!r} is not one of {rollout.ORDERS}')
    if isinstance(self.steps, int) and not 1 <= self.steps <= _TRAIN_STEPS:
      raise ValueError(f'steps={self.steps} is not in 1..{_TRAIN_STEPS}')
    if self.shift is not None and not self.shift > 0:
      raise ValueError(f'shift={self.shift} is not positive')
    if self.tiles is not None and self.tiles < 1:
      raise ValueError(f'tiles={self.tiles} is below 1')

  @property
  def made(self) -> dict[str, Any]:
    """Those that are not None."""
    return {k: v for k, v in vars(self).items() if v is not None}


def apply(pipeline: Any, **choices: Any) -> Any:
  """A pipeline that is run as chosen; the weights are the same arrays.

  Args:
    pipeline: a VideoPipeline.
    **choices: see `Choices`.

  Raises:
    TypeError, ValueError: see there.
  """
  made = Choices(**choices).made
  changes: dict[str, Any] = {}
  if 'order' in made:
    changes['order'] = made['order']
  schedule = _schedule(pipeline.schedule, made)
  if schedule != pipeline.schedule:
    changes['schedule'] = schedule
  config: dict[str, Any] = {
    name: made[name] for name in _OF_ROLLOUT if name in made
  }
  if 'schedule' in changes:
    config |= levels(schedule)
  if config:
    changes['rollout'] = dataclasses.replace(pipeline.rollout, **config)
  if 'height' in made or 'width' in made:
    changes['denoiser'] = _sized(pipeline, made)
  tiles = made.get('tiles')
  if tiles is None and 'height' in made and hasattr(pipeline.codec, 'tiled'):
    tiles = pipeline.codec.bands.in_turn  # For another height.
  if tiles is not None:
    changes['codec'] = _tiled(
      pipeline.codec, tiles, changes.get('denoiser', pipeline.denoiser)
    )
  return dataclasses.replace(pipeline, **changes) if changes else pipeline


def levels(schedule: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
  """Levels of a RolloutConfig from a config's section 'schedule'."""
  schedule = dict(schedule)
  first = schedule.pop('first_indices', ())
  made = {'levels': noise_schedule.warped_levels(**schedule)}
  schedule['indices'] = first
  made['first_levels'] = (
    noise_schedule.warped_levels(**schedule) if len(first) else ()
  )
  return made


def _schedule(
  schedule: Mapping[str, Any], made: Mapping[str, Any]
) -> Mapping[str, Any]:
  if 'steps' not in made and 'shift' not in made:
    return schedule
  changed = dict(schedule)
  if 'shift' in made:
    changed['shift'] = made['shift']
  if 'steps' in made:
    steps = made['steps']
    if isinstance(steps, int):
      steps = [round(_TRAIN_STEPS * (steps - i) / steps) for i in range(steps)]
    changed['indices'] = tuple(steps)
    changed.pop('first_indices', None)
  return changed


def _tiled(codec: Any, tiles: int, denoiser: Any) -> Any:
  if not hasattr(codec, 'tiled'):
    raise ValueError(
      f"tiles={tiles} goes with Wan's VAE, not with {type(codec).__name__}, "
      'which takes little memory'
    )
  return codec.tiled(tiles, denoiser.config.latent_height)


def _sized(pipeline: Any, made: Mapping[str, Any]) -> Any:
  """The denoiser for frames of another size."""
  model, stride = pipeline.denoiser.config, pipeline.codec.spatial_stride
  sizes = {}
  for name, patch in zip(('height', 'width'), model.patch, strict=True):
    if name not in made:
      continue
    size = made[name]
    if size < 1 or size % (stride * patch):
      raise ValueError(
        f'{name}={size} is not a positive multiple of {stride * patch}'
      )
    sizes[f'latent_{name}'] = size // stride
  return dataclasses.replace(
    pipeline.denoiser, config=dataclasses.replace(model, **sizes)
  )
