"""The phase of the distillation: HiAR's, and Self-Forcing's."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.data import trajectories
from hiar_jax.denoiser import Denoiser
from hiar_jax.models import sharding
from hiar_jax.models.config import WanConfig
from hiar_jax.training import adapters, inputs, network_files, phase_parts
from hiar_jax.training import flops as training_flops
from hiar_jax.training import state as training_state
from hiar_jax.training import steps as training_steps
from hiar_jax.training.distill_config import DistillConfig
from hiar_jax.training.phase_parts import Config, Phase


@dataclasses.dataclass(frozen=True)
class StatesAndTrajectories:
  """Element i of the text states beside a trajectory, for the forward KL."""

  states: inputs.States
  trajectories: trajectories.TrajectorySource

  def __len__(self) -> int:
    return len(self.states)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    trajectory = self.trajectories[index % len(self.trajectories)]
    return self.states[index] | {
      'trajectory': trajectory['latents'],
      'trajectory_text': trajectory['text'],
    }


def distillation(config: Config) -> training_steps.Distillation:
  """The networks, optimisers and numbers of the distillation.

  The critic is a network of the teacher's size unless the config has weights
  for it, see `network_files.find`.
  """
  numbers = DistillConfig(**config.distill)
  updates = -(-config.iterations // numbers.generator_every)
  student, critic = Denoiser(WanConfig(**config.model)), _critic(config)
  return training_steps.Distillation(
    student=student,
    critic=critic.denoiser,
    teacher=network_files.find(config, 'teacher').denoiser,
    student_optimiser=phase_parts.make_optimiser(config.optimiser, updates),
    critic_optimiser=phase_parts.make_optimiser(
      config.critic_optimiser, config.iterations
    ),
    rollout=phase_parts.rollout_config(config),
    config=numbers,
    adapters=adapters.config_of(config, student, critic.denoiser),
  )


def _critic(config: Config) -> network_files.NetworkFile:
  return network_files.find(config, 'critic', 'teacher')


def _codec(config, steps, longest, mesh):
  """What recodes the start of a long rollout's cut, where that is asked for."""
  if not steps.needs_codec(longest):
    return None
  return sharding.whole_everywhere(inputs.open_codec(config), mesh)


def build(config: Config) -> Phase:
  """HiAR distillation, or Self-Forcing with order 'block_first'."""
  steps = distillation(config)
  numbers = steps.config
  mesh = phase_parts.open_mesh(
    config,
    {
      'model': steps.student.config,
      'critic': steps.critic.config,
      'teacher': steps.teacher.config,
    },
    microbatches=numbers.microbatches,
  )
  low, high = config.rollout_blocks
  if not 1 <= low <= high:
    raise ValueError(f'rollout_blocks={(low, high)} do not rise from 1')
  encoder = inputs.open_text(config, mesh)
  states = inputs.open_states(config, inputs.open_prompts(config), encoder)
  source: Any = states
  if numbers.forward_kl_weight:
    source = StatesAndTrajectories(
      states, phase_parts.trajectory_source(config, encoder)
    )
  batches = phase_parts.open_batches(config, source, mesh)
  negative = inputs.negative_states(config, encoder)
  bases = adapters.Bases(mesh)
  teacher = bases.load(network_files.find(config, 'teacher'))
  params, student_base = adapters.start(
    *(config, 'student', network_files.find_student(config, 'student')),
    *(steps.adapters, bases, mesh),
  )
  critic_params, critic_base = adapters.start(
    *(config, 'critic', _critic(config), steps.adapters, bases, mesh)
  )
  frozen = training_steps.Frozen(
    teacher=teacher,
    negative_text=sharding.put(jnp.asarray(negative), mesh),
    codec=_codec(config, steps, high, mesh),
    student_base=None if student_base is teacher else student_base,
    critic_base=None if critic_base is teacher else critic_base,
  )
  state = training_state.DistillState(
    iteration=sharding.put(jnp.zeros((), jnp.int32), mesh),
    student=phase_parts.init_net(params, steps.student_optimiser, mesh),
    critic=phase_parts.init_net(critic_params, steps.critic_optimiser, mesh),
    ema=training_state.copy(params),
  )
  generator = sharding.jit_step(
    steps.generator_step,
    state,
    mesh,
    static_argnames=('num_blocks', 'most_before'),
  )
  critic = sharding.jit_step(
    steps.critic_step,
    state,
    mesh,
    static_argnames=('num_blocks', 'most_before'),
  )
  key = jax.random.key(config.seed)

  def step(state, batch, iteration):
    # Host numbers that choose a compiled program; by name, like all noise.
    draw = np.random.default_rng((config.seed, iteration))
    lengths = steps.lengths(int(draw.integers(low, high + 1)), high)
    keys = jax.random.split(jax.random.fold_in(key, iteration))
    batch = states.finish(sharding.put_batch(batch, mesh))
    metrics = {}
    if iteration % numbers.generator_every == 0:
      state, metrics = generator(
        state,
        frozen,
        batch,
        keys[0],
        **lengths,
        forward_kl_step=np.int32(draw.integers(numbers.forward_kl_steps)),
      )
    state, critic_metrics = critic(
      state, frozen, {'text': batch['text']}, keys[1], **lengths
    )
    return state, metrics | critic_metrics

  return Phase(
    state=state,
    step=step,
    batches=batches,
    weights=lambda state: adapters.whole(
      *(state.ema, student_base, steps.adapters, mesh)
    ),
    save_adapters=adapters.saver(steps.adapters, steps.student.config, mesh),
    flops=training_flops.distillation_iteration(
      steps, config.batch_size, (low + high) / 2
    ),
    tokens=config.batch_size
    * (low + high)
    / 2
    * steps.rollout.frames_per_block
    * steps.student.config.tokens_per_frame,
  )
