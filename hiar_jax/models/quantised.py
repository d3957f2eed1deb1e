"""Numbers in 8 bits, and the scales that bring them back.

  x = numbers * scale        scale = max |x| / largest number of the 8 bits

Symmetric, the maximum over one axis: of a matrix over its inputs, so that each
output channel has a scale; of keys and values over a head's width, so that each
token and head has one. A scale is float32 and stands where its numbers do, with
1 in place of that axis: what cuts, writes or divides the numbers by any other
axis does the same to the scales.

int8 has 255 even steps of a row, float8 (e4m3) three bits of mantissa at any
size: rows with few large numbers fit the second better, all others the first.

Of a network, the matrices of its layers may be held so: 98 % of the numbers of
1.3B. Their scales stand beside them, 'layers/ffn_in/kernel' has
'layers/ffn_in/kernel_scale'. Named 'kernel_product_scale' they say as well that
products with the matrix are made in 8 bits, of inputs rounded to them token by
token; else the numbers are widened in the product.
"""

# N layers, I inputs, O outputs

import re
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from hiar_jax.models import lora

# Name of a kind -> dtype and largest number.
_KINDS: dict[str, tuple[Any, float]] = {
  'int8': (jnp.int8, 127.0),
  'float8': (jnp.float8_e4m3fn, 448.0),
}
KINDS = tuple(_KINDS)
# Of the names of a matrix's scales.
SCALE, PRODUCT_SCALE = '_scale', '_product_scale'


@flax.struct.dataclass
class Stored:
  """An array in 8 bits.

  Attributes:
    numbers: int8 or float8.
    scale: float32, of the same rank, 1 along one axis.
  """

  numbers: jax.Array
  scale: jax.Array

  @property
  def shape(self) -> tuple[int, ...]:
    return self.numbers.shape

  @property
  def dtype(self) -> Any:
    """Of the numbers."""
    return self.numbers.dtype


def dtype_of(kind: str) -> Any:
  """The dtype of a kind's numbers."""
  return _KINDS[kind][0]


def kind_of(dtype: Any) -> str | None:
  """The kind that has numbers of a dtype; None: none."""
  for kind, (own, _) in _KINDS.items():
    if jnp.dtype(own) == jnp.dtype(dtype):
      return kind
  return None


def store(x: Any, kind: str, axis: int = -1, xp: Any = jnp) -> Stored:
  """An array in 8 bits, with one scale along an axis.

  A row with a NaN comes back as NaNs; one of zeros as zeros.

  Args:
    x: floating point.
    kind: one of KINDS.
    axis: that shares a scale.
    xp: jax.numpy, or numpy: to work on the host.
  """
  dtype, largest = _KINDS[kind]
  x = x.astype(xp.float32)
  scale = xp.max(xp.abs(x), axis, keepdims=True) / np.float32(largest)
  scale = xp.where(scale == 0, xp.float32(1), scale)
  x = x / scale
  if kind == 'int8':
    x = xp.round(x)
  return Stored(x.astype(dtype), scale)


def restore(x: jax.Array | Stored, dtype: Any) -> jax.Array:
  """What `store` was given, rounded; other arrays as they are, in a dtype."""
  if not isinstance(x, Stored):
    return x.astype(dtype)
  return (x.numbers.astype(jnp.float32) * x.scale).astype(dtype)


def empty(shape: tuple[int, ...], kind: str, axis: int = -1) -> Stored:
  """Zeros."""
  scales = list(shape)
  scales[axis] = 1
  return Stored(jnp.zeros(shape, dtype_of(kind)), jnp.zeros(scales))


def product(
  x: jax.Array, weights: Stored, *, in_8_bits: bool, precision: Any = None
) -> jax.Array:
  """x [..., I] times a matrix [I, O] in 8 bits, in the dtype of x.

  Args:
    x: inputs.
    weights: with a scale for each output.
    in_8_bits: rounds each row of x to the kind of the weights first, so that
      the device may multiply 8 bits by 8 bits.
    precision: of the product, where it is not so.
  """
  scale = weights.scale.reshape((1,) * (x.ndim - 1) + (-1,))
  if not in_8_bits:
    out = jnp.matmul(
      x,
      weights.numbers.astype(x.dtype),
      precision=precision,
      preferred_element_type=jnp.float32,
    )
    return (out * scale).astype(x.dtype)
  kind = kind_of(weights.dtype)
  assert kind is not None
  rows = store(x, kind)
  out = jnp.matmul(
    rows.numbers,
    weights.numbers,
    preferred_element_type=jnp.int32 if kind == 'int8' else jnp.float32,
  )
  return (out.astype(jnp.float32) * rows.scale * scale).astype(x.dtype)


def of_module(module: Any, name: str) -> tuple[jax.Array | None, bool]:
  """Scales of a matrix among a module's parameters, and if products use them.

  Args:
    module: a flax module that is being applied.
    name: of the matrix, such as 'kernel'.

  Returns:
    None if the matrix is no one in 8 bits.
  """
  for ending in (SCALE, PRODUCT_SCALE):
    if module.has_variable('params', name + ending):
      scale = module.get_variable('params', name + ending)
      return scale, ending == PRODUCT_SCALE
  return None, False


# --- Trees of parameters.


def matrix(path: str) -> str | None:
  """Path of the matrix that scales belong to; None: they are no scales."""
  found = re.fullmatch(rf'(.*kernel)(?:{SCALE}|{PRODUCT_SCALE})', path)
  return found[1] if found else None


def is_target(path: str) -> bool:
  """Whether a parameter is one of those that are held in 8 bits."""
  return any(re.fullmatch(target, path) for target in lora.DEFAULT_TARGETS)


def scale_path(path: str, *, in_8_bits: bool = False) -> str:
  """Path of a matrix's scales."""
  return path + (PRODUCT_SCALE if in_8_bits else SCALE)


def shapes(
  params: Mapping[str, Any], kind: str, *, in_8_bits: bool = False
) -> dict[str, Any]:
  """The shapes of a network whose matrices are in 8 bits.

  Args:
    params: of the network, or their ShapeDtypeStructs.
    kind: one of KINDS.
    in_8_bits: whether products are made in them too.
  """
  make = lambda x: jax.eval_shape(lambda: empty(x.shape, kind, -2))
  return _with_scales(params, make, in_8_bits)


def store_params(
  params: Mapping[str, Any], kind: str, *, in_8_bits: bool = False
) -> dict[str, Any]:
  """A network with its matrices in 8 bits; arguments as in `shapes`."""
  return _with_scales(params, lambda x: store(x, kind, -2), in_8_bits)


def _with_scales(params, make, in_8_bits):
  flat = dict(traverse_util.flatten_dict(params, sep='/'))
  for path in list(flat):
    if is_target(path):
      stored = make(flat[path])
      flat[path] = stored.numbers
      flat[scale_path(path, in_8_bits=in_8_bits)] = stored.scale
  return traverse_util.unflatten_dict(flat, sep='/')
