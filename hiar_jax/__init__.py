"""Long videos from text by hierarchical denoising, in JAX.

  import hiar_jax

  pipe = hiar_jax.load('bouncing')
  pipe('a large red disc drifting fast over dark blue', num_blocks=28)

`load`, `Video`, `VideoPipeline`, the files of the method and the rooms are
imported when they are first used, so that `import hiar_jax` costs nothing.
"""

import importlib
from typing import Any

__version__ = '0.1.0'

_NAMES = {
  'Video': 'hiar_jax.sampling.video',
  'VideoPipeline': 'hiar_jax.sampling.video_pipeline',
  'load': 'hiar_jax.sampling.loading',
}
_METHOD = {
  'denoiser': 'hiar_jax.denoiser',
  'losses': 'hiar_jax.training.losses',
  'noise_schedule': 'hiar_jax.noise_schedule',
  'rollout': 'hiar_jax.rollout',
}
_ROOMS = (
  'codecs',
  'data',
  'evaluation',
  'models',
  'planning',
  'runtime',
  'sampling',
  'serving',
  'text',
  'training',
  'weights',
)

__all__ = [*_NAMES, *_METHOD, *_ROOMS]


def __getattr__(name: str) -> Any:
  if name in _NAMES:
    return getattr(importlib.import_module(_NAMES[name]), name)
  if name in _METHOD:
    return importlib.import_module(_METHOD[name])
  if name in _ROOMS:
    return importlib.import_module(f'hiar_jax.{name}')
  raise AttributeError(f"module 'hiar_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted([*globals(), *__all__])
