"""`wan_tiny` on a mesh over all devices of all processes: eight of them.

hiar-jax train --config=tests/wan_tiny_pod.py:distill,FOLDER
"""

import ml_collections

from hiar_jax.configs import wan_tiny


def get_config(arguments: str) -> ml_collections.ConfigDict:
  """'phase,folder'; all four axes divide something in one phase or another.

  'phase,folder,live': text is encoded while training runs.
  """
  phase, folder, *live = arguments.split(',')
  c = wan_tiny.get_config(f'{phase},{folder}')
  if live == ['live']:
    del c.states
  c.mesh = dict(data=1, fsdp=2, tensor=2, context=2)
  if c.phase == 'student_start':
    c.mesh = dict(data=2, fsdp=2, tensor=2, context=1)
  # Over those of one process.
  c.trajectories.mesh = dict(data=1, fsdp=2, tensor=2, context=-1)
  return c
