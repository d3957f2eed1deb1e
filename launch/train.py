"""Trains one phase, from its last checkpoint if there is one.

hiar-jax train --config=bouncing:teacher

SIGTERM saves the iteration under way and ends with status 143; start the same
command again to go on. More --config.iterations, or folders that were moved,
are no other run; a config that learns otherwise is refused unless
--allow_config_change is given, which the checkpoints from then on tell.
"""

import jax
from absl import flags

from hiar_jax.runtime import config_flag, distributed, errors
from hiar_jax.training import loop as training_loop

_CONFIG = config_flag.define(required=True)
_PROFILE = flags.DEFINE_string(
  'profile',
  None,
  'START:COUNT: traces COUNT iterations from iteration START (from 1) on into '
  'workdir/profile.',
)
_STEP_TIMEOUT = flags.DEFINE_float(
  'step_timeout',
  None,
  'Seconds without a finished iteration after which all stacks are printed and '
  'the process exits with status 124; more than the longest compilation.',
)
_ALLOW_CHANGE = flags.DEFINE_bool(
  'allow_config_change',
  False,
  'Goes on with a run although the config changes what it learns.',
)
distributed.define_flags()


def _profile_window() -> tuple[int, int] | None:
  if _PROFILE.value is None:
    return None
  start, _, count = _PROFILE.value.partition(':')
  if not (start.isdecimal() and count.isdecimal()):
    raise ValueError(f'--profile={_PROFILE.value!r} is not START:COUNT')
  return int(start), int(count)


def main(argv):
  del argv
  distributed.start_by_flags()
  if jax.process_count() > 1 and 'mesh' not in _CONFIG.value:
    raise ValueError(
      f'{jax.process_count()} processes, but the {_CONFIG.value.phase} config '
      'has no mesh; train it with --num_processes=1'
    )
  training_loop.train(
    _CONFIG.value,
    profile=_profile_window(),
    step_timeout=_STEP_TIMEOUT.value,
    allow_config_change=_ALLOW_CHANGE.value,
  )


if __name__ == '__main__':
  errors.run_main(main)
