"""Weights that are no numbers: one of them makes every video black."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

# All bits of the exponent: infinite, or not a number.
_EXPONENTS = {
  np.dtype(np.float32): (np.uint32, 0x7F800000),
  np.dtype(np.float16): (np.uint16, 0x7C00),
  np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80),
}
_CHUNK = 2**20  # Values at a time, for the memory that a comparison takes.
_MAX_REPORTED = 5


def count(array: np.ndarray | jax.Array) -> int:
  """How many values are infinite or not a number."""
  if isinstance(array, jax.Array):
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    return int(_count_on_device(array)) if floating else 0
  flat = np.ascontiguousarray(array).reshape(-1)
  if array.dtype not in _EXPONENTS:
    floats = np.issubdtype(array.dtype, np.floating)
    return int(np.count_nonzero(~np.isfinite(flat))) if floats else 0
  kind, exponent = _EXPONENTS[array.dtype]
  bits = flat.view(kind)
  return sum(
    int(np.count_nonzero(bits[i : i + _CHUNK] & exponent == exponent))
    for i in range(0, len(bits), _CHUNK)
  )


def check(where: Any, counts: Mapping[str, tuple[int, int]]) -> None:
  """Raises ValueError if any array has such values.

  Args:
    where: the file, for the message.
    counts: name -> (values that are not finite, all values).
  """
  bad = {name: c for name, c in counts.items() if c[0]}
  if not bad:
    return
  named = [f'{b} of {n} in {name!r}' for name, (b, n) in bad.items()]
  more = len(named) - _MAX_REPORTED
  ending = [f'and in {more} more arrays'] if more > 0 else []
  raise ValueError(
    f'{where} has values that are not finite: '
    + ', '.join([*named[:_MAX_REPORTED], *ending])
  )


@jax.jit
def _count_on_device(array: jax.Array) -> jax.Array:
  return jnp.sum(~jnp.isfinite(array), dtype=jnp.int32)
