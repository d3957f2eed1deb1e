"""Trains one phase, from its last checkpoint if there is one.

python launch/train.py --config=configs/bouncing.py:teacher
"""

from ml_collections import config_flags

from hiar_jax import distributed, errors, train

_CONFIG = config_flags.DEFINE_config_file('config', lock_config=True)
distributed.define_flags()


def main(argv):
  del argv
  distributed.start_by_flags()
  train.train(_CONFIG.value)


if __name__ == '__main__':
  errors.run_main(main)
