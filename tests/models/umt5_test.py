"""The umT5 encoder: equal to the original's, in float32 and near in bf16."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.models import umt5
from hiar_jax.weights import tables, umt5_tables

CFG = umt5.UMT5Config(
  vocab_size=100,
  dim=32,
  ffn_dim=64,
  num_heads=4,
  attention_dim=32,
  num_layers=2,
)

# Every program here runs once or twice: compile fast rather than well.
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)
encode = jit(umt5.encode, static_argnums=0)


@pytest.fixture(scope='module')
def params(golden):
  return tables.convert_state_dict(
    {k[2:]: v for k, v in golden('umt5').items() if k.startswith('w/')},
    umt5_tables.RULES,
    jax.eval_shape(functools.partial(umt5.init, CFG), jax.random.key(0)),
  )


@pytest.mark.parametrize(
  ('name', 'suffix'), [('hidden', ''), ('hidden_short', '_short')]
)
def test_hidden_states_match_the_original_at_padding_too(
  golden, params, name, suffix
):
  stored = golden('umt5')
  hidden = jit(umt5.UMT5Encoder(CFG).apply)(
    {'params': params},
    stored[f'in/ids{suffix}'],
    stored[f'in/mask{suffix}'].astype(bool),
  )
  np.testing.assert_allclose(hidden, stored[f'out/{name}'], atol=2e-5)


def test_encoding_matches_the_original_with_zeros_at_padding(golden, params):
  stored = golden('umt5')
  hidden = encode(CFG, params, stored['in/ids'], stored['in/mask'])
  np.testing.assert_allclose(
    hidden, stored['out/hidden_padding_zeroed'], atol=2e-5
  )
  assert not np.any(np.asarray(hidden)[stored['in/mask'] == 0])


def test_encoding_without_padding_matches_the_original(golden, params):
  stored = golden('umt5')
  mask = np.ones_like(stored['in/mask'])
  hidden = encode(CFG, params, stored['in/ids'], mask)
  np.testing.assert_allclose(hidden, stored['out/hidden_no_mask'], atol=2e-5)


def test_buckets_match_the_original(golden):
  buckets = umt5.relative_buckets(
    np.arange(-159, 160), num_buckets=32, max_distance=128
  )
  np.testing.assert_array_equal(
    buckets, golden('umt5')['out/bucket_of_relpos_-159..159']
  )


def test_position_bias_matches_the_original(golden, params):
  buckets = umt5.relative_buckets(
    np.arange(160), num_buckets=32, max_distance=128
  )
  np.testing.assert_array_equal(
    params['layers']['relative_bias'][0][buckets].T,
    golden('umt5')['out/block0_pos_bias_first_row'],
  )


def test_ids_at_padding_do_not_reach_the_tokens(golden, params):
  ids, mask = (golden('umt5')[f'in/{k}_short'] for k in ('ids', 'mask'))
  assert (mask == 0).any()
  hidden = encode(CFG, params, ids, mask)
  other = encode(CFG, params, np.where(mask, ids, 7), mask)
  np.testing.assert_array_equal(hidden, other)


def test_gradient_reaches_every_weight(golden, params):
  ids, mask = (golden('umt5')[f'in/{k}_short'] for k in ('ids', 'mask'))
  loss = lambda params: umt5.encode(CFG, params, ids, mask).std()
  gradients = jit(jax.grad(loss))(params)
  for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
    assert np.isfinite(gradient).all(), path
    assert np.any(gradient), path


def test_bfloat16_stays_near_float32(golden, params):
  ids, mask = (golden('umt5')[f'in/{k}_short'] for k in ('ids', 'mask'))
  half = dataclasses.replace(CFG, dtype='bfloat16')
  exact = encode(CFG, params, ids, mask)
  hidden = encode(half, params, ids, mask)
  assert hidden.dtype == jnp.bfloat16
  difference = np.asarray(hidden, np.float32) - exact
  error = np.sqrt(np.mean(difference**2) / np.mean(np.square(exact)))
  assert 0 < error < 0.03


def test_every_rule_names_a_weight_of_the_original(golden):
  names = [k[2:] for k in golden('umt5') if k.startswith('w/')]
  for rule in umt5_tables.RULES:
    assert any(tables.rule_matches(rule, name) for name in names), rule


def test_full_size_has_the_released_number_of_weights():
  shapes = jax.eval_shape(
    functools.partial(umt5.init, umt5.UMT5Config.xxl()), jax.random.key(0)
  )
  assert sum(a.size for a in jax.tree.leaves(shapes)) == 5_680_910_336


def test_ids_and_mask_of_different_shapes_are_refused():
  with pytest.raises(ValueError, match=r'\(1, 4\).*\(1, 5\)'):
    umt5.encode(CFG, {}, jnp.zeros((1, 4), int), jnp.ones((1, 5)))


def test_config_refuses_heads_that_do_not_divide():
  with pytest.raises(ValueError, match='num_heads=5'):
    dataclasses.replace(CFG, num_heads=5)
