"""Pixels as files have them, and as codecs take them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def to_float(video: jax.Array | np.ndarray) -> jax.Array:
  """uint8 [0, 255] to float32 [-1, 1]."""
  return jnp.asarray(video, jnp.float32) / 127.5 - 1.0


def from_float(video: jax.Array) -> jax.Array:
  """float [-1, 1] to uint8, rounded to nearest; values outside are clipped."""
  return jnp.rint((jnp.clip(video, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def encoder(
  codec: Any, devices: Sequence[jax.Device] | None = None
) -> Callable[[np.ndarray], jax.Array]:
  """A compiled function from uint8 [B, F, H, W, 3] to a codec's latents.

  Args:
    codec: see `codecs`.
    devices: that share every batch and divide it; None: the first one.
  """
  encode = jax.jit(lambda codec, video: codec.encode(to_float(video)))
  if devices is None or len(devices) == 1:
    # The codec is an argument, not a constant of the program.
    return lambda video: encode(codec, video)
  mesh = Mesh(np.array(devices), ('data',), axis_types=(AxisType.Auto,))
  codec = jax.device_put(codec, NamedSharding(mesh, PartitionSpec()))
  by_video = NamedSharding(mesh, PartitionSpec('data'))
  return lambda video: encode(codec, jax.device_put(video, by_video))
