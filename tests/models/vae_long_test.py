"""A long video decodes in blocks as it does at once, in constant memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.models import vae

# All levels of Wan2.1's VAE, narrow: latents of 8x8 are frames of 64x64.
CONFIG = vae.VAEConfig(
  base_dim=4,
  z_dim=4,
  dim_mult=(1, 2, 2, 2),
  num_res_blocks=1,
  temporal_downsample=(False, True, True),
  mean=(0.0,) * 4,
  std=(1.0,) * 4,
)
_PER_BLOCK = 4

# Compiling is most of the time.
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


def live_bytes() -> int:
  return sum(array.nbytes for array in jax.live_arrays())


def check(num_frames: int) -> None:
  """Streams so many latent frames and compares with decoding at once."""
  params = vae.init(CONFIG, jax.random.key(0))
  rng = np.random.default_rng(0)
  z = rng.normal(size=(1, num_frames, 8, 8, 4)).astype(np.float32)
  decode = jit(
    functools.partial(vae.decode_block, CONFIG), static_argnames='first'
  )
  pieces, cache, held = [], None, []
  for start in range(0, num_frames, _PER_BLOCK):
    block = jnp.asarray(z[:, start : start + _PER_BLOCK])
    frames, cache = decode(params, cache, block, first=cache is None)
    pieces.append(np.array(frames))  # A view would keep the device's array.
    del frames, block
    held.append(live_bytes())
  # One program for the first block and one for all later ones, and between two
  # blocks the cache alone.
  assert decode._cache_size() == 2
  assert len(set(held)) == 1, held
  at_once = jit(functools.partial(vae.decode, CONFIG))(params, z)
  assert at_once.shape == (1, 4 * num_frames - 3, 64, 64, 3)
  # Random weights leave -1..1, so the bound is of the largest value.
  largest = np.abs(at_once).max()
  assert largest > 0.1
  difference = np.abs(np.concatenate(pieces, 1) - at_once).max()
  assert difference <= 1e-5 * largest, (difference, largest)


@pytest.mark.slow
def test_100_latent_frames_stream_as_at_once_in_flat_memory():
  check(100)


def test_blocks_stream_as_at_once_in_flat_memory():
  check(3 * _PER_BLOCK)
