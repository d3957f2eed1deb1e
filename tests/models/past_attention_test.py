"""Attention over a past that fills equals attention over the frames it has."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.models import attention, past_attention, rope
from hiar_jax.models.kv_cache import KV
from tests import toy_network

TOKENS, HEADS, WIDTH, OWN, SLOTS = 2, 2, 8, 4, 6
SIZES = (0, 2, 4, 6)


@pytest.mark.parametrize(
  'slots, step, sizes',
  [
    (0, 3, (0,)),
    (2, 3, (0, 2)),
    (18, 3, (0, 3, 6, 9, 12, 15, 18)),
    (17, 3, (0, 3, 6, 9, 12, 15, 17)),
    (20, 1, (0, 4, 7, 10, 14, 17, 20)),
    (60, 3, (0, 12, 21, 30, 42, 51, 60)),
  ],
)
def test_prefixes_are_few_and_end_with_all_slots(slots, step, sizes):
  assert past_attention.prefixes(slots, step) == sizes


def arrays(*leading):
  rng = np.random.default_rng(0)

  def normal(*shape):
    shape = (*leading, *shape, HEADS, WIDTH)
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  # Two layers of one video; the second is read.
  rows = KV(normal(2, 1, SLOTS * TOKENS), normal(2, 1, SLOTS * TOKENS))
  return normal(1, OWN), normal(1, OWN), normal(1, OWN), rows


def ours(q, k, v, rows, filled, sink_rotation=None, **options):
  place = past_attention.Place(
    row=(1,),
    filled=filled,
    branch=past_attention.branch_of(filled, SIZES),
    sink_rotation=sink_rotation,
  )
  return past_attention.attend_past(
    *(q, k, v, rows, place),
    **(dict(sizes=SIZES, tokens_per_frame=TOKENS, backend='xla') | options),
  )


def theirs(q, k, v, rows, filled):
  end = int(filled) * TOKENS
  keys, values = (
    jnp.concatenate([own, past[1, :, :end]], 1)
    for own, past in ((k, rows.k), (v, rows.v))
  )
  return attention.attend(q, keys, values)


@pytest.mark.parametrize('backend', ['xla', 'chunked', 'auto'])
def test_the_frames_that_there_are_are_seen_and_no_others(backend):
  run = toy_network.jit(functools.partial(ours, backend=backend))
  for filled in range(SLOTS + 1):
    np.testing.assert_allclose(
      run(*arrays(), jnp.int32(filled)),
      theirs(*arrays(), filled),
      atol=2e-6,
    )


@pytest.mark.parametrize('filled, read', [(0, 0), (1, 2), (2, 2), (4, 4)])
def test_what_is_beyond_the_shortest_prefix_is_not_read(filled, read):
  q, k, v, rows = arrays()
  empty = jnp.arange(SLOTS * TOKENS) >= read * TOKENS
  spoilt = jax.tree.map(
    lambda a: jnp.where(empty[None, None, :, None, None], jnp.nan, a), rows
  )
  np.testing.assert_allclose(
    toy_network.jit(ours)(q, k, v, spoilt, jnp.int32(filled)),
    theirs(q, k, v, rows, filled),
    atol=2e-6,
  )


@pytest.mark.parametrize('filled', [(0, 0), (0, 1), (3, 6), (6, 6)])
def test_a_batch_of_pasts_takes_one_branch_and_each_sees_its_own(filled):
  batch = jax.vmap(ours)
  values = (*arrays(2), jnp.array(filled, jnp.int32))
  found = toy_network.jit(batch)(*values)
  for i, count in enumerate(filled):
    one = jax.tree.map(lambda a, i=i: a[i], values[:-1])
    np.testing.assert_allclose(found[i], theirs(*one, count), atol=2e-6)
  # With an index of its own for each it would be a selection from all branches.
  assert 'cond[' in str(jax.make_jaxpr(batch)(*values))


@pytest.mark.parametrize('filled', [(6, 6), (2, 6)])
def test_a_sink_is_rotated_where_the_past_is_full(filled):
  q, k, v, rows = arrays(2)
  shift = jnp.array([0, 5])
  cos, sin = jax.vmap(lambda s: rope.frame_shift(s, WIDTH))(shift)
  rotation = tuple(jnp.repeat(a, TOKENS, axis=1) for a in (cos, sin))
  found = toy_network.jit(jax.vmap(ours))(
    *(q, k, v, rows, jnp.array(filled, jnp.int32), rotation)
  )
  for i, count in enumerate(filled):
    one = jax.tree.map(lambda a, i=i: a[i], (q, k, v, rows))
    keys = one[3].k
    turned = rope.rotate(
      keys[1, :, :TOKENS], jax.tree.map(lambda a, i=i: a[i], rotation)
    )
    moved = KV(keys.at[1, :, :TOKENS].set(turned), one[3].v)
    np.testing.assert_allclose(
      found[i], theirs(*one[:3], moved, count), atol=2e-6
    )
