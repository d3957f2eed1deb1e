"""Products in bfloat16 whose weights have float32 gradients."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from hiar_jax.models import dense

ROWS, INPUTS, OUTPUTS = (3, 40), 8, 4


def arrays():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(*ROWS, INPUTS)).astype(ml_dtypes.bfloat16)
  kernel = rng.normal(size=(INPUTS, OUTPUTS)).astype(np.float32)
  weight = rng.normal(size=(*ROWS, OUTPUTS)).astype(ml_dtypes.bfloat16)
  return x, kernel, np.ones(OUTPUTS, np.float32), weight


def gradients(affine):
  x, kernel, bias, weight = arrays()

  def loss(x, kernel, bias):
    # The cotangent is `weight` in bfloat16.
    return jnp.sum((affine(x, kernel, bias) * weight).astype(jnp.float32))

  return jax.grad(loss, argnums=(0, 1, 2))(x, kernel, bias)


def test_weights_have_the_gradient_of_a_float32_sum():
  x, _, _, weight = (a.astype(np.float64) for a in arrays())
  _, of_kernel, of_bias = gradients(dense.affine)
  assert of_kernel.dtype == of_bias.dtype == jnp.float32
  np.testing.assert_allclose(
    of_kernel, np.einsum('abi,abo->io', x, weight), rtol=1e-5, atol=1e-5
  )
  np.testing.assert_allclose(of_bias, weight.sum((0, 1)), rtol=1e-5, atol=1e-5)
  # Which no bfloat16 can hold.
  rounded = of_kernel.astype(jnp.bfloat16).astype(jnp.float32)
  assert np.abs(rounded - of_kernel).max() > 1e-3


def test_values_and_the_gradient_of_inputs_are_those_of_a_product():
  def plain(x, kernel, bias):
    x, dtype = jnp.asarray(x), x.dtype
    return x @ kernel.astype(dtype) + bias.astype(dtype)[None, None]

  x, kernel, bias, _ = arrays()
  np.testing.assert_array_equal(
    dense.affine(x, kernel, bias), plain(x, kernel, bias)
  )
  ours, theirs = (gradients(affine)[0] for affine in (dense.affine, plain))
  assert ours.dtype == jnp.bfloat16
  np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize('batched', [0, None])
def test_stacks_of_weights_are_one_product(batched):
  x, kernel, bias, _ = arrays()
  x = x.astype(np.float32)
  kernels, biases = np.stack([kernel, 2 * kernel]), np.stack([bias, 3 * bias])
  xs = np.stack([x, x + 1]) if batched == 0 else x
  found = jax.vmap(dense.affine, (batched, 0, 0))(xs, kernels, biases)
  for i in range(2):
    one = xs[i] if batched == 0 else x
    np.testing.assert_allclose(
      found[i], dense.affine(one, kernels[i], biases[i]), rtol=1e-5, atol=1e-5
    )


def test_heads_are_merged_or_summed_over_alike():
  rng = np.random.default_rng(1)
  x = rng.normal(size=(1, 2, 3, 4, 8)).astype(np.float32)
  kernel = rng.normal(size=(32, 5)).astype(np.float32)
  merged = x.reshape(1, 2, 3, 32) @ kernel
  for ours in (
    dense.product(x, kernel, None),
    dense.product_by_heads(x, kernel),
  ):
    np.testing.assert_allclose(ours, merged, rtol=1e-5, atol=1e-5)
  gradient = jax.grad(lambda x: dense.product(x, kernel, None).sum())(x)
  assert gradient.shape == x.shape
