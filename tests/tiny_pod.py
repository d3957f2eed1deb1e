"""`tests/tiny.py` on a mesh over all devices of all processes.

hiar-jax train --config=tests/tiny_pod.py:distill,/tmp/tiny
"""

import ml_collections

from tests import tiny


def get_config(arguments: str) -> ml_collections.ConfigDict:
  """'phase,root' from the command line."""
  c = tiny.get_config(arguments)
  c.mesh = dict(data=-1)
  # Small programs: a test compiles them several times.
  c.schedule.indices = (1000, 500)
  c.rollout_blocks = (1, 1)
  c.distill.update(dict(forward_kl_weight=0.0, forward_kl_steps=2))
  return c
