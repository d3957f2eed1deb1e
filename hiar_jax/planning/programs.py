"""The programs of a distillation for a pod, with abstract arguments.

Nothing of the networks' sizes is allocated.
"""

# B batch, F latent frames, N layers, S steps

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hiar_jax.data import trajectories
from hiar_jax.denoiser import Denoiser
from hiar_jax.models import lora, sharding
from hiar_jax.models.config import WanConfig
from hiar_jax.sampling import trajectories as sampling_trajectories
from hiar_jax.training import state as training_state
from hiar_jax.training import steps as training_steps

PARTS = ('generator', 'critic', 'trajectory')


@dataclasses.dataclass(frozen=True)
class Training:
  """What is planned.

  Attributes:
    steps: networks, optimisers, numbers.
    mesh: how the chips are divided.
    batch_size: videos of an update.
    num_blocks: blocks of a rollout.
    iterations: critic updates of the run.
    teacher_dtype: in which the frozen teacher is held.
    trajectory: how the teacher's trajectories are sampled.
    trajectory_batch: of them at a time.
    trajectory_teacher: network that they are sampled from.
    trajectory_dtype: in which that one is held.
    trajectory_mesh: how the chips that sample together are divided.
  """

  steps: training_steps.Distillation
  mesh: sharding.MeshConfig
  batch_size: int
  num_blocks: int
  iterations: int
  teacher_dtype: str
  trajectory: trajectories.TrajectoryConfig
  trajectory_batch: int
  trajectory_teacher: Denoiser
  trajectory_dtype: str
  trajectory_mesh: sharding.MeshConfig

  @property
  def num_frames(self) -> int:
    return self.num_blocks * self.steps.rollout.frames_per_block

  @property
  def microbatches(self) -> int:
    return self.steps.config.microbatches

  def with_mesh(
    self,
    mesh: sharding.MeshConfig,
    microbatches: int,
    exit_pass: str | None = None,
  ) -> 'Training':
    """The same otherwise divided; with another exit pass if one is given."""
    numbers = dataclasses.replace(
      self.steps.config,
      microbatches=microbatches,
      exit_pass=exit_pass or self.steps.config.exit_pass,
    )
    steps = dataclasses.replace(self.steps, config=numbers)
    return dataclasses.replace(self, mesh=mesh, steps=steps)


def program(training: Training, part: str, mesh: Mesh) -> tuple:
  """A jitted function, its abstract arguments, and some of those by name."""
  steps = training.steps
  everywhere = NamedSharding(mesh, PartitionSpec())
  by_sample = NamedSharding(mesh, PartitionSpec(sharding.BATCH))

  def array(*shape, dtype='float32'):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=by_sample)

  key = jax.eval_shape(lambda: jax.random.key(0))
  key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere)
  if part == 'trajectory':
    return _trajectory_program(training, mesh, array)
  teacher = sharding.abstract(
    params(steps.teacher), mesh, jnp.dtype(training.teacher_dtype)
  )
  negative = (1, steps.teacher.config.text_len, steps.teacher.config.text_dim)
  null: Any = jax.ShapeDtypeStruct(negative, jnp.float32, sharding=everywhere)
  frozen = training_steps.Frozen(
    teacher=teacher,
    negative_text=null,
    student_base=_base(training, steps.student, mesh),
    critic_base=_base(training, steps.critic, mesh),
  )
  lengths = steps.lengths(training.num_blocks, training.num_blocks)
  size, model = training.batch_size, steps.student.config
  text = array(size, model.text_len, model.text_dim)
  state = sharding.abstract(jax.eval_shape(lambda: first_state(steps)), mesh)
  named = {
    'student': state.student.params,
    'its optimiser': state.student.opt_state,
    'its average': state.ema,
    'critic': state.critic.params,
    "critic's optimiser": state.critic.opt_state,
  }
  places = (sharding.shardings(state, mesh), everywhere)
  jit = functools.partial(jax.jit, donate_argnums=0, out_shardings=places)
  if part == 'critic':
    run = functools.partial(steps.critic_step, **lengths)
    # What the step does not use stays on the chip as well.
    return (
      jit(run, keep_unused=True),
      (state, frozen, {'text': text}, key),
      {**named, 'teacher': teacher},
    )
  batch = {'text': text}
  if steps.config.forward_kl_weight:
    batch['trajectory_text'] = text
    batch['trajectory'] = array(
      size,
      steps.rollout.num_steps + 1,
      training.num_frames,
      *_latent(model),
      dtype='float16',
    )
  run = functools.partial(steps.generator_step, **lengths)
  return (
    jit(run),
    (state, frozen, batch, key),
    {**named, 'teacher': teacher, 'batch': batch},
  )


def _trajectory_program(training: Training, mesh: Mesh, array: Any) -> tuple:
  denoiser, size = training.trajectory_teacher, training.trajectory_batch
  teacher = sharding.abstract(
    params(denoiser), mesh, jnp.dtype(training.trajectory_dtype)
  )
  model = denoiser.config
  levels, kept = trajectories.solver_levels(
    training.trajectory, training.steps.rollout.levels
  )

  def sample(params, states, noise):
    null = jnp.zeros_like(states[:1])
    return sampling_trajectories.sample(
      denoiser,
      params,
      denoiser.project_text(params, states),
      denoiser.project_text(params, null),
      noise,
      levels=levels,
      save_indices=kept,
      guidance=training.trajectory.guidance,
      solver=training.trajectory.solver,
    ).astype(jnp.float16)

  states = array(size, model.text_len, model.text_dim)
  noise = array(size, training.num_frames, *_latent(model))
  return jax.jit(sample), (teacher, states, noise), {'teacher': teacher}


def _latent(model: WanConfig) -> tuple[int, int, int]:
  return model.latent_height, model.latent_width, model.channels


def _base(training: Training, denoiser: Denoiser, mesh: Mesh) -> Any:
  """What adapters belong to, held as the teacher; None: it is the teacher."""
  steps = training.steps
  shapes = lambda of: jax.tree.map(lambda a: a.shape, params(of))
  if steps.adapters is None or shapes(denoiser) == shapes(steps.teacher):
    return None
  return sharding.abstract(
    params(denoiser), mesh, jnp.dtype(training.teacher_dtype)
  )


@functools.cache
def params(denoiser: Denoiser) -> dict:
  """Shapes of a network's parameters."""
  return jax.eval_shape(denoiser.init, jax.random.key(0))


def first_state(
  steps: training_steps.Distillation,
) -> training_state.DistillState:
  """Of networks or, where these are trained, of their adapters."""

  def zeros(denoiser):
    if steps.adapters is not None:
      return lora.init(steps.adapters, params(denoiser), jax.random.key(0))
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), params(denoiser))

  student, critic = zeros(steps.student), zeros(steps.critic)
  return training_state.DistillState(
    iteration=jnp.zeros((), jnp.int32),
    student=training_state.init_net(student, steps.student_optimiser),
    critic=training_state.init_net(critic, steps.critic_optimiser),
    ema=student,
  )
