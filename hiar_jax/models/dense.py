"""Products with weights, and with what may stand beside them.

That are adapters (models/lora.py), or the scales of weights in 8 bits
(models/quantised.py).

Weights are masters in float32 and computed with in `dtype`. Their gradient is a
float32 sum from the products on: rounded to bfloat16 first, it would be so on
each device before the devices' parts are added up.
"""

# I inputs, O outputs, B batch, F frames, P tokens of a frame, H heads, K head
# width, L text tokens, N layers, R rank

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from hiar_jax.models import lora, quantised

# What remat calls the results: it does not look into what has a gradient of its
# own, and so finds no products there.
PRODUCT = 'product'


class Dense(nn.Module):
  """x kernel + bias, and x lora_down lora_up if the parameters have these.

  The kernel may be in 8 bits, with its scales beside it.

  Attributes:
    features: O.
    dtype: to compute in.
    precision: of the products; None: the device's usual one.
    kernel_init: of the kernel; the bias begins as zeros.
  """

  features: int
  dtype: Any
  precision: Any = None
  kernel_init: Any = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    inputs = math.prod(x.shape[3:]) if x.ndim == 5 else x.shape[-1]
    shape = (inputs, self.features)
    kernel = self.param('kernel', self.kernel_init, shape)
    bias = self.param('bias', nn.initializers.zeros, shape[1:])
    x = x.astype(self.dtype)
    scale, in_8_bits = quantised.of_module(self, 'kernel')
    if scale is not None or self.has_variable('params', lora.DOWN):
      x = _merged(x)
    if scale is None:
      out = affine(x, kernel, bias, self.precision)
    else:
      stored = quantised.Stored(kernel, scale)
      out = stored_affine(x, stored, bias, in_8_bits, self.precision)
    if not self.has_variable('params', lora.DOWN):
      return out
    for name in (lora.DOWN, lora.UP):
      x = product(x, self.get_variable('params', name), self.precision)
    return out + x


def affine(
  x: jax.Array, kernel: jax.Array, bias: jax.Array, precision: Any = None
) -> jax.Array:
  """x kernel + bias in the dtype of x; gradients of the two in their own."""
  return checkpoint_name(_add(product(x, kernel, precision), bias), PRODUCT)


def stored_affine(
  x: jax.Array,
  kernel: quantised.Stored,
  bias: jax.Array,
  in_8_bits: bool,
  precision: Any = None,
) -> jax.Array:
  """`affine` with a kernel in 8 bits, which has no gradient."""
  out = quantised.product(x, kernel, in_8_bits=in_8_bits, precision=precision)
  return _add(out, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, kernel: jax.Array, precision: Any) -> jax.Array:
  """x [..., I] kernel [I, O] in the dtype of x, see `affine`.

  An x of [B, F, P, H, K] is one of I = H K. A TPU sums over both as they lie,
  and had to lay out anew what its attention gives heads first.
  """

  def merged(x, kernel):
    return jnp.matmul(_merged(x), kernel, precision=precision)

  kernel = kernel.astype(x.dtype)
  if x.ndim < 5:
    return merged(x, kernel)
  by_heads = functools.partial(product_by_heads, precision=precision)
  return jax.lax.platform_dependent(x, kernel, tpu=by_heads, default=merged)


def product_by_heads(
  x_BFPHK: jax.Array, kernel: jax.Array, precision: Any = None
) -> jax.Array:
  """x [.., H, K] kernel [H K, O], summed over heads and their width."""
  kernel_HKO = kernel.reshape(*x_BFPHK.shape[3:], -1)
  return jnp.einsum('BFPHK,HKO->BFPO', x_BFPHK, kernel_HKO, precision=precision)


def _merged(x: jax.Array) -> jax.Array:
  """[B, F, P, H, K] as [B, F, P, H K]; others as they are."""
  return x.reshape(*x.shape[:3], -1) if x.ndim == 5 else x


def _product_forward(x, kernel, precision):
  return product(x, kernel, precision), (x, kernel)


def _product_backward(precision, saved, gradient):
  x, kernel = saved
  leading = tuple(range(gradient.ndim - 1))
  of_kernel = jax.lax.dot_general(
    _merged(x),
    gradient,
    ((leading, leading), ((), ())),
    precision=precision,
    preferred_element_type=jnp.promote_types(kernel.dtype, x.dtype),
  )
  of_x = jnp.matmul(gradient, kernel.T.astype(x.dtype), precision=precision)
  return of_x.reshape(x.shape), of_kernel.astype(kernel.dtype)


product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def _add(x, bias):
  """x + bias, whose gradient is not rounded to the dtype of x."""
  return x + bias.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def _add_forward(x, bias):
  return _add(x, bias), bias


def _add_backward(bias, gradient):
  leading = tuple(range(gradient.ndim - 1))
  dtype = jnp.promote_types(bias.dtype, gradient.dtype)
  return gradient, gradient.sum(leading, dtype).astype(bias.dtype)


_add.defvjp(_add_forward, _add_backward)


def stacked_adapters(
  module: nn.Module, name: str, x_BLI: jax.Array
) -> jax.Array | None:
  """x with the adapters of all layers of a stacked matrix, [N, B, L, O].

  Args:
    module: that has the parameters.
    name: of the matrix, such as 'k_kernel'.
    x_BLI: inputs, the same for all layers.

  Returns:
    None if there are no adapters.
  """
  down, up = lora.factors(name)
  if not module.has_variable('params', down):
    return None
  factor = lambda path: module.get_variable('params', path).astype(x_BLI.dtype)
  low = jnp.einsum('BLI,NIR->NBLR', x_BLI, factor(down))
  return jnp.einsum('NBLR,NRO->NBLO', low, factor(up))
