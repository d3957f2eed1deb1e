"""Frames decoded in bands of rows: those of the whole, in less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from hiar_jax.models import vae, vae_bands
from tests.models import vae_test

wan = vae_test.wan
jit = vae_test.jit
decode = jit(
  vae_bands.decode_block, static_argnums=0, static_argnames=('first', 'bands')
)

# Three levels; odd numbers of rows.
CFG = vae.VAEConfig(
  base_dim=4,
  z_dim=2,
  dim_mult=(1, 1, 2),
  num_res_blocks=1,
  temporal_downsample=(False, True),
  mean=(0.5, -0.5),
  std=(2.0, 0.5),
)


@functools.cache
def params():
  made = jit(vae.init, static_argnums=0)(CFG, jax.random.key(0))
  # Biases, or zeros outside of the frame would stay zeros by themselves.
  return jax.tree.map(lambda a: a + 0.1 * (a.size < 20), made)


def latents(batch=2, frames=5, rows=5):
  z = np.random.default_rng(0).normal(size=(batch, frames, rows, 3, 2))
  return jnp.asarray(z, jnp.float32)


def streamed(z, bands, given=None, lengths=(3, 2)):
  """(frames, the last cache) of blocks of the lengths."""
  frames, cache, start = [], None, 0
  for length in lengths:
    block, cache = decode(
      *(CFG, params() if given is None else given, cache),
      z[:, start : start + length],
      first=not start,
      bands=bands,
    )
    frames.append(block)
    start += length
  return np.concatenate(frames, 1), cache


# Sums of a band may be in another order.
close = functools.partial(np.testing.assert_allclose, atol=5e-5)


@functools.cache
def whole():
  return streamed(latents(), vae_bands.Bands())[0]


@pytest.mark.parametrize('tiles', [2, 5])
def test_bands_in_turn_are_the_whole(tiles):
  frames, _ = streamed(latents(), vae_bands.Bands(tiles))
  assert frames.shape == whole().shape
  close(frames, whole())


@pytest.mark.parametrize(('devices', 'tiles'), [(2, 1), (2, 2)])
def test_bands_side_by_side_are_the_whole(devices, tiles):
  mesh = vae_bands.make_mesh(jax.devices()[1:], devices)
  given = jax.device_put(params(), NamedSharding(mesh, PartitionSpec()))
  frames, cache = streamed(latents(), vae_bands.Bands(tiles, mesh), given)
  close(frames, whole())
  # Each device has the pasts of its own bands alone.
  for a in jax.tree.leaves(cache['bands']):
    assert len(a.sharding.device_set) == devices
    assert {s.data.shape[:2] for s in a.addressable_shards} == {(tiles, 2)}


def test_devices_side_by_side_send_each_other_nothing():
  mesh = vae_bands.make_mesh(jax.devices(), 2)
  bands = vae_bands.Bands(1, mesh)
  own = NamedSharding(mesh, PartitionSpec(None, vae_bands.AXIS))

  def put(tree, place):
    return jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree
    )

  shapes = jax.eval_shape(
    lambda: vae_bands.init_decode_cache(CFG, 1, 4, 3, bands)
  )
  everywhere = NamedSharding(mesh, PartitionSpec())
  cache = put(shapes, everywhere) | {'bands': put(shapes['bands'], own)}
  program = (
    decode.lower(
      *(
        CFG,
        put(params(), everywhere),
        cache,
        put(latents(1, 2, 4), everywhere),
      ),
      first=False,
      bands=bands,
    )
    .compile()
    .as_text()
  )
  assert 'convolution' in program
  for word in ('all-gather', 'all-reduce', 'permute(', 'all-to-all'):
    assert word not in program, word


def test_bands_match_wan(wan):
  cfg, given, arrays = wan
  z = arrays['in/z'][:, :3]
  bands = vae_bands.Bands(2)
  frames, _ = decode(cfg, given, None, z, first=True, bands=bands)
  np.testing.assert_allclose(frames, arrays['out/decode_3latents'], atol=2e-5)


def test_a_margin_that_is_too_small_shows(monkeypatch):
  plain = vae_bands._needed
  monkeypatch.setattr(
    vae_bands, '_needed', lambda layers: [max(n - 1, 0) for n in plain(layers)]
  )
  given, bands = params(), vae_bands.Bands(2)
  # Not the function of the other tests, which is compiled already.
  frames, _ = jit(
    lambda z: vae_bands.decode_block(
      CFG, given, None, z, first=True, bands=bands
    )
  )(latents()[:, :3])
  assert np.abs(frames - whole()[:, :5]).max() > 1e-3


def test_bands_need_a_part_of_the_memory():
  # Many frames and few columns: pasts and attention are small beside them.
  z = jnp.zeros((1, 8, 64, 1, 2))

  def temporaries(tiles):
    bands = vae_bands.Bands(tiles)
    cache = vae_bands.init_decode_cache(CFG, 1, 64, 1, bands)
    run = jax.jit(
      lambda p, cache, z: vae_bands.decode_block(
        CFG, p, cache, z, first=False, bands=bands
      ),
      donate_argnums=1,
    )
    compiled = run.lower(params(), cache, z).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporaries(8) < 0.5 * temporaries(1)


def test_more_bands_than_rows_are_refused():
  with pytest.raises(ValueError, match='6 tiles of frames that have 5 rows'):
    streamed(latents(), vae_bands.Bands(6))
  with pytest.raises(ValueError, match='tiles=0 is below 1'):
    vae_bands.Bands(0)
  with pytest.raises(ValueError, match='decode=9 devices .* there are 8'):
    vae_bands.make_mesh(jax.devices(), 9)
