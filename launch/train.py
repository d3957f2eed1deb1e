"""Trains one phase: python launch/train.py --config=configs/bouncing.py:teacher"""

from absl import app
from absl import logging
from ml_collections import config_flags

from hiar_jax import train

_CONFIG = config_flags.DEFINE_config_file('config', lock_config=True)


def main(argv):
  del argv
  logging.set_verbosity(logging.INFO)
  train.train(_CONFIG.value)


if __name__ == '__main__':
  app.run(main)
