"""Makes a folder that hiar_jax.load reads from the weights of a training run.

  hiar-jax export --config=bouncing --out=pipeline

The student goes beside what it was trained with: a codec of the config's own,
or the VAE and the text encoder of the converted folder that `codec.folder`
names. Weights of the former kind are stored in float16 and computed with in
float32; with --with_teacher also the teacher's, so that a distillation can
start from the folder. Those of the latter are float32, as they were trained,
unless --dtype says otherwise; `hiar-jax convert --to` writes such a folder as
other programs want it.
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
from hiar_jax.weights import conversion, layouts, networks, student_export

_CONFIG = config_flag.define(required=True)
_OUT = flags.DEFINE_string('out', None, 'the folder to make', required=True)
_WEIGHTS = flags.DEFINE_string(
  'weights', None, "the student's; default: those of the config's workdir"
)
_DTYPE = flags.DEFINE_enum(
  'dtype',
  None,
  conversion.DTYPES,
  'of the stored weights; default: float16, or float32 beside a codec.folder',
)
_WITH_TEACHER = flags.DEFINE_bool('with_teacher', False, 'add the teacher')


def main(argv):
  del argv
  config = _CONFIG.value
  reads = {*loading.SECTIONS, 'prompts', 'workdir'}
  if 'codec' in config:
    # A linear codec that is not there is fitted to videos.
    reads |= {*inputs.read_by_codec(config)}
  if _WITH_TEACHER.value:
    reads.add('teacher_weights')
  config_flag.refuse_overrides_but(*reads)
  weights = (
    _WEIGHTS.value or pathlib.Path(config.workdir) / training_loop.WEIGHTS
  )
  out = pathlib.Path(_OUT.value)
  if 'folder' in config.get('codec', {}):
    if _WITH_TEACHER.value:
      raise ValueError('--with_teacher: teachers have folders of their own')
    student_export.write(
      out,
      weights=weights,
      config=config.to_dict(),
      base=config.codec.folder,
      dtype=_DTYPE.value,
    )
  else:
    _with_own_codec(config, weights, out)
  for path in sorted(out.iterdir()):
    print(f'wrote {path} ({path.stat().st_size / 2**20:.2f} MiB)')


def _with_own_codec(config, weights, out):
  denoiser = Denoiser(WanConfig(**config.model))
  dtype = jnp.dtype(_DTYPE.value or 'float16')
  params = _load('student', weights, denoiser)
  codec = inputs.open_codec(config)
  teacher = None
  if _WITH_TEACHER.value:
    teacher = _load('teacher', config.teacher_weights, denoiser)
  loading.export(
    out,
    config=config.to_dict(),
    params=params,
    codec=codec,
    dtype=dtype,
  )
  if teacher is not None:
    networks.save_weights(out / layouts.TEACHER_FILE, teacher, dtype=dtype)


def _load(name, path, denoiser):
  file = network_files.NetworkFile(
    name, pathlib.Path(path), denoiser, network_files.NetworkConfig()
  )
  return file.load()


if __name__ == '__main__':
  errors.run_main(main)
