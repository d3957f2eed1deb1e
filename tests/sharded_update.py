"""One distillation update, on a mesh or on none, and how far two are apart.

Run as a program, it is one process of several, and prints the errors:

  python tests/sharded_update.py HOST:PORT PROCESSES ID DEVICES
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax import noise_schedule, rollout
from hiar_jax.denoiser import Denoiser
from hiar_jax.models import sharding
from hiar_jax.models.config import WanConfig
from hiar_jax.runtime import distributed
from hiar_jax.training import distill_config
from hiar_jax.training import state as training_state
from hiar_jax.training import steps as training_steps

# Sizes that the axes divide, two tokens a frame.
_SIZES = dict(
  ffn_dim=16,
  num_heads=2,
  num_layers=2,
  latent_height=2,
  latent_width=4,
  channels=2,
  freq_dim=8,
  text_dim=8,
  text_len=3,
  remat='full',
)
STUDENT = Denoiser(WanConfig(dim=16, **_SIZES))
TEACHER = Denoiser(WanConfig(dim=24, **_SIZES))
BATCH, BLOCKS = 4, 3
ADAMW = dict(name='adamw', learning_rate=1e-3, b1=0.5, clip_norm=0.5)


@functools.cache
def steps(optimiser: str = 'adamw', microbatches: int = 1):
  numbers = ADAMW | dict(name=optimiser)
  optimiser = training_state.make_optimiser(
    training_state.OptimiserConfig(**numbers), 100
  )
  return training_steps.Distillation(
    student=STUDENT,
    critic=STUDENT,
    teacher=TEACHER,
    student_optimiser=optimiser,
    critic_optimiser=optimiser,
    rollout=rollout.RolloutConfig(
      levels=noise_schedule.warped_levels((1000, 500), 5.0),
      frames_per_block=2,
      window=4,
    ),
    config=distill_config.DistillConfig(
      loss_blocks=2,
      cut_start='as_made',
      ema_start=0,
      ema_decay=0.9,
      microbatches=microbatches,
    ),
  )


def params(denoiser: Denoiser, seed: int):
  """Parameters all of which matter."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32),
    jax.eval_shape(denoiser.init, jax.random.key(0)),
  )


def batch():
  rng = np.random.default_rng(7)

  def normal(*shape):
    return rng.normal(size=(BATCH, *shape)).astype(np.float32)

  return {
    'text': normal(3, 8),
    'trajectory': normal(3, 6, 2, 4, 2),
    'trajectory_text': normal(3, 8),
  }


def first_state(steps, mesh):
  """Placed on the mesh if there is one."""

  def net(seed, optimiser):
    placed = sharding.put(params(STUDENT, seed), mesh)
    if mesh is None:
      return training_state.init_net(placed, optimiser)
    opt_state = sharding.make(optimiser.init, mesh, placed)
    return training_state.NetState(placed, opt_state)

  return training_state.DistillState(
    iteration=sharding.put(jnp.zeros((), jnp.int32), mesh),
    student=net(0, steps.student_optimiser),
    critic=net(1, steps.critic_optimiser),
    ema=sharding.put(params(STUDENT, 2), mesh),
  )


def update(mesh=None, **kwargs):
  """(state, metrics) after one generator and one critic step."""
  distillation = steps(**kwargs)
  state = first_state(distillation, mesh)
  share, shares = (0, 1) if mesh is None else sharding.batch_share(mesh)
  rows = BATCH // shares
  mine = jax.tree.map(lambda x: x[share * rows :][:rows], batch())
  data = sharding.put_batch(mine, mesh)
  generator, critic = (
    sharding.jit_step(
      step, state, mesh, static_argnames=('num_blocks', 'most_before')
    )
    for step in (distillation.generator_step, distillation.critic_step)
  )
  frozen = training_steps.Frozen(
    teacher=sharding.put(params(TEACHER, 3), mesh),
    negative_text=sharding.put(np.ones((1, 3, 8), np.float32), mesh),
  )
  lengths = distillation.lengths(BLOCKS, BLOCKS)
  keys = jax.random.split(jax.random.key(5))
  state, metrics = generator(state, frozen, data, keys[0], **lengths)
  state, more = critic(
    state, frozen, {'text': data['text']}, keys[1], **lengths
  )
  return state, metrics | more


def array_errors(actual, expected):
  """Of each array its largest error, relative to its largest value."""

  def error(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))

  return jax.tree.map(error, actual, expected)


def errors(actual, expected) -> dict[str, float]:
  """Largest of these of each part of (state, metrics)."""
  (state, metrics), (other, other_metrics) = actual, expected
  parts = {
    'student': (state.student.params, other.student.params),
    'student_optimiser': (state.student.opt_state, other.student.opt_state),
    'critic': (state.critic.params, other.critic.params),
    'critic_optimiser': (state.critic.opt_state, other.critic.opt_state),
    'ema': (state.ema, other.ema),
    'metrics': (metrics, other_metrics),
  }
  return {
    name: max(jax.tree.leaves(array_errors(*pair)))
    for name, pair in parts.items()
  }


def _process(address: str, count: int, i: int, devices: int) -> None:
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', devices)
  jax.config.update('jax_default_matmul_precision', 'highest')
  jax.config.update('jax_disable_most_optimizations', True)
  distributed.start(distributed.Processes(address, count, i), timeout=120)
  mesh = sharding.make_mesh(
    sharding.MeshConfig(data=2, fsdp=2, tensor=2, context=1)
  )
  state, metrics = update(mesh)
  state = sharding.whole(state, mesh)
  print(json.dumps(errors((state, metrics), update())))


if __name__ == '__main__':
  _process(sys.argv[1], *map(int, sys.argv[2:]))
