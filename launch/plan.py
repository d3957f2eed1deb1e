"""Tells whether a config's stream fits a TPU pod, without having the pod.

  python launch/plan.py --config=configs/hiar_1_3b.py --topology v5e:2x2

Compiles the streaming tick for that topology on this machine, which needs the
extra `tpu` and no TPU, and prints what a chip has to hold and to do. Compiling
takes half a minute of one core. `--part=vae` and `--part=text` compile the
decoding of a block and the encoding of a prompt for one chip instead.
"""

import os

# Before jax is loaded: with libtpu installed it would look for a TPU.
os.environ['JAX_PLATFORMS'] = 'cpu'

from absl import flags
from ml_collections import config_flags

from hiar_jax import errors, phases, planning, planning_parts
from hiar_jax.denoiser import Denoiser
from hiar_jax.models import umt5, vae
from hiar_jax.models.config import WanConfig

_CONFIG = config_flags.DEFINE_config_file('config', lock_config=True)
flags.mark_flag_as_required('config')
_TOPOLOGY = flags.DEFINE_string(
  'topology', None, "chip and shape, such as v5p:2x2x1; default: the config's"
)
_PART = flags.DEFINE_enum(
  'part', 'stream', ('stream', 'vae', 'text'), 'what is compiled'
)


def main(argv):
  del argv
  config = _CONFIG.value
  if 'plan' not in config:
    raise ValueError(
      f'config {config.name!r} has no section plan, as configs/hiar_1_3b.py has'
    )
  settings = config.plan.to_dict()
  topology = _TOPOLOGY.value or settings['topology']
  if _PART.value == 'stream':
    plan = planning.plan_tick(
      Denoiser(WanConfig(**config.model)),
      phases.rollout_config(config),
      **(settings | {'topology': topology}),
    )
    print(
      f'{config.name}, {settings["batch_size"]} video, weights in '
      f'{settings["weights_dtype"]}, attention {config.model.attention!r}\n'
    )
  elif _PART.value == 'vae':
    plan = planning_parts.plan_vae_decode(
      vae.VAEConfig.wan(),
      topology,
      frames=config.rollout.frames_per_block,
      latent_height=config.model.latent_height,
      latent_width=config.model.latent_width,
      weights_dtype=settings['weights_dtype'],
    )
  else:
    plan = planning_parts.plan_text_encoder(
      umt5.UMT5Config.xxl(),
      topology,
      tokens=config.model.text_len,
      weights_dtype=settings['weights_dtype'],
    )
  print(plan.table())


if __name__ == '__main__':
  errors.run_main(main)
