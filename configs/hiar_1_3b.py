"""HiAR at full size: Wan2.1-T2V-1.3B, 480x832 pixels, four steps.

python launch/plan.py --config=configs/hiar_1_3b.py --topology v5e:2x2
"""

import dataclasses

import ml_collections

from hiar_jax.models.config import WanConfig


def get_config() -> ml_collections.ConfigDict:
  """The published student's sizes and schedule (arXiv:2603.08703)."""
  c = ml_collections.ConfigDict()
  c.name = 'hiar_1_3b'
  c.seed = 0
  # Scores of 4680 x 32,760 for 12 heads would fill an accelerator.
  c.model = dataclasses.asdict(WanConfig.wan_1_3b(attention='auto'))
  c.schedule = dict(shift=5.0, indices=(1000, 750, 500, 250))
  c.rollout = dict(
    frames_per_block=3, window=21, sink=0, stepping='sde', context='matched'
  )
  c.generate = dict(order='step_first', fps=16.0)
  # One stage to a chip of four.
  c.plan = dict(topology='v5e:2x2', batch_size=1, weights_dtype='bfloat16')
  return c
