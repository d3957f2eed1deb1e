"""Rotary position embedding over (frame, row, column), Wan2.1's split.

A head of width d holds d/2 complex pairs of adjacent elements; c = d/2 pairs
split as (c - 2(c//3), c//3, c//3) for frame, row and column, each with the
frequencies 10000^(-2i/n) over its own width n.

Frame positions may be any integer up to 2^30. float32 angles would lose their
fraction long before that, so the angle of frame p = a + 1024 b + 1024^2 c is
composed, as a rotation, from three tables that are exact in float64. Frame
100,000 is then as good as frame 10.
"""

# F frames, T tokens, H heads, K head width, P pairs

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_BASE = 1024
_THETA = 10000.0


def pair_split(head_dim: int) -> tuple[int, int, int]:
  """Number of complex pairs that carry frame, row and column."""
  pairs = head_dim // 2
  return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3


def frequencies(num_pairs: int) -> np.ndarray:
  """Radians per position of each pair, float64 [num_pairs]."""
  return _THETA ** (-np.arange(num_pairs) / num_pairs)


def _frame_rotation(
  positions_F: jax.Array, num_pairs: int
) -> tuple[jax.Array, jax.Array]:
  """cos and sin of position * frequency, float32 [F, P] each."""
  freqs = frequencies(num_pairs)
  rest = positions_F.astype(jnp.int32)
  rotation: tuple[jax.Array, jax.Array] | None = None
  for digit in range(3):
    # Angles up to 1e9 keep 1e-7 in float64.
    angles = np.arange(_BASE)[:, None] * float(_BASE**digit) * freqs
    index = rest % _BASE
    rest = rest // _BASE
    c = jnp.asarray(np.cos(angles), jnp.float32)[index]
    s = jnp.asarray(np.sin(angles), jnp.float32)[index]
    if rotation is None:
      rotation = c, s
    else:
      cos, sin = rotation
      rotation = cos * c - sin * s, sin * c + cos * s
  assert rotation is not None
  return rotation


def rotations(
  positions_F: jax.Array, grid: tuple[int, int], head_dim: int
) -> tuple[jax.Array, jax.Array]:
  """Rotations of all tokens of some frames.

  Args:
    positions_F: absolute frame index of each frame, integers in [0, 2^30).
    grid: token rows and columns of a frame.
    head_dim: width of a head.

  Returns:
    cos and sin, float32 [T, K/2] each, tokens in (frame, row, column) order.
  """
  rows, columns = grid
  frame_pairs, row_pairs, column_pairs = pair_split(head_dim)
  cos_f, sin_f = _frame_rotation(positions_F, frame_pairs)
  row_angles = np.arange(rows)[:, None] * frequencies(row_pairs)
  column_angles = np.arange(columns)[:, None] * frequencies(column_pairs)
  num_frames = positions_F.shape[0]

  def assemble(frame, function):
    row = jnp.asarray(function(row_angles), jnp.float32)
    column = jnp.asarray(function(column_angles), jnp.float32)
    shape = (num_frames, rows, columns)
    parts = (
      jnp.broadcast_to(frame[:, None, None], (*shape, frame_pairs)),
      jnp.broadcast_to(row[None, :, None], (*shape, row_pairs)),
      jnp.broadcast_to(column[None, None], (*shape, column_pairs)),
    )
    return jnp.concatenate(parts, -1).reshape(-1, head_dim // 2)

  return assemble(cos_f, np.cos), assemble(sin_f, np.sin)


def frame_shift(shift: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
  """The rotation that makes a token's position `shift` frames later.

  Args:
    shift: integer in [0, 2^30), scalar.
    head_dim: width of a head.

  Returns:
    cos and sin, float32 [1, K/2] each: of any token, as `rotate` takes them.
  """
  frame_pairs, *others = pair_split(head_dim)
  cos, sin = _frame_rotation(shift[None], frame_pairs)
  still = ((0, 0), (0, sum(others)))
  return jnp.pad(cos, still, constant_values=1.0), jnp.pad(sin, still)


def rotate(x_BTHK: jax.Array, rotation: Any) -> jax.Array:
  """Rotates adjacent pairs in float32; result in the dtype of x.

  On a TPU by `rotate_by_product`: what takes every other number of a row has
  the row laid out anew there.
  """
  cos, sin = rotation
  return jax.lax.platform_dependent(
    x_BTHK, cos, sin, tpu=rotate_by_product, default=rotate_pairs
  )


def rotate_pairs(
  x_BTHK: jax.Array, cos_TP: jax.Array, sin_TP: jax.Array
) -> jax.Array:
  """(even + i odd) (cos + i sin) of each pair."""
  cos, sin = (r[None, :, None] for r in (cos_TP, sin_TP))
  x = x_BTHK.astype(jnp.float32)
  even, odd = x[..., 0::2], x[..., 1::2]
  out = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
  return out.reshape(x.shape).astype(x_BTHK.dtype)


@jax.custom_vjp
def rotate_by_product(
  x_BTHK: jax.Array, cos_TP: jax.Array, sin_TP: jax.Array
) -> jax.Array:
  """`rotate_pairs` as x cos + (x turned by 90 degrees) sin, the same numbers.

  The turn is a product with a constant matrix that has one 1 or -1 a column,
  and exact: of 16 bits as it is, of float32 by the precision. The gradient is
  the rotation back; none goes to the angles, which are made of positions.
  """
  cos, sin = (jnp.repeat(r, 2, -1)[None, :, None] for r in (cos_TP, sin_TP))
  turn = np.kron(np.eye(cos_TP.shape[-1]), [[0, 1], [-1, 0]])
  turned = jnp.einsum(
    'BTHK,KL->BTHL',
    x_BTHK,
    jnp.asarray(turn, x_BTHK.dtype),
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  x = x_BTHK.astype(jnp.float32)
  return (x * cos + turned * sin).astype(x_BTHK.dtype)


def _forward(x_BTHK, cos_TP, sin_TP):
  return rotate_by_product(x_BTHK, cos_TP, sin_TP), (cos_TP, sin_TP)


def _backward(saved, gradient):
  cos_TP, sin_TP = saved
  zeros = jnp.zeros_like(cos_TP)
  return rotate_by_product(gradient, cos_TP, -sin_TP), zeros, zeros


rotate_by_product.defvjp(_forward, _backward)
