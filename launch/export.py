"""Makes a folder that hiar_jax.load reads from the weights of a training run.

  hiar-jax export --config=bouncing --out=pipeline

Weights are stored in float16 and computed with in float32; with --with_teacher
also the teacher's, so that a distillation can start from the folder.
"""

import pathlib

import jax.numpy as jnp
from absl import flags

from hiar_jax.denoiser import Denoiser
from hiar_jax.models.config import WanConfig
from hiar_jax.runtime import config_flag, errors
from hiar_jax.sampling import loading
from hiar_jax.training import inputs, network_files
from hiar_jax.training import loop as training_loop
from hiar_jax.weights import layouts, networks

_CONFIG = config_flag.define(required=True)
_OUT = flags.DEFINE_string('out', None, 'the folder to make', required=True)
_WEIGHTS = flags.DEFINE_string(
  'weights', None, "the student's; default: those of the config's workdir"
)
_WITH_TEACHER = flags.DEFINE_bool('with_teacher', False, 'add the teacher')


def main(argv):
  del argv
  config = _CONFIG.value
  denoiser = Denoiser(WanConfig(**config.model))
  weights = (
    _WEIGHTS.value or pathlib.Path(config.workdir) / training_loop.WEIGHTS
  )
  params = _load('student', weights, denoiser)
  codec = inputs.open_codec(config)
  out = pathlib.Path(_OUT.value)
  teacher = None
  if _WITH_TEACHER.value:
    teacher = _load('teacher', config.teacher_weights, denoiser)
  loading.export(
    out,
    config=config.to_dict(),
    params=params,
    codec=codec,
    dtype=jnp.float16,
  )
  if teacher is not None:
    networks.save_weights(
      out / layouts.TEACHER_FILE, teacher, dtype=jnp.float16
    )
  for path in sorted(out.iterdir()):
    print(f'wrote {path} ({path.stat().st_size / 2**20:.2f} MiB)')


def _load(name, path, denoiser):
  file = network_files.NetworkFile(
    name, pathlib.Path(path), denoiser, network_files.NetworkConfig()
  )
  return file.load()


if __name__ == '__main__':
  errors.run_main(main)
