"""Long videos from text by hierarchical denoising, in JAX.

  import hiar_jax

  pipe = hiar_jax.load('bouncing')
  pipe('a large red disc drifting fast over dark blue', num_blocks=28)

`load`, `Video`, `VideoPipeline` and the modules are imported when they are
first used, so that `import hiar_jax` costs nothing.
"""

import importlib

__version__ = '0.1.0'

_FROM_GENERATE = ('Video', 'VideoPipeline', 'load')
_MODULES = (
  'checkpoint',
  'codecs',
  'data',
  'denoiser',
  'evaluation',
  'generate',
  'losses',
  'models',
  'noise_schedule',
  'rollout',
  'solvers',
  'teacher_sampling',
  'text',
  'train',
  'video_io',
  'worlds',
)

__all__ = [*_FROM_GENERATE, *_MODULES]


def __getattr__(name: str):
  if name in _FROM_GENERATE:
    return getattr(importlib.import_module('hiar_jax.generate'), name)
  if name in _MODULES:
    return importlib.import_module(f'hiar_jax.{name}')
  raise AttributeError(f"module 'hiar_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted([*globals(), *__all__])
