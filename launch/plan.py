"""Tells whether a config fits TPUs or GPUs, without having them.

  hiar-jax plan --config=hiar_1_3b --topology v5e:2x2
  hiar-jax plan --config=hiar_1_3b --topology h100:1x1x4

Compiles the streaming tick for that topology on this machine, which needs the
extra `tpu` and no TPU, or `plan-cuda` and no GPU, and prints what a chip has to
hold and to do, and how long that takes at best. Compiling takes half a minute
of one core. `--part=vae`, `--part=tiny_vae` and `--part=text` compile the
decoding of a block and the encoding of a prompt for one chip instead.

`--part=generator` and `critic` compile what training runs on all chips, divided
as `config.mesh` says; `--part=training` both steps, and sums them up.
`--part=trajectory` is the sampling of `config.trajectories` by the chips that
work together: give the topology of one host, or of all with `together`.

  hiar-jax plan --config=hiar_1_3b --topology v5p:4x4x4 \\
    --part=training --config.mesh.context=2
  hiar-jax plan --config=hiar_1_3b --topology v5p:2x2x1 --part=trajectory
"""

import dataclasses
import os

# Before jax is loaded: with libtpu installed it would look for a TPU.
os.environ['JAX_PLATFORMS'] = 'cpu'

from absl import flags

from hiar_jax.denoiser import Denoiser
from hiar_jax.models import sharding, umt5, vae
from hiar_jax.models.config import WanConfig
from hiar_jax.planning import parts as planning_parts
from hiar_jax.planning import programs
from hiar_jax.planning import stream as planning_stream
from hiar_jax.planning import training as planning_training
from hiar_jax.runtime import config_flag, errors
from hiar_jax.sampling import choice_flags, meshes, streaming
from hiar_jax.training import distillation_phase, network_files, phase_parts
from hiar_jax.weights import held

_CONFIG = config_flag.define(required=True)
_TOPOLOGY = flags.DEFINE_string(
  'topology',
  None,
  'chip and shape, such as v5p:2x2x1, or h100:1x1x4 for four GPUs of one '
  "host; default: the config's",
)
# What of a config each part is made from.
_READS = {
  'stream': ('name', 'model', 'schedule', 'rollout', 'plan'),
  'vae': (
    'rollout.frames_per_block',
    'model.latent_height',
    'model.latent_width',
    'plan.topology',
    'plan.weights_dtype',
  ),
  'tiny_vae': (
    'rollout.frames_per_block',
    'model.latent_height',
    'model.latent_width',
    'plan.topology',
  ),
  'text': ('model.text_len', 'plan.topology', 'plan.weights_dtype'),
}
_READS_OF_TRAINING = (
  *('name', 'model', 'schedule', 'rollout', 'plan.topology', 'teacher'),
  *('distill', 'optimiser', 'critic_optimiser', 'iterations', 'batch_size'),
  *('rollout_blocks', 'trajectories', 'mesh', 'teacher_weights'),
  *('critic', 'critic_weights', 'lora'),
  *('trajectory_teacher', 'trajectory_teacher_weights'),
)
_PART = flags.DEFINE_enum(
  'part',
  'stream',
  ('stream', 'vae', 'tiny_vae', 'text', 'training', *programs.PARTS),
  'what is compiled',
)
_MODE = flags.DEFINE_enum(
  'mode', 'batched', streaming.MODES, 'of a stream on one chip'
)
_TILES = flags.DEFINE_integer(
  'tiles', 1, 'with --part=vae: bands of rows that are decoded in turn', 1
)
_DECODE = flags.DEFINE_integer(
  'decode', 1, 'with --part=vae: chips that share the rows', 1
)
_HELD = choice_flags.HeldFlags()
_MESH = flags.DEFINE_string(
  'mesh',
  None,
  'of a stream: how the chips are divided, such as stage=2,tensor=2; default: '
  'into stages alone',
)


def main(argv):
  del argv
  config = _CONFIG.value
  if 'plan' not in config:
    raise ValueError(
      f'config {config.name!r} has no section plan, as hiar_1_3b has'
    )
  config_flag.refuse_overrides_but(*_READS.get(_PART.value, _READS_OF_TRAINING))
  settings = config.plan.to_dict()
  topology = _TOPOLOGY.value or settings['topology']
  chosen = {k: v for k, v in _HELD.weights.items() if v is not None}
  past = _HELD.past.get('past_dtype')
  if _PART.value != 'stream' and (chosen or past or _MESH.value):
    raise ValueError(
      '--weights_dtype, --products_dtype, --past_dtype and --mesh go with '
      '--part=stream'
    )
  if _PART.value == 'stream':
    settings |= chosen
    plan = planning_stream.plan_tick(
      Denoiser(WanConfig(**config.model)),
      dataclasses.replace(phase_parts.rollout_config(config), past_dtype=past),
      **(settings | {'topology': topology, 'mode': _MODE.value}),
      mesh=None if _MESH.value is None else meshes.parse(_MESH.value),
    )
    weights = held.Held(settings['weights_dtype'], chosen.get('products_dtype'))
    print(
      f'{config.name}, {settings["batch_size"]} video, {weights}'
      f'{"" if past is None else f", past in {past}"}, attention '
      f'{config.model.attention!r}\n'
    )
  elif _PART.value == 'vae':
    plan = planning_parts.plan_vae_decode(
      vae.VAEConfig.wan(),
      topology,
      frames=config.rollout.frames_per_block,
      latent_height=config.model.latent_height,
      latent_width=config.model.latent_width,
      weights_dtype=settings['weights_dtype'],
      tiles=_TILES.value,
      decode=_DECODE.value,
    )
  elif _PART.value == 'tiny_vae':
    plan = planning_parts.plan_tiny_vae_decode(
      topology,
      frames=config.rollout.frames_per_block,
      latent_height=config.model.latent_height,
      latent_width=config.model.latent_width,
    )
  elif _PART.value != 'text':
    _plan_training(config, topology)
    return
  else:
    plan = planning_parts.plan_text_encoder(
      umt5.UMT5Config.xxl(),
      topology,
      tokens=config.model.text_len,
      weights_dtype=settings['weights_dtype'],
    )
  print(plan.table())


def _plan_training(config, topology):
  """Prints the table of every part asked for as soon as it is known."""
  sampled = network_files.find(config, 'trajectory_teacher', 'teacher')
  training = programs.Training(
    steps=distillation_phase.distillation(config),
    mesh=sharding.MeshConfig(**config.mesh),
    batch_size=config.batch_size,
    num_blocks=config.rollout_blocks[1],
    iterations=config.iterations,
    teacher_dtype=config.teacher.dtype,
    trajectory=phase_parts.trajectory_config(config),
    trajectory_batch=config.trajectories.batch_size,
    trajectory_teacher=sampled.denoiser,
    trajectory_dtype=sampled.config.dtype,
    # As `hiar-jax trajectories` does: else every chip has a teacher of its own.
    trajectory_mesh=sharding.MeshConfig(
      **config.trajectories.get('mesh', {'data': -1})
    ),
  )
  parts = (_PART.value,)
  if _PART.value == 'training':
    parts = ('generator', 'critic')
  print(
    f'{config.name}, {training.trajectory_batch} trajectories at a time'
    if parts == ('trajectory',)
    else f'{config.name}, {training.batch_size} videos in '
    f'{training.microbatches} parts'
  )
  plans = []
  for part in parts:
    plans.append(planning_training.plan_part(training, part, topology))
    print(f'\n{plans[-1].table()}', flush=True)
  if len(plans) == 2:
    print(f'\n{planning_training.summary(*plans)}')


if __name__ == '__main__':
  errors.run_main(main)
