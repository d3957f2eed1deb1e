"""What each training phase is made of: first state, step, data.

Here configs become frozen dataclasses; a misspelt key fails with its name, and
missing inputs of a phase fail before anything is compiled.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from hiar_jax import noise_schedule, rollout
from hiar_jax.codecs import linear, pixels
from hiar_jax.codecs import vae as codecs_vae
from hiar_jax.data import bouncing, latent_files, sources, trajectories
from hiar_jax.denoiser import Denoiser
from hiar_jax.models import flops, sharding, vae
from hiar_jax.models.config import WanConfig
from hiar_jax.text import word_hash
from hiar_jax.training import codec as training_codec
from hiar_jax.training import flops as training_flops
from hiar_jax.training import regression
from hiar_jax.training import state as training_state
from hiar_jax.training import steps as training_steps
from hiar_jax.weights import networks

Config = ml_collections.ConfigDict


@dataclasses.dataclass(frozen=True)
class Phase:
  """What the loop runs.

  Attributes:
    state: first state.
    step: (state, batch, iteration) -> (state, metrics).
    batches: endless checkpointable iterator.
    weights: picks the tree to export from the last state.
    flops: of a mean iteration, all devices together, see training/flops.py;
      None if not known.
  """

  state: Any
  step: Callable[[Any, dict, int], tuple[Any, dict]]
  batches: grain.DatasetIterator
  weights: Callable[[Any], Any]
  flops: float | None = None


def build(config: Config) -> Phase:
  """The phase named by `config.phase`.

  Raises:
    ValueError: if the phase is unknown or a value does not fit.
    FileNotFoundError: if something that an earlier phase makes is missing.
  """
  if config.phase not in _PHASES:
    raise ValueError(f'phase {config.phase!r} is not one of {sorted(_PHASES)}')
  for name in ('iterations', 'batch_size', 'log_every', 'checkpoint_every'):
    if config[name] < 1:
      raise ValueError(f'{name}={config[name]} is not at least 1')
  return _PHASES[config.phase](config)


def world_codec(config: Config) -> Any:
  """The small world's codec.

  The VAE, if the config has one, of the phase 'codec'; else a linear codec:
  read if it was fitted before, else fitted.
  """
  path = pathlib.Path(config.codec.path)
  if 'vae' in config:
    return codecs_vae.load_vae_codec(path, vae.VAEConfig(**config.vae))
  if not path.exists():
    codec = linear.fit_linear_codec(
      bouncing.videos(
        bouncing.WorldConfig(**config.world),
        config.codec.seed,
        config.codec.num_videos,
      ),
      channels=config.codec.channels,
      whitening=config.codec.whitening,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    linear.save_linear_codec(codec, path)
  return linear.load_linear_codec(path)


def videos(config: Config) -> bouncing.BouncingVideos:
  """The teacher's training videos."""
  return bouncing.BouncingVideos(
    bouncing.WorldConfig(**config.world),
    word_hash.WordHashEncoder(**config.text),
    seed=config.world_seed,
    caption_dropout=config.caption_dropout,
  )


def latents_manifest(config: Config, codec: Any) -> latent_files.Manifest:
  """What the folder `config.latents.dir` has to hold."""
  return latent_files.Manifest(
    num=config.latents.num,
    shard_size=config.latents.shard_size,
    world=dataclasses.asdict(bouncing.WorldConfig(**config.world)),
    world_seed=config.world_seed,
    codec_sha256=trajectories.weights_sha256(codec.params),
  )


def latent_frames(config: Config) -> int:
  """Frames of the world's videos, as the networks count them."""
  frames = config.world.num_frames
  if 'vae' not in config:
    return frames
  stride = vae.VAEConfig(**config.vae).time_factor
  if frames % stride != 1:
    raise ValueError(f'world.num_frames={frames} is not 1 + {stride} k')
  return 1 + frames // stride


def rollout_config(config: Config) -> rollout.RolloutConfig:
  """How the student's blocks are denoised."""
  levels = noise_schedule.warped_levels(
    config.schedule.indices, config.schedule.shift
  )
  return rollout.RolloutConfig(levels=levels, **config.rollout)


def prompts(config: Config) -> bouncing.BouncingPrompts:
  """The captions of the training scenes."""
  return bouncing.BouncingPrompts(
    bouncing.WorldConfig(**config.world),
    word_hash.WordHashEncoder(**config.text),
    seed=config.world_seed,
  )


def trajectory_source(config: Config) -> trajectories.TrajectorySource:
  """The teacher's trajectories, held to the student's own levels and blocks."""
  student = rollout_config(config)
  source = trajectories.TrajectorySource(
    config.trajectories.dir,
    trajectories.point_levels(trajectory_config(config), student.levels),
    trajectory_config(config),
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
    num_steps=c.num_steps, shift=c.shift, guidance=c.guidance, points=c.points
  )


def load_params(
  path: str,
  denoiser: Denoiser,
  *,
  mesh: jax.sharding.Mesh | None = None,
  dtype: str = 'float32',
) -> Any:
  """Exported weights of an earlier phase, in their places on a mesh."""
  abstract = jax.eval_shape(
    lambda: jax.tree.map(
      lambda a: a.astype(dtype), denoiser.init(jax.random.key(0))
    )
  )
  if mesh is not None:
    abstract = sharding.abstract(abstract, mesh)
  return networks.load_weights(path, abstract)


def _optimiser(config: Config, iterations: int):
  return training_state.make_optimiser(
    training_state.OptimiserConfig(**config), iterations
  )


def _regression_state(params, optimiser) -> training_state.RegressionState:
  return training_state.RegressionState(
    iteration=jnp.zeros((), jnp.int32),
    net=training_state.init_net(params, optimiser),
    ema=training_state.copy(params),
  )


def _regression(params, optimiser, step, batches, iteration_flops) -> Phase:
  return Phase(
    state=_regression_state(params, optimiser),
    step=jax.jit(step, donate_argnums=0),
    batches=batches,
    weights=lambda state: state.ema,
    flops=iteration_flops,
  )


# Every so often the VAE sees whole frames, as many pixels as in the crops.
_WHOLE_EVERY = 4
_STATISTICS_VIDEOS = 64


def _codec(config: Config) -> Phase:
  """The learnt codec: the video VAE on crops and frames of the world."""
  vae_config = vae.VAEConfig(**config.vae)
  numbers = config.codec_training
  optimiser = _optimiser(config.optimiser, config.iterations)
  key = jax.random.key(config.seed)
  source = bouncing.BouncingVideos(
    bouncing.WorldConfig(
      **(config.world.to_dict() | {'num_frames': numbers.num_frames})
    ),
    word_hash.WordHashEncoder(**config.text),
    seed=config.world_seed,
    with_truth=True,
  )
  clips = training_codec.ObjectClips(source, numbers.crop)
  side = min(config.world.height, config.world.width)
  whole_videos = max(1, config.batch_size * numbers.crop**2 // side**2)
  batches = sources.batches(
    clips, batch_size=config.batch_size, seed=config.seed
  )
  update = jax.jit(
    training_codec.make_step(
      vae_config,
      optimiser,
      kl_weight=numbers.kl_weight,
      ema_decay=config.ema_decay,
    ),
    donate_argnums=0,
  )

  def step(state, batch, iteration):
    whole = iteration % _WHOLE_EVERY == _WHOLE_EVERY - 1
    video = batch['video'][:whole_videos] if whole else batch['crop']
    return update(state, video, jax.random.fold_in(key, iteration))

  def weights(state):
    mean_C, std_C = training_codec.statistics(
      vae_config, state.ema, source, num_videos=_STATISTICS_VIDEOS
    )
    return training_codec.fold_statistics(state.ema, mean_C, std_C)

  if numbers.start_weights:
    params = codecs_vae.load_vae_codec(numbers.start_weights, vae_config).params
  else:
    params = training_codec.init(vae_config, key)
  return Phase(
    state=_regression_state(params, optimiser),
    step=step,
    batches=batches,
    weights=weights,
  )


def _teacher(config: Config) -> Phase:
  """Flow matching on videos of the world."""
  denoiser = Denoiser(WanConfig(**config.model))
  optimiser = _optimiser(config.optimiser, config.iterations)
  codec = world_codec(config)
  update = regression.teacher_step(
    denoiser,
    optimiser,
    timestep_shift=config.timestep_shift,
    ema_decay=config.ema_decay,
  )
  key = jax.random.key(config.seed)

  def step(state, batch, iteration):
    if 'latents' not in batch:
      latents = codec.encode(pixels.to_float(batch['video']))
      batch = {'latents': latents, 'text': batch['text']}
    return update(state, batch, jax.random.fold_in(key, iteration))

  source = videos(config)
  if 'latents' in config:
    source = latent_files.EncodedVideos(
      config.latents.dir, latents_manifest(config, codec), source
    )
  batches = sources.batches(
    source, batch_size=config.batch_size, seed=config.seed
  )
  if config.start_weights:
    params = load_params(config.start_weights, denoiser)
  else:
    params = denoiser.init(key)
  frames = latent_frames(config)
  one = flops.forward_flops(denoiser.config, frames, frames)
  iteration = config.batch_size * flops.trained(denoiser.config) * one
  return _regression(params, optimiser, step, batches, iteration)


def _student_start(config: Config) -> Phase:
  """ODE regression from the teacher's weights."""
  denoiser = Denoiser(WanConfig(**config.model))
  optimiser = _optimiser(config.optimiser, config.iterations)
  update = regression.student_start_step(
    denoiser,
    optimiser,
    rollout_config(config),
    context=config.start_context,
    ema_decay=config.ema_decay,
  )
  key = jax.random.key(config.seed)

  def step(state, batch, iteration):
    batch = {'trajectory': batch['latents'], 'text': batch['text']}
    return update(state, batch, jax.random.fold_in(key, iteration))

  params = load_params(config.teacher_weights, denoiser)
  source = trajectory_source(config)
  batches = sources.batches(
    source, batch_size=config.batch_size, seed=config.seed
  )
  frames = source.manifest.latents_shape[1]
  iteration = config.batch_size * training_flops.student_start_flops(
    denoiser.config, rollout_config(config), frames, config.start_context
  )
  return _regression(params, optimiser, step, batches, iteration)


@dataclasses.dataclass(frozen=True)
class PromptsAndTrajectories:
  """Element i of the prompts beside a trajectory, for the forward KL."""

  prompts: bouncing.BouncingPrompts
  trajectories: trajectories.TrajectorySource

  def __len__(self) -> int:
    return len(self.prompts)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    trajectory = self.trajectories[index % len(self.trajectories)]
    return {
      'text': self.prompts[index]['text'],
      'trajectory': trajectory['latents'],
      'trajectory_text': trajectory['text'],
    }


def distillation(config: Config) -> training_steps.Distillation:
  """The networks, optimisers and numbers of the distillation.

  The teacher is a network of the student's size unless the config has a section
  `teacher` with its sizes.
  """
  student = Denoiser(WanConfig(**config.model))
  teacher = student
  if 'teacher' in config:
    teacher = Denoiser(WanConfig(**config.teacher.model))
  numbers = training_steps.DistillConfig(**config.distill)
  updates = -(-config.iterations // numbers.generator_every)
  return training_steps.Distillation(
    student=student,
    critic=student,
    teacher=teacher,
    student_optimiser=_optimiser(config.optimiser, updates),
    critic_optimiser=_optimiser(config.critic_optimiser, config.iterations),
    rollout=rollout_config(config),
    config=numbers,
  )


def _distill_mesh(config: Config, steps: training_steps.Distillation):
  """The mesh that the config asks for, None without a section `mesh`."""
  if 'mesh' not in config:
    return None
  mesh = sharding.make_mesh(sharding.MeshConfig(**config.mesh))
  sharding.check_model('model', steps.student.config, mesh)
  sharding.check_model('teacher', steps.teacher.config, mesh)
  sharding.check_batch(config.batch_size, steps.config.microbatches, mesh)
  return mesh


def _init_net(params, optimiser, mesh) -> training_state.NetState:
  if mesh is None:
    return training_state.init_net(params, optimiser)
  opt_state = sharding.make(optimiser.init, mesh, params)
  return training_state.NetState(params, opt_state)


def _distill(config: Config) -> Phase:
  """HiAR distillation, or Self-Forcing with order 'block_first'."""
  steps = distillation(config)
  student, numbers = steps.student, steps.config
  mesh = _distill_mesh(config, steps)
  low, high = config.rollout_blocks
  if not 1 <= low <= high:
    raise ValueError(f'rollout_blocks={(low, high)} do not rise from 1')
  source = prompts(config)
  if numbers.forward_kl_weight:
    source = PromptsAndTrajectories(source, trajectory_source(config))
  shard, num_shards = (0, 1) if mesh is None else sharding.batch_share(mesh)
  batches = sources.batches(
    source,
    batch_size=config.batch_size,
    seed=config.seed,
    shard_index=shard,
    num_shards=num_shards,
  )
  # A teacher of the student's size is where the critic starts, too.
  teacher_dtype, critic_weights = 'float32', config.teacher_weights
  if 'teacher' in config:
    teacher_dtype, critic_weights = config.teacher.dtype, config.critic_weights
  empty = word_hash.WordHashEncoder(**config.text).encode([''])
  frozen = training_steps.Frozen(
    teacher=load_params(
      config.teacher_weights, steps.teacher, mesh=mesh, dtype=teacher_dtype
    ),
    negative_text=sharding.put(jnp.asarray(empty), mesh),
  )
  params = load_params(config.student_weights, student, mesh=mesh)
  critic_params = load_params(critic_weights, steps.critic, mesh=mesh)
  state = training_state.DistillState(
    iteration=sharding.put(jnp.zeros((), jnp.int32), mesh),
    student=_init_net(params, steps.student_optimiser, mesh),
    critic=_init_net(critic_params, steps.critic_optimiser, mesh),
    ema=training_state.copy(params),
  )
  generator = sharding.jit_step(
    steps.generator_step,
    state,
    mesh,
    static_argnames=('num_blocks', 'forward_kl_step'),
  )
  critic = sharding.jit_step(
    steps.critic_step, state, mesh, static_argnames=('num_blocks',)
  )
  key = jax.random.key(config.seed)

  def step(state, batch, iteration):
    # Host numbers that choose a compiled program; by name, like all noise.
    draw = np.random.default_rng((config.seed, iteration))
    num_blocks = int(draw.integers(low, high + 1))
    keys = jax.random.split(jax.random.fold_in(key, iteration))
    batch = sharding.put_batch(batch, mesh)
    metrics = {}
    if iteration % numbers.generator_every == 0:
      state, metrics = generator(
        state,
        frozen,
        batch,
        keys[0],
        num_blocks=num_blocks,
        forward_kl_step=int(draw.integers(numbers.forward_kl_steps)),
      )
    state, critic_metrics = critic(
      state, frozen, {'text': batch['text']}, keys[1], num_blocks=num_blocks
    )
    return state, metrics | critic_metrics

  return Phase(
    state=state,
    step=step,
    batches=batches,
    weights=lambda state: sharding.whole(state.ema, mesh),
    flops=training_flops.distillation_iteration(
      steps, config.batch_size, (low + high) / 2
    ),
  )


_PHASES = {
  'codec': _codec,
  'teacher': _teacher,
  'student_start': _student_start,
  'distill': _distill,
}
