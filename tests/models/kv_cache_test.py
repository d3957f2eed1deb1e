"""The ring of frame slots holds the sink and the last frames."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.models.kv_cache import KV, KVCache, Picked, init_cache
from tests import toy_network

CONFIG = toy_network.CONFIG
TOKENS = CONFIG.tokens_per_frame

write = toy_network.jit(lambda cache, kv: cache.write(kv))


def kv_of_frames(first: int, num_frames: int) -> KV:
  """K/V whose every number says its frame: 1 + frame in k, negative in v."""
  frames = np.float32(1 + first) + np.arange(num_frames, dtype=np.float32)
  shape = (CONFIG.num_layers, 1, num_frames * TOKENS, 2, CONFIG.head_dim)
  k = np.repeat(frames, TOKENS)[None, None, :, None, None]
  return KV(np.broadcast_to(k, shape), np.broadcast_to(-k, shape))


def frames_in(cache) -> list[int]:
  """Frames in the valid slots, sorted."""
  slots = np.asarray(cache.k)[
    :, :, : int(cache.filled) * cache.tokens_per_frame
  ]
  np.testing.assert_array_equal(
    np.asarray(cache.v)[:, :, : int(cache.filled) * cache.tokens_per_frame],
    -slots,
  )
  slots = slots.reshape(2, -1, TOKENS, 2, CONFIG.head_dim)
  frames = slots[0, :, 0, 0, 0]
  # Every layer, token, head and channel of a slot is of one frame.
  np.testing.assert_array_equal(
    slots, np.broadcast_to(frames[None, :, None, None, None], slots.shape)
  )
  return sorted(int(frame) - 1 for frame in frames)


@pytest.mark.parametrize(
  ('slots', 'sink', 'block'),
  [(6, 0, 3), (3, 1, 3), (5, 2, 3), (3, 3, 3), (2, 0, 3), (4, 0, 1), (6, 3, 2)],
)
def test_the_sink_and_the_last_frames_stay(slots, sink, block):
  cache = init_cache(CONFIG, 1, slots, sink)
  for first in range(0, 7 * block, block):
    written = list(range(first))
    rest = written[sink:]
    ring = slots - sink
    assert frames_in(cache) == written[:sink] + rest[max(0, len(rest) - ring) :]
    cache = write(cache, kv_of_frames(first, block))


def test_a_first_block_of_another_size_shifts_the_ring():
  cache = init_cache(CONFIG, 1, 4)
  for first, size in ((0, 1), (1, 3), (4, 3)):
    cache = write(cache, kv_of_frames(first, size))
  assert frames_in(cache) == [3, 4, 5, 6]


def test_a_window_of_one_block_has_no_past_and_counts_on():
  cache = write(init_cache(CONFIG, 1, 0), kv_of_frames(0, 3))
  assert int(cache.filled) * cache.tokens_per_frame == 0
  assert int(cache.frames) == 3


def test_positions_count_from_the_origin_and_slots_do_not():
  cache = write(init_cache(CONFIG, 1, 3, origin=100_000), kv_of_frames(0, 3))
  assert int(cache.position) == 100_003
  assert frames_in(cache) == [0, 1, 2]


def test_a_dead_write_changes_nothing():
  cache = write(init_cache(CONFIG, 1, 3, 1), kv_of_frames(0, 3))
  after = jax.jit(lambda c, kv, live: c.write(kv, live))(
    cache, kv_of_frames(3, 3), False
  )
  chex.assert_trees_all_equal(after, cache)


def test_writing_in_a_scan_equals_writing_one_by_one():
  blocks = [kv_of_frames(3 * i, 3) for i in range(4)]
  empty = init_cache(CONFIG, 1, 6)
  scanned, _ = jax.lax.scan(
    lambda cache, kv: (cache.write(kv), None),
    empty,
    jax.tree.map(lambda *leaves: np.stack(leaves), *blocks),
  )
  looped = functools.reduce(write, blocks, empty)
  chex.assert_trees_all_equal(scanned, looped)


def test_the_cache_has_the_compute_dtype():
  half = dataclasses.replace(CONFIG, dtype='bfloat16')
  cache = write(init_cache(half, 1, 3), kv_of_frames(0, 3))
  assert cache.k.dtype == cache.v.dtype == jnp.bfloat16


@pytest.mark.parametrize('sink', [-1, 4])
def test_a_sink_that_does_not_fit_is_refused_with_both_numbers(sink):
  with pytest.raises(ValueError, match=f'sink={sink} .* 3 frames'):
    init_cache(CONFIG, 1, 3, sink)


def test_the_rows_of_a_picked_cache_are_the_layers_of_the_one_cut_out():
  k = jnp.arange(2 * 3 * 1 * 4 * 1 * 2, dtype=jnp.float32)
  k = k.reshape(2, 3, 1, 4, 1, 2)
  caches = KVCache(
    k=k,
    v=-k,
    frames=jnp.array([1, 5]),
    origin=jnp.array([0, 7]),
    sink=0,
    tokens_per_frame=2,
  )
  picked = Picked(caches, jnp.int32(1))
  rows, alone = picked.rows, picked.cut_out().rows
  np.testing.assert_array_equal(rows.kv.k[rows.lead], alone.kv.k)
  np.testing.assert_array_equal(rows.kv.v[rows.lead], -k[1])
  assert (int(rows.filled), int(alone.filled), alone.lead) == (2, 2, ())
  assert int(picked.position) == 12
