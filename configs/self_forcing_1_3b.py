"""Self-Forcing at full size, the block-first baseline of HiAR.

Weights, prompts, trajectories and the student's start are those of hiar_1_3b;
its commands first, and then

  hiar-jax train --config=self_forcing_1_3b
  hiar-jax export --config=self_forcing_1_3b --out=self_forcing

The order of denoising is what differs, and there is no forward KL, so that no
trajectory is read.
"""

import ml_collections

from hiar_jax.configs import hiar_1_3b


def get_config() -> ml_collections.ConfigDict:
  """The distillation alone."""
  c = hiar_1_3b.get_config('distill')
  c.name = 'self_forcing_1_3b'
  c.workdir = 'runs/self_forcing_1_3b/distill'
  c.generate.order = 'block_first'
  c.distill.order = 'block_first'
  c.distill.forward_kl_weight = 0.0
  return c
