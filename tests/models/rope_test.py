"""Rotary positions: exact, relative, and good at any frame."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.models import rope

GRID = (2, 3)
HEAD_DIM = 24


def random_heads(seed: int, frames: int) -> jax.Array:
  shape = (2, frames * GRID[0] * GRID[1], 2, HEAD_DIM)
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


compute = jax.jit(rope.rotations, static_argnums=(1, 2))
rotate = jax.jit(rope.rotate)


def rotations(*frames: int):
  return compute(np.asarray(frames, np.int32), GRID, HEAD_DIM)


@pytest.mark.parametrize(
  ('head_dim', 'split'),
  [(128, (22, 21, 21)), (24, (4, 4, 4)), (16, (4, 2, 2)), (8, (2, 1, 1))],
)
def test_a_head_is_split_as_in_wan(head_dim, split):
  assert rope.pair_split(head_dim) == split


@pytest.mark.parametrize('frame', [0, 7, 1023, 1024, 100_000, 2**30 - 1])
def test_angles_are_those_of_float64_at_any_frame(frame):
  cos, sin = rotations(frame)
  row, column = np.divmod(np.arange(6), 3)
  angles = np.concatenate(
    [
      np.multiply.outer(position, rope.frequencies(4))
      for position in (np.full(6, frame), row, column)
    ],
    -1,
  )
  np.testing.assert_allclose(cos, np.cos(angles), atol=3e-7)
  np.testing.assert_allclose(sin, np.sin(angles), atol=3e-7)


def test_rotation_turns_adjacent_pairs_as_complex_numbers():
  x = random_heads(0, 2)
  cos, sin = rotations(5, 6)
  out = rotate(x, (cos, sin))
  pairs = np.asarray(x).reshape(*x.shape[:-1], -1, 2)
  turn = np.asarray(cos) + 1j * np.asarray(sin)
  turned = (pairs[..., 0] + 1j * pairs[..., 1]) * turn[:, None]
  turned = np.stack([turned.real, turned.imag], -1).reshape(x.shape)
  np.testing.assert_allclose(out, turned, atol=1e-6)


@pytest.mark.parametrize('shift', [1, 1000, 100_000])
def test_scores_depend_on_the_distance_of_frames_alone(shift):
  q, k = random_heads(0, 1), random_heads(1, 1)

  def scores(query_frame, key_frame):
    turned_q = np.asarray(rotate(q, rotations(query_frame)))
    turned_k = np.asarray(rotate(k, rotations(key_frame)))
    return np.einsum('bthk,bshk->bhts', turned_q, turned_k)

  near = scores(9, 2)
  np.testing.assert_allclose(scores(9 + shift, 2 + shift), near, atol=2e-5)
  assert np.abs(scores(10, 2) - near).max() > 0.1


def test_rotation_keeps_the_dtype_of_its_input():
  x = random_heads(0, 1).astype(jnp.bfloat16)
  assert rotate(x, rotations(3)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
  ('dtype', 'tolerance'), [('float32', 1e-6), ('bfloat16', 0.0)]
)
def test_a_product_rotates_as_pairs_do_with_the_same_gradient(dtype, tolerance):
  """Of 16 bits the same bits, as all is rounded once: at the end."""
  x, g = (random_heads(seed, 2).astype(dtype) for seed in (0, 1))

  def both(rotation):
    out, pull_back = jax.vjp(lambda x: rotation(x, *rotations(5, 600)), x)
    return out, *pull_back(g)

  pairs, product = map(
    jax.jit(both, static_argnums=0), (rope.rotate_pairs, rope.rotate_by_product)
  )
  for a, b in zip(pairs, product, strict=True):
    assert a.dtype == b.dtype == dtype
    np.testing.assert_allclose(
      np.asarray(a, np.float32), np.asarray(b, np.float32), atol=tolerance
    )


@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
def test_the_rotation_is_chosen_by_the_platform_that_is_compiled_for(platform):
  angles = jax.ShapeDtypeStruct((6, HEAD_DIM // 2), 'float32')
  x = jax.ShapeDtypeStruct((1, 6, 2, HEAD_DIM), 'bfloat16')
  program = (
    jax.jit(lambda x, *angles: rope.rotate(x, angles))
    .trace(x, angles, angles)
    .lower(lowering_platforms=(platform,))
    .as_text()
  )
  assert ('dot_general' in program) == (platform == 'tpu')
