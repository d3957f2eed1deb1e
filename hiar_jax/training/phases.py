"""The phases of training by name."""

from hiar_jax.training import (
  codec_phase,
  distillation_phase,
  regression_phases,
)
from hiar_jax.training.phase_parts import Config, Phase

_PHASES = {
  'codec': codec_phase.build,
  'teacher': regression_phases.build_teacher,
  'student_start': regression_phases.build_student_start,
  'distill': distillation_phase.build,
}


def build(config: Config) -> Phase:
  """The phase named by `config.phase`.

  Raises:
    ValueError: if the phase is unknown or a value does not fit.
    FileNotFoundError: if something that an earlier phase makes is missing.
  """
  if config.phase not in _PHASES:
    raise ValueError(f'phase {config.phase!r} is not one of {sorted(_PHASES)}')
  for name in ('iterations', 'batch_size', 'log_every', 'checkpoint_every'):
    if config[name] < 1:
      raise ValueError(f'{name}={config[name]} is not at least 1')
  return _PHASES[config.phase](config)
