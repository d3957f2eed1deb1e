"""Optimisers and state: who gets Muon, what the rate is, what an average is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hiar_jax.denoiser import Denoiser
from hiar_jax.models.config import WanConfig
from hiar_jax.training import state as training_state

RATE = 0.01
DENOISER = Denoiser(
  WanConfig(
    dim=12,
    ffn_dim=20,
    num_heads=2,
    num_layers=3,
    latent_height=2,
    latent_width=2,
    channels=2,
    freq_dim=8,
    text_dim=8,
    text_len=4,
  )
)
MATRICES = {
  *(f'layers/self_attention/{name}/kernel' for name in 'qkvo'),
  *(f'layers/cross_attention/{name}/kernel' for name in 'qo'),
  'layers/ffn_in/kernel',
  'layers/ffn_out/kernel',
  'text_kv/k_kernel',
  'text_kv/v_kernel',
  'text_out/kernel',
  'time_out/kernel',
  'time_projection/kernel',
}


def settings(name='adamw', **kwargs):
  defaults = dict(learning_rate=RATE, b1=0.9, weight_decay=0.0)
  return training_state.OptimiserConfig(name, **(defaults | kwargs))


def by_path(tree):
  return {
    '/'.join(key.key for key in path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def updates(config, grads, *, iterations=10):
  """What the optimiser adds to zeros, gradient after gradient."""
  optimiser = training_state.make_optimiser(config, iterations)
  params = jax.tree.map(jnp.zeros_like, grads[0])
  state = optimiser.init(params)
  update = jax.jit(optimiser.update)
  for grad in grads:
    step, state = update(grad, state, params)
    yield step


@pytest.fixture(scope='module')
def muon_update():
  """A gradient without small values, and Muon's first update."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(DENOISER.init, jax.random.key(0))
  grads = jax.tree.map(
    lambda x: (
      1e-3 * rng.choice([-1, 1], x.shape) * rng.uniform(0.5, 1, x.shape)
    ).astype(np.float32),
    shapes,
  )
  return by_path(grads), by_path(next(updates(settings('muon'), [grads])))


def test_muon_moves_the_matrices_of_the_layers_and_adamw_all_else(muon_update):
  _, update = muon_update
  # The first update of AdamW has one size in every single value.
  by_adamw = {
    name
    for name, value in update.items()
    if np.ptp(np.abs(value)) < 1e-3 * RATE
  }
  assert by_adamw == update.keys() - MATRICES


def orthogonal_by_hand(matrix):
  """Five Newton-Schulz iterations, as in Jordan's Muon."""
  x = np.float64(matrix)
  tall = x.shape[0] > x.shape[1]
  x = x.T if tall else x
  x = x / np.linalg.norm(x)
  for _ in range(5):
    square = x @ x.T
    x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
  return x.T if tall else x


@pytest.mark.parametrize(
  'name', ['layers/ffn_in/kernel', 'layers/ffn_out/kernel', 'text_kv/k_kernel']
)
def test_stacked_layers_are_orthogonalised_one_by_one(muon_update, name):
  grads, update = muon_update
  assert len(update[name]) == DENOISER.config.num_layers
  for grad, step in zip(grads[name], update[name], strict=True):
    scale = 0.2 * RATE * np.sqrt(max(grad.shape))
    np.testing.assert_allclose(
      step, -scale * orthogonal_by_hand(grad), atol=1e-3 * scale
    )


def rates(iterations, **kwargs):
  """Of a constant gradient, AdamW's update is the learning rate."""
  grad = {'x': jnp.ones(2)}
  steps = updates(
    settings(**kwargs), [grad] * iterations, iterations=iterations
  )
  return np.array([-step['x'][0] for step in steps])


def test_rate_rises_in_a_line_and_falls_in_a_cosine():
  warmup, iterations = 4, 12
  rate_by_hand = [
    RATE * i / warmup
    if i < warmup
    else RATE
    * (0.1 + 0.45 * (1 + np.cos(np.pi * (i - warmup) / (iterations - warmup))))
    for i in range(iterations)
  ]
  np.testing.assert_allclose(
    rates(iterations, warmup=warmup, decay_to=0.1), rate_by_hand, rtol=1e-3
  )


def test_rate_without_warm_up_and_decay_is_constant():
  np.testing.assert_allclose(rates(6), RATE, rtol=1e-4)


def test_rate_stays_at_the_peak_after_a_warm_up_alone():
  np.testing.assert_allclose(
    rates(5, warmup=2), RATE * np.array([0, 0.5, 1, 1, 1]), atol=1e-3 * RATE
  )


def test_a_huge_gradient_is_clipped():
  grads = [{'x': jnp.full(4, size)} for size in (1.0, 1e4)]
  *_, step = updates(settings(b1=0.0, clip_norm=1.0), grads)
  np.testing.assert_allclose(-step['x'], RATE, rtol=1e-3)


def test_weight_decay_pulls_both_kinds_of_parameters_to_zero():
  params = {
    'layers': {'kernel': jnp.full((2, 3, 3), 2.0), 'bias': jnp.full(3, 2.0)}
  }
  optimiser = training_state.make_optimiser(
    settings('muon', weight_decay=0.1), 10
  )
  zero = jax.tree.map(jnp.zeros_like, params)
  net = training_state.init_net(params, optimiser)
  net = jax.jit(lambda net: net.update(zero, optimiser))(net)
  for value in jax.tree.leaves(net.params):
    np.testing.assert_allclose(value, 2 * (1 - 0.1 * RATE), rtol=1e-6)


def test_average_moves_by_its_rate():
  ema, params = {'x': jnp.array([1.0, 2.0])}, {'x': jnp.array([3.0, 2.0])}
  average = training_state.ema_update(ema, params, 0.75)
  np.testing.assert_allclose(average['x'], [1.5, 2.0])


def test_copies_share_no_buffer():
  tree = {'x': jnp.ones(3)}
  copied = training_state.copy(tree)
  assert (
    copied['x'].unsafe_buffer_pointer() != tree['x'].unsafe_buffer_pointer()
  )


def test_a_net_remembers_its_optimiser_state():
  optimiser = optax.sgd(1.0, momentum=0.5)
  net = training_state.init_net({'x': jnp.zeros(1)}, optimiser)
  for _ in range(2):
    net = net.update({'x': jnp.ones(1)}, optimiser)
  np.testing.assert_allclose(net.params['x'], -2.5)


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    (dict(name='sgd'), "optimiser 'sgd' is not one of"),
    (dict(learning_rate=0.0), 'learning_rate=0.0 is not positive'),
  ],
)
def test_optimiser_names_a_value_that_does_not_fit(kwargs, message):
  with pytest.raises(ValueError, match=message):
    training_state.OptimiserConfig(**kwargs)


def test_without_b1_adamw_is_the_same_and_keeps_one_moment():
  params = {'w': jnp.linspace(-1.0, 1.0, 6), 'b': jnp.ones(3)}
  config = settings(b1=0.0, warmup=2, clip_norm=1.0)
  ours = training_state.make_optimiser(config, 10)
  rate = optax.warmup_cosine_decay_schedule(
    0.0, config.learning_rate, 2, 10, config.learning_rate
  )
  plain = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(rate, b1=0.0, b2=config.b2, weight_decay=config.weight_decay),
  )
  ends = []
  for optimiser in (ours, plain):
    net = training_state.init_net(params, optimiser)
    for i in range(4):
      grads = jax.tree.map(lambda p, i=i: jnp.sin(3 * p + i), net.params)
      net = net.update(grads, optimiser)
    ends.append(net)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
    *(end.params for end in ends),
  )
  held, before = (
    sum(a.size for a in jax.tree.leaves(end.opt_state) if a.ndim)
    for end in ends
  )
  assert (held, before) == (9, 18)
