"""What the phases of training are made of.

Here configs become frozen dataclasses; a misspelt key fails with its name, and
missing inputs of a phase fail before anything is compiled.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, TypeAlias

import grain
import jax
import jax.numpy as jnp
import ml_collections
import optax

from hiar_jax import noise_schedule, rollout
from hiar_jax.data import sources, trajectories
from hiar_jax.models import sharding
from hiar_jax.models.config import WanConfig
from hiar_jax.text import encoders
from hiar_jax.training import inputs, network_files
from hiar_jax.training import state as training_state

Config: TypeAlias = ml_collections.ConfigDict


@dataclasses.dataclass(frozen=True)
class Phase:
  """What the loop runs.

  Attributes:
    state: first state.
    step: (state, batch, iteration) -> (state, metrics).
    batches: endless checkpointable iterator.
    weights: picks the tree to export from the last state.
    save_adapters: writes the adapters of the last state to a LoRA file, called
      by all processes; None: the phase trains none.
    flops: of a mean iteration, all devices together, see training/flops.py;
      None if not known.
    tokens: latent tokens of the videos of a mean iteration, each counted once
      whatever is done with it; None if it has none.
  """

  state: Any
  step: Callable[[Any, dict, int], tuple[Any, dict]]
  batches: grain.DatasetIterator
  weights: Callable[[Any], Any]
  save_adapters: Callable[[Any, pathlib.Path], None] | None = None
  flops: float | None = None
  tokens: float | None = None


# --- Sections.


def rollout_config(config: Config) -> rollout.RolloutConfig:
  """How the student's blocks are denoised."""
  levels = noise_schedule.warped_levels(
    config.schedule.indices, config.schedule.shift
  )
  made = rollout.RolloutConfig(levels=levels, **config.rollout)
  if made.positions != 'absolute' or made.first_levels:
    raise ValueError(
      "a student is trained with rollout.positions='absolute' and the same "
      f'levels for all blocks, not with positions={made.positions!r} and '
      f'first_levels={made.first_levels}'
    )
  if made.past_dtype is not None:
    raise ValueError(
      'a student is trained with the past in the dtype of its passes, not with '
      f'rollout.past_dtype={made.past_dtype!r}'
    )
  return made


def trajectory_source(
  config: Config, encoder: encoders.Encoder
) -> trajectories.TrajectorySource:
  """The teacher's trajectories, held to the student's own levels and blocks."""
  student = rollout_config(config)
  source = trajectories.TrajectorySource(
    config.trajectories.dir,
    trajectories.point_levels(trajectory_config(config), student.levels),
    trajectory_config(config),
    made_with=trajectory_provenance(config, encoder),
  )
  num_frames = source.manifest.latents_shape[1]
  if num_frames % student.frames_per_block:
    raise ValueError(
      f'trajectories in {config.trajectories.dir} have {num_frames} frames, '
      f'not a multiple of frames_per_block={student.frames_per_block}'
    )
  return source


def trajectory_config(config: Config) -> trajectories.TrajectoryConfig:
  """How the teacher's trajectories are sampled."""
  c = config.trajectories
  return trajectories.TrajectoryConfig(
    num_steps=c.num_steps,
    shift=c.shift,
    guidance=c.guidance,
    points=c.points,
    solver=c.get('solver', 'euler'),
  )


def trajectory_provenance(
  config: Config, encoder: encoders.Encoder
) -> dict[str, str]:
  """What a set of trajectories has to be of, see `TrajectorySource`."""
  teacher = network_files.find(config, 'trajectory_teacher', 'teacher')
  return {
    'negative_prompt': inputs.negative_prompt(config, encoder),
    'text': encoder.identity,
    'teacher': teacher.digest(),
  }


def latent_frames(config: Config) -> int:
  """Latent frames of a video of the training.

  Raises:
    ValueError: if the config has neither trajectories nor videos.
  """
  if 'num_frames' in config.get('trajectories', {}):
    return config.trajectories.num_frames
  if 'videos' not in config:
    raise ValueError(
      f'the {config.phase} config has no trajectories.num_frames, the latent '
      'frames of a video'
    )
  return inputs.latent_frames(
    inputs.open_bare_videos(config), inputs.open_codec(config)
  )


# --- On one device, or on a mesh over all of them.


def open_mesh(
  config: Config, models: dict[str, WanConfig], *, microbatches: int = 1
) -> jax.sharding.Mesh | None:
  """The mesh that the config asks for, None without a section `mesh`.

  Args:
    config: of the phase.
    models: the networks by what errors call them.
    microbatches: parts that a batch is taken in.

  Raises:
    ValueError: if devices, networks or the batch do not divide.
  """
  if 'mesh' not in config:
    return None
  mesh = sharding.make_mesh(sharding.MeshConfig(**config.mesh))
  for name, model in models.items():
    sharding.check_model(name, model, mesh)
  sharding.check_batch(config.batch_size, microbatches, mesh)
  return mesh


def open_batches(
  config: Config, source: Any, mesh: jax.sharding.Mesh | None
) -> grain.DatasetIterator:
  """This process's rows of the batches, see `sources.batches`."""
  shard, num_shards = (0, 1) if mesh is None else sharding.batch_share(mesh)
  return sources.batches(
    source,
    batch_size=config.batch_size,
    seed=config.seed,
    shard_index=shard,
    num_shards=num_shards,
  )


def make_optimiser(
  config: Config, iterations: int
) -> optax.GradientTransformation:
  """The optimiser of a config's section, see `state.make_optimiser`."""
  return training_state.make_optimiser(
    training_state.OptimiserConfig(**config), iterations
  )


def init_net(
  params: Any, optimiser: Any, mesh: jax.sharding.Mesh | None
) -> training_state.NetState:
  """A network at the start of its training, in its places."""
  if mesh is None:
    return training_state.init_net(params, optimiser)
  opt_state = sharding.make(optimiser.init, mesh, params)
  return training_state.NetState(params, opt_state)


def regression_state(
  params: Any, optimiser: Any, mesh: jax.sharding.Mesh | None = None
) -> training_state.RegressionState:
  """The first state of a phase with one network."""
  return training_state.RegressionState(
    iteration=sharding.put(jnp.zeros((), jnp.int32), mesh),
    net=init_net(params, optimiser, mesh),
    ema=training_state.copy(params),
  )
