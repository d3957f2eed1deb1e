"""Samples the teacher's trajectories that the student is trained on.

  hiar-jax trajectories --config=bouncing

Kill it and start it again: it goes on with the files that are missing. SIGTERM
finishes the batch under way, drops its file and ends with status 143. The
processes of a pod, found as in `hiar-jax train`, share the files among them; so
do any others with --shard_index=0 --num_shards=4 and so on. They never wait for
each other: one that was killed is started again alone. --verify re-reads every
trajectory.

A teacher that is larger than a host: --config.trajectories.together=True
samples every batch on the devices of all processes, as `trajectories.mesh`
divides them.
"""

import dataclasses
import itertools
import math
import pathlib

import jax
import ml_collections
import tqdm
from absl import flags

from hiar_jax import noise_schedule
from hiar_jax.data import trajectories, trajectory_files
from hiar_jax.models import sharding
from hiar_jax.runtime import (
  config_flag,
  distributed,
  errors,
  shares,
  stopping,
)
from hiar_jax.sampling import trajectories as sampling_trajectories
from hiar_jax.training import inputs, network_files, phase_parts

_CONFIG = config_flag.define(required=True)
_WEIGHTS = flags.DEFINE_string(
  'weights', None, "The teacher's weights; default: the config's."
)
_OUT = flags.DEFINE_string(
  'out', None, 'Folder of the trajectories; default: trajectories.dir.'
)
_NUM = flags.DEFINE_integer(
  'num', None, 'How many; default: trajectories.num. A set may grow later.'
)
shares.define_flags()
_VERIFY = flags.DEFINE_bool('verify', False, 'Re-read everything instead.')


def _open_mesh(settings: ml_collections.ConfigDict) -> jax.sharding.Mesh | None:
  """The devices that share every batch: this process's, or all."""
  together = settings.get('together', False)
  devices = jax.devices() if together else jax.local_devices()
  if together and 'mesh' not in settings:
    raise ValueError(
      'trajectories.together=True: trajectories.mesh has to say how the '
      f'{len(devices)} devices of all processes are divided'
    )
  if 'mesh' in settings:
    return sharding.make_mesh(sharding.MeshConfig(**settings.mesh), devices)
  # As many as divide it, each with a teacher of its own.
  count = math.gcd(len(devices), settings.batch_size)
  if count == 1:
    return None
  return sharding.make_mesh(sharding.MeshConfig(data=count), devices[:count])


def _sample(config: ml_collections.ConfigDict, out: pathlib.Path) -> None:
  settings = config.trajectories
  together = settings.get('together', False)
  if together:
    share = shares.all_together()
  else:
    share = shares.by_flags()
  mesh = _open_mesh(settings)
  teacher = network_files.find(config, 'trajectory_teacher', 'teacher')
  if _WEIGHTS.value is not None:
    teacher = dataclasses.replace(teacher, path=pathlib.Path(_WEIGHTS.value))
  model = teacher.denoiser.config
  if mesh is not None:
    sharding.check_model('the teacher', model, mesh)
  prompts = inputs.open_prompts(config)
  encoder = inputs.open_text(config, mesh)
  params = teacher.load(mesh)
  manifest = trajectories.make_manifest(
    phase_parts.trajectory_config(config),
    noise_schedule.warped_levels(
      config.schedule.indices, config.schedule.shift
    ),
    model,
    params,
    prompts=prompts.identity(),
    num_prompts=len(prompts),
    num=settings.num if _NUM.value is None else _NUM.value,
    shard_size=settings.shard_size,
    seed=settings.seed,
    num_frames=phase_parts.latent_frames(config),
    negative_prompt=inputs.negative_prompt(config, encoder),
    text=encoder.identity,
    teacher=teacher.digest(),
  )
  missing = manifest.missing(out, **share._asdict())
  manifest.settle(out)  # Refuses a folder that has others.
  total = sum(len(manifest.indices(shard)) for shard in missing)
  print(
    f'{out}: {total} of {manifest.num} trajectories to sample, '
    f'{len(manifest.levels) - 1} steps each; {share}, '
    f'devices {1 if mesh is None else mesh.size}',
    flush=True,
  )
  batches = itertools.count(1)
  with (
    stopping.StopSignals(together=together) as stop,
    tqdm.tqdm(
      total=total,
      unit='trajectory',
      dynamic_ncols=True,
      smoothing=0.05,
      disable=together and not distributed.is_writer(),
    ) as bar,
  ):
    done = sampling_trajectories.make(
      out,
      manifest,
      teacher.denoiser,
      params,
      prompts,
      inputs.open_states(config, prompts, encoder),
      inputs.negative_states(config, encoder),
      batch_size=settings.batch_size,
      mesh=mesh,
      progress=bar.update,
      should_stop=lambda: stop.requested(next(batches)),
      **share._asdict(),
    )
    if not done:
      stop.leave()


def _verify(out: pathlib.Path) -> None:
  problems = trajectory_files.verify(out)
  if problems:
    print('\n'.join(problems))
    raise ValueError(
      f'{out} has {len(problems)} problems; delete the damaged files and '
      'sample again'
    )
  print(f'{out}: {trajectory_files.Manifest.read(out).num} trajectories, whole')


def main(argv):
  del argv
  config = _CONFIG.value
  if 'trajectories' not in config:
    raise ValueError(f'the {config.phase} config has no trajectories')
  out = pathlib.Path(
    config.trajectories.dir if _OUT.value is None else _OUT.value
  )
  if _VERIFY.value:
    _verify(out)
  else:
    _sample(config, out)


if __name__ == '__main__':
  errors.run_main(main)
