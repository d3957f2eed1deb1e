"""Numbers in 8 bits come back with the rounding of 8 bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.models import kv_cache, quantised
from tests import toy_network

CONFIG = toy_network.CONFIG


def drawn(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(('kind', 'bound'), [('int8', 0.5), ('float8', 32 / 2)])
def test_each_number_is_off_by_at_most_half_a_step(kind, bound):
  # Rows of very different sizes: a scale for each.
  x = drawn(4, 6, 64) * 10.0 ** np.arange(-6, 0)[:, None]
  for axis in (-1, -2):
    stored = quantised.store(jnp.asarray(x), kind, axis)
    back = quantised.restore(stored, jnp.float32)
    steps = np.abs(back - x) / stored.scale
    assert stored.numbers.dtype.itemsize == 1
    assert float(steps.max()) <= bound * 1.001
    # And is not in halves: what is small keeps its own bits in float8.
    assert kind == 'int8' or float(steps.mean()) < bound / 4


@pytest.mark.parametrize('kind', quantised.KINDS)
def test_zeros_stay_and_a_nan_is_seen(kind):
  x = jnp.asarray([[0.0, 0.0], [1.0, -1.0], [jnp.nan, 1.0]])
  back = quantised.restore(quantised.store(x, kind), jnp.float32)
  np.testing.assert_array_equal(back[:2], x[:2])
  assert jnp.isnan(back[2]).all()


@pytest.mark.parametrize('kind', quantised.KINDS)
def test_a_ring_in_8_bits_has_the_rounded_frames_of_the_plain_one(kind):
  tokens = CONFIG.tokens_per_frame
  shape = (CONFIG.num_layers, 1, 3 * tokens, CONFIG.num_heads, CONFIG.head_dim)
  plain = kv_cache.init_cache(CONFIG, 1, 5, 1)
  ring = kv_cache.init_cache(CONFIG, 1, 5, 1, kind=kind)
  empty = jax.tree.map(jnp.copy, ring)
  for block in range(4):
    new = drawn(2, *shape) + block
    new = kv_cache.KV(*jnp.asarray(new))
    plain, ring = plain.write(new), ring.write(new)
  assert ring.slots == plain.slots == 5
  for whole, stored in ((plain.k, ring.k), (plain.v, ring.v)):
    expected = quantised.store(whole, kind)
    np.testing.assert_array_equal(
      quantised.restore(stored, jnp.float32),
      quantised.restore(expected, jnp.float32),
    )
  # What is not wanted is not written; several are written each to its own.
  same = ring.write(new, live=False)
  np.testing.assert_array_equal(same.k.numbers, ring.k.numbers)
  two = jax.tree.map(lambda *a: jnp.stack(a), ring, empty)
  both = jax.tree.map(lambda a: jnp.stack([a, a]), new)
  written = two.write_each(both, jnp.asarray([True, False]))
  expected = jax.tree.map(lambda *a: jnp.stack(a), ring.write(new), empty)
  jax.tree.map(np.testing.assert_array_equal, written, expected)
  rows = kv_cache.Picked(written, jnp.int32(0)).rows
  layer = jax.tree.map(lambda a: a[*rows.lead, 1], rows.kv)
  np.testing.assert_array_equal(layer.k.scale, written.k.scale[0, 1])


@pytest.mark.parametrize(('kind', 'bound'), [('int8', 0.02), ('float8', 0.08)])
def test_a_pass_over_a_past_in_8_bits_is_close_to_that_over_the_plain_one(
  kind, bound
):
  denoiser, params = toy_network.DENOISER, toy_network.params()
  text = denoiser.project_text(params, toy_network.text_states(1))
  run = toy_network.jit(
    lambda x, past: denoiser.flow(params, x, 0.5, text, past=past)
  )

  def flow(kind, sink=0, bounded=False):
    past = kv_cache.init_cache(CONFIG, 1, 6, sink, bounded=bounded, kind=kind)
    for block in range(4):
      x = jnp.asarray(drawn(4, 1, 3, *toy_network.FRAME_SHAPE)[block])
      made, kv = run(x, past)
      past = past.write(kv)
    return np.asarray(made)

  for settings in ({}, {'sink': 2, 'bounded': True}):
    plain = flow(None, **settings)
    off = np.sqrt(np.mean((flow(kind, **settings) - plain) ** 2))
    assert 0 < off < bound * plain.std()


def test_a_ring_in_8_bits_takes_a_byte_a_number_and_its_scales():
  config = dataclasses.replace(CONFIG, dim=256, dtype='bfloat16')
  size = lambda kind: sum(
    a.nbytes
    for a in jax.tree.leaves(
      jax.tree.map(
        lambda a: np.zeros(a.shape, a.dtype),
        jax.eval_shape(lambda: kv_cache.init_cache(config, 1, 6, kind=kind)).k,
      )
    )
  )
  assert size('int8') * 2 == size(None) * (1 + 4 / 128)
