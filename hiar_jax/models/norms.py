"""Norms over the last axis."""

import jax
import jax.numpy as jnp


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
  """LayerNorm over the last axis without affine, float32 in and out."""
  x = x.astype(jnp.float32)
  mean = jnp.mean(x, -1, keepdims=True)
  var = jnp.mean(jnp.square(x - mean), -1, keepdims=True)
  return (x - mean) * jax.lax.rsqrt(var + eps)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """RMS norm over the last axis in float32, result in the dtype of x."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)
  return (y * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)
