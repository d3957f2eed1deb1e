"""Adapters trained in place of networks: one base, small states, LoRA files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hiar_jax import noise_schedule, rollout
from hiar_jax.denoiser import Denoiser
from hiar_jax.models import flops as model_flops
from hiar_jax.models import lora, sharding
from hiar_jax.models.config import WanConfig
from hiar_jax.runtime import errors
from hiar_jax.training import adapters as training_adapters
from hiar_jax.training import distill_config, phases
from hiar_jax.training import flops as training_flops
from hiar_jax.training import loop as training_loop
from hiar_jax.training import state as training_state
from hiar_jax.training import steps as training_steps
from hiar_jax.weights import adapter_files, networks
from tests import tiny

# Every matrix has 12 inputs and at least as many outputs, so rank 12 is full.
DENOISER = Denoiser(
  WanConfig(
    dim=12,
    ffn_dim=12,
    num_heads=2,
    num_layers=2,
    latent_height=2,
    latent_width=4,
    channels=3,
    freq_dim=12,
    text_dim=12,
    text_len=3,
  )
)
ROLLOUT = rollout.RolloutConfig(
  levels=noise_schedule.warped_levels((1000, 500), 5.0),
  frames_per_block=2,
  window=4,
)
BATCH, BLOCKS = 4, 2
FULL = lora.LoRAConfig(rank=12, targets=('.*',))


def distillation(optimiser, adapters):
  return training_steps.Distillation(
    student=DENOISER,
    critic=DENOISER,
    teacher=DENOISER,
    student_optimiser=optimiser,
    critic_optimiser=optimiser,
    rollout=ROLLOUT,
    config=distill_config.DistillConfig(
      guidance=2.0, ema_start=0, ema_decay=0.9, microbatches=2
    ),
    adapters=adapters,
  )


def batch():
  rng = np.random.default_rng(7)
  normal = lambda *shape: rng.normal(size=(BATCH, *shape)).astype(np.float32)
  return {
    'text': normal(3, 12),
    'trajectory': normal(3, 4, 2, 4, 3),
    'trajectory_text': normal(3, 12),
  }


def train(steps, params, *, mesh=None, iterations=2, with_critic=True):
  """State and last metrics after generator steps, and critic steps."""
  base = tiny.random_params(DENOISER, 0)
  make = lambda f, *args: sharding.make(f, mesh, *args) if mesh else f(*args)
  net = lambda optimiser: training_state.NetState(
    sharding.put(params, mesh), make(optimiser.init, sharding.put(params, mesh))
  )
  state = training_state.DistillState(
    iteration=sharding.put(jnp.zeros((), jnp.int32), mesh),
    student=net(steps.student_optimiser),
    critic=net(steps.critic_optimiser),
    ema=sharding.put(params, mesh),
  )
  frozen = training_steps.Frozen(
    teacher=sharding.put(base, mesh),
    negative_text=sharding.put(np.ones((1, 3, 12), np.float32), mesh),
  )
  generator, critic = (
    sharding.jit_step(step, state, mesh, static_argnames='num_blocks')
    for step in (steps.generator_step, steps.critic_step)
  )
  data = sharding.put_batch(batch(), mesh)
  for i in range(iterations):
    keys = jax.random.split(jax.random.key(i))
    state, metrics = generator(state, frozen, data, keys[0], num_blocks=BLOCKS)
    if with_critic:
      state, more = critic(
        state, frozen, {'text': data['text']}, keys[1], num_blocks=BLOCKS
      )
      metrics |= more
  return state, metrics


def assert_close(found, expected, tolerance=1e-5):
  """Of each array the largest error, relative to its largest value."""

  def check(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-3)

  jax.tree.map(check, found, expected)


@pytest.mark.slow
@pytest.mark.parametrize('with_critic', [False, True])
def test_lora_of_full_rank_equals_full_training(with_critic):
  # Of x down up with the identity as `down`, `up` moves as the matrix would;
  # `down` itself is held, or the two would share the way.
  sgd = optax.sgd(0.05, momentum=0.5)
  base = tiny.random_params(DENOISER, 0)
  full, metrics = train(distillation(sgd, None), base, with_critic=with_critic)
  begun = lora.init(FULL, base, jax.random.key(0))

  def label(path, leaf):
    return 'held' if path[-1].key.endswith(lora.DOWN) else 'trained'

  def identity(path, leaf):
    if label(path, leaf) == 'trained':
      return np.zeros_like(leaf)
    return np.broadcast_to(np.eye(12, dtype=np.float32), leaf.shape)

  begun = jax.tree_util.tree_map_with_path(identity, begun)
  held = optax.multi_transform(
    {'trained': sgd, 'held': optax.set_to_zero()},
    lambda tree: jax.tree_util.tree_map_with_path(label, tree),
  )
  low, low_metrics = train(
    distillation(held, FULL), begun, with_critic=with_critic
  )
  merge = lambda params: lora.merge(base, params, FULL.scale)
  assert_close(merge(low.student.params), full.student.params)
  assert_close(merge(low.critic.params), full.critic.params)
  assert_close(merge(low.ema), full.ema)
  # Not the norm of the gradient, in which `down` has a part.
  for name in metrics.keys() & {'reverse_kl', 'forward_kl', 'critic'}:
    np.testing.assert_allclose(low_metrics[name], metrics[name], rtol=1e-4)
  moved = np.abs(full.student.params['head']['kernel'] - base['head']['kernel'])
  assert moved.max() > 1e-3


def adam(rank):
  optimiser = training_state.make_optimiser(
    training_state.OptimiserConfig(learning_rate=1e-3, b1=0.5), 100
  )
  return distillation(optimiser, lora.LoRAConfig(rank=rank, alpha=8.0))


@pytest.mark.slow
def test_adapters_on_a_mesh_train_as_on_one_device():
  steps = adam(4)
  base = tiny.random_params(DENOISER, 0)
  begun = lora.init(steps.adapters, base, jax.random.key(0))
  rng = np.random.default_rng(1)
  begun = jax.tree.map(
    lambda a: rng.normal(0, 0.3, a.shape).astype(np.float32), begun
  )
  alone, metrics = train(steps, begun, iterations=1)
  mesh = sharding.make_mesh(sharding.MeshConfig(1, 2, 2, 2))
  divided, divided_metrics = train(steps, begun, mesh=mesh, iterations=1)
  down = divided.student.params['layers']['ffn_in'][lora.DOWN]
  assert down.addressable_shards[0].data.shape == (2, 6, 4)
  assert_close(divided.student.params, alone.student.params, 1e-4)
  assert_close(divided.critic.params, alone.critic.params, 1e-4)
  assert_close(divided_metrics, metrics, 1e-3)


def test_gradients_of_frozen_matrices_are_not_counted():
  full = dataclasses.replace(adam(4), adapters=None)
  frames = BLOCKS * ROLLOUT.frames_per_block
  linear = model_flops.pass_flops(DENOISER.config, frames, 0).linear
  counted = lambda steps: training_flops.distillation_flops(
    *(steps, 'generator', 1, BLOCKS)
  )
  for name in ('exit pass', 'forward KL'):
    assert counted(full)[name] - counted(adam(4))[name] == linear


# --- From a config.


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
  root = tmp_path_factory.mktemp('inputs')
  tiny.write_inputs(root)
  return root


def params_of(path):
  denoiser = Denoiser(WanConfig(**tiny.config('teacher', '').model))
  return networks.load_weights(path, tiny.random_params(denoiser, 0))


def sizes(tree):
  return sum(a.size for a in jax.tree.leaves(tree))


def test_a_run_leaves_its_lora_and_the_merged_weights(inputs, tmp_path):
  config = tiny.config('student_start_lora', inputs)
  config.iterations = 2
  config.workdir = str(tmp_path / 'student_start')
  weights = training_loop.train(config)
  model = WanConfig(**config.model)
  adapters = lora.LoRAConfig(**config.lora)
  path = weights.with_name(training_adapters.FILE)
  found = adapter_files.read_adapters(path, adapters, model)
  merged = lora.merge(params_of(config.teacher_weights), found, adapters.scale)
  assert_close(params_of(weights), merged, 1e-6)
  assert any(np.abs(a).max() > 0 for a in jax.tree.leaves(found))

  # Goes on from it, beside the base that is the teacher too.
  config = tiny.config('distill_lora', inputs)
  config.student_weights = config.teacher_weights
  config.student_lora = str(path)
  phase = phases.build(config)
  state = phase.state
  jax.tree.map(np.testing.assert_array_equal, state.student.params, found)
  assert_close(phase.weights(state), params_of(weights), 1e-6)
  per_network = sizes(found)
  # Parameters and a second moment each, and the average.
  assert sizes(state) <= 5 * per_network + 10


@pytest.mark.slow
def test_a_run_of_adapters_that_was_cut_ends_bit_equal(inputs, tmp_path):
  config = tiny.config('distill_lora', inputs)
  config.iterations, config.checkpoint_every = 4, 2
  config.workdir = str(tmp_path / 'whole')
  whole = training_loop.train(config)
  config.workdir = str(tmp_path / 'cut')
  config.iterations = 2
  training_loop.train(config)
  config.iterations = 4
  cut = training_loop.train(config)
  for name in (training_loop.WEIGHTS, training_adapters.FILE):
    assert (
      whole.with_name(name).read_bytes() == cut.with_name(name).read_bytes()
    )


@pytest.mark.parametrize(
  ('section', 'says'),
  [
    ({'rank': 99}, 'lora.rank=99 is more than layers/.* can have'),
    ({'rank': 4, 'dropout': 0.1}, "'dropout'"),
    ({'rank': 4, 'targets': ('attn',)}, "lora.targets=.*'attn'.* fit no"),
  ],
)
def test_a_section_that_does_not_fit_is_one_line(inputs, section, says):
  config = tiny.config('distill', inputs)
  config.lora = section
  with pytest.raises((TypeError, ValueError), match=says) as caught:
    phases.build(config)
  message = errors.users_mistake(caught.value)
  assert message and '\n' not in message


def test_a_missing_lora_names_the_phase_that_leaves_it(inputs):
  config = tiny.config('distill_lora', inputs)
  config.student_lora = str(inputs / 'student_start' / training_adapters.FILE)
  with pytest.raises(
    FileNotFoundError, match='no LoRA at .*the phase student_start of the'
  ):
    phases.build(config)
