"""The video VAE: equal to Wan2.1's, and to itself however it is streamed."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.models import vae, vae_layers
from hiar_jax.weights import tables, vae_tables

# The fewest layers with every kind among them, where no stored number is
# needed.
SMALL = vae.VAEConfig(
  base_dim=4,
  z_dim=2,
  dim_mult=(1, 1),
  num_res_blocks=0,
  temporal_downsample=(True,),
  mean=(0.5, -0.5),
  std=(2.0, 0.5),
)

# Every program here runs once or twice: compile fast rather than well.
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)
decode_block = jit(vae.decode_block, static_argnums=0, static_argnames='first')
encode_block = jit(vae.encode_block, static_argnums=0, static_argnames='first')


@pytest.fixture(scope='module')
def wan(golden):
  """(config, params, arrays): the stored network; arrays channels-last."""
  stored = golden('vae')
  sizes = json.loads(str(stored['config']))
  cfg = vae.VAEConfig(
    base_dim=sizes['dim'],
    z_dim=sizes['z_dim'],
    dim_mult=sizes['dim_mult'],
    num_res_blocks=sizes['num_res_blocks'],
    temporal_downsample=sizes['temperal_downsample'],
    mean=stored['in/mean'].tolist(),
    std=stored['in/std'].tolist(),
  )
  params = tables.convert_state_dict(
    {k[2:]: v for k, v in stored.items() if k.startswith('w/')},
    vae_tables.VAE_RULES,
    jax.eval_shape(functools.partial(vae.init, cfg), jax.random.key(0)),
  )
  arrays = {
    name: jnp.asarray(np.moveaxis(array, 1, -1))
    for name, array in stored.items()
    if array.ndim == 5 and not name.startswith('w/')
  }
  return cfg, params, arrays


@pytest.fixture(scope='module')
def small_params():
  return jit(vae.init, static_argnums=0)(SMALL, jax.random.key(0))


def small_latents(batch: int, frames: int) -> jax.Array:
  """Latents of SMALL, 4 x 6, the same for every shape's common part."""
  z = np.random.default_rng(0).normal(size=(4, 16, 4, 6, SMALL.z_dim))
  return jnp.asarray(z[:batch, :frames], jnp.float32)


def small_video() -> jax.Array:
  video = np.random.default_rng(1).uniform(-1.0, 1.0, (1, 5, 8, 12, 3))
  return jnp.asarray(video, jnp.float32)


def stream(step, cfg, params, x, lengths):
  """Runs blocks of the given lengths; (output of all, every cache)."""
  outputs, caches, cache, start = [], [], None, 0
  for length in lengths:
    block = x[:, start : start + length]
    y, cache = step(cfg, params, cache, block, first=start == 0)
    outputs.append(y)
    caches.append(cache)
    start += length
  return jnp.concatenate(outputs, axis=1), caches


@pytest.mark.parametrize(
  ('name', 'frames'), [('encode_mu', 9), ('encode_mu_1frame', 1)]
)
def test_encoding_matches_wan(wan, name, frames):
  cfg, params, arrays = wan
  video = arrays['in/video'][:, :frames]
  latents, _ = encode_block(cfg, params, None, video, first=True)
  np.testing.assert_allclose(latents, arrays[f'out/{name}'], atol=5e-6)


@pytest.mark.parametrize(
  ('name', 'latents'), [('decode_3latents', 3), ('decode_1latent', 1)]
)
def test_decoding_matches_wan(wan, name, latents):
  cfg, params, arrays = wan
  z = arrays['in/z'][:, :latents]
  frames, _ = decode_block(cfg, params, None, z, first=True)
  np.testing.assert_allclose(frames, arrays[f'out/{name}'], atol=2e-5)


@pytest.mark.parametrize(
  'lengths', [(3, 3), (3, 1, 1, 1), (1, 1, 1, 1, 1, 1), (1, 3, 1, 1)]
)
def test_streamed_decoding_matches_wan_in_blocks_of_any_length(wan, lengths):
  cfg, params, arrays = wan
  frames, _ = stream(decode_block, cfg, params, arrays['in/z'], lengths)
  stored = [arrays[f'out/cached_decode_chunk{i}'] for i in (0, 1)]
  np.testing.assert_allclose(frames, np.concatenate(stored, 1), atol=2e-5)


@pytest.mark.parametrize('lengths', [(1, 4, 4), (9,)])
def test_streamed_encoding_matches_wan_in_blocks_of_any_length(wan, lengths):
  cfg, params, arrays = wan
  latents, _ = stream(encode_block, cfg, params, arrays['in/video'], lengths)
  np.testing.assert_allclose(latents, arrays['out/encode_mu'], atol=5e-6)


def test_the_convolutions_of_gpus_match_wan_too(wan, monkeypatch):
  monkeypatch.setattr(vae_layers, '_conv_by_taps', vae_layers._conv_at_once)
  cfg, params, arrays = wan
  # Not the function of the other tests, which may be compiled already.
  run = jit(
    lambda *xs: (
      vae.encode_block(cfg, params, None, xs[0], first=True)[0],
      vae.decode_block(cfg, params, None, xs[1], first=True)[0],
    )
  )
  mu, frames = run(arrays['in/video'], arrays['in/z'][:, :3])
  np.testing.assert_allclose(mu, arrays['out/encode_mu'], atol=5e-6)
  np.testing.assert_allclose(frames, arrays['out/decode_3latents'], atol=2e-5)


def test_a_gpu_gets_one_convolution_a_layer_in_16_bits():
  layer = vae_layers.CausalConv(8, (3, 3, 3), 'bfloat16')
  x = jnp.zeros((1, 4, 6, 6, 4), jnp.bfloat16)
  params = layer.init(jax.random.key(0), x, None)
  traced = jax.jit(layer.apply).trace(params, x, None)
  programs = {
    platform: [
      line
      for line in traced.lower(lowering_platforms=(platform,))
      .as_text()
      .splitlines()
      if 'stablehlo.convolution' in line
    ]
    for platform in ('cuda', 'cpu')
  }
  assert len(programs['cpu']) == 3
  (line,) = programs['cuda']
  assert line.endswith('tensor<1x4x6x6x8xbf16>')


def test_every_rule_names_a_weight_of_wan(golden):
  names = [k[2:] for k in golden('vae') if k.startswith('w/')]
  for rule in vae_tables.VAE_RULES:
    assert any(tables.rule_matches(rule, name) for name in names), rule


def test_full_size_has_the_released_number_of_weights():
  shapes = jax.eval_shape(
    functools.partial(vae.init, vae.VAEConfig.wan()), jax.random.key(0)
  )
  assert sum(a.size for a in jax.tree.leaves(shapes)) == 126_892_531


def test_initial_kernels_have_unit_gain(small_params):
  kernel = small_params['decoder']['middle_0']['conv1']['kernel']
  np.testing.assert_allclose(kernel.std() * 108**0.5, 1.0, atol=0.15)
  scale = small_params['encoder']['middle_0']['norm1']['scale']
  np.testing.assert_array_equal(scale, np.ones((1, 1, 1, 4)))


def test_cache_keeps_its_shape_and_later_blocks_compile_once(small_params):
  step = jit(
    vae.decode_block,
    static_argnums=0,
    static_argnames='first',
    donate_argnames='cache',
  )
  cache = vae.init_decode_cache(SMALL, 2, 4, 6)
  shapes = jax.tree.map(lambda a: (a.shape, a.dtype), cache)
  z = small_latents(2, 10)
  for start, stop in ((0, 1), (1, 4), (4, 7), (7, 10)):
    block = z[:, start:stop]
    _, cache = step(SMALL, small_params, cache, block, first=start == 0)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), cache) == shapes
  assert step._cache_size() == 2


def test_a_scan_over_blocks_equals_at_once(small_params):
  encode, decode = (
    jit(f, static_argnums=0, static_argnames='frames_per_block')
    for f in (vae.encode_in_blocks, vae.decode_in_blocks)
  )
  video = small_video()
  latents, cache = encode_block(SMALL, small_params, None, video, first=True)
  expected = vae.init_encode_cache(SMALL, 1, 8, 12)
  assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, expected)
  np.testing.assert_allclose(
    encode(SMALL, small_params, video, frames_per_block=2), latents, atol=1e-5
  )
  z = small_latents(1, 3)
  frames, _ = decode_block(SMALL, small_params, None, z, first=True)
  np.testing.assert_allclose(
    decode(SMALL, small_params, z, frames_per_block=1), frames, atol=1e-5
  )


def test_a_batch_equals_its_samples_one_by_one(small_params):
  z = small_latents(2, 3)
  both, _ = decode_block(SMALL, small_params, None, z, first=True)
  for i in range(2):
    one, _ = decode_block(SMALL, small_params, None, z[i : i + 1], first=True)
    np.testing.assert_allclose(both[i : i + 1], one, atol=1e-5)
  assert not np.allclose(both[0], both[1])


def test_gradient_reaches_every_weight_and_no_later_latent(small_params):
  z = small_latents(1, 3)

  @jit
  def pull(cotangent):
    frames = lambda params, z: vae.decode(SMALL, params, z)
    return jax.vjp(frames, small_params, z)[1](cotangent)

  whole = jnp.ones((1, 5, 8, 12, 3))
  weights, _ = pull(whole)
  for path, gradient in jax.tree_util.tree_leaves_with_path(weights['decoder']):
    assert np.isfinite(gradient).all(), path
    assert np.any(gradient), path
  # Frames 0..2 come of latents 0 and 1.
  _, latents = pull(whole.at[:, 3:].set(0.0))
  np.testing.assert_array_equal(latents[:, 2], 0.0)
  assert np.any(latents[:, 0]) and np.any(latents[:, 1])


def test_gradient_is_finite_where_features_vanish():
  norm = vae_layers.RMSNorm(4)
  x = jnp.zeros((1, 1, 1, 1, 4))
  params = {'params': {'scale': jnp.ones((1, 1, 1, 4))}}
  gradient = jax.grad(lambda x: norm.apply(params, x).sum())(x)
  assert np.isfinite(gradient).all()


def test_decoding_sharded_over_columns_changes_no_frame(small_params):
  z = small_latents(1, 3)
  whole, _ = decode_block(SMALL, small_params, None, z, first=True)
  mesh = jax.make_mesh(
    (2,), ('columns',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  columns = jax.sharding.PartitionSpec(None, None, None, 'columns')
  z = jax.device_put(z, jax.sharding.NamedSharding(mesh, columns))
  frames, _ = decode_block(SMALL, small_params, None, z, first=True)
  assert frames.sharding.spec == columns
  np.testing.assert_allclose(frames, whole, atol=1e-5)


def test_bfloat16_stays_near_float32(small_params):
  half = dataclasses.replace(SMALL, dtype='bfloat16')
  z = small_latents(1, 3)
  exact, _ = decode_block(SMALL, small_params, None, z, first=True)
  frames, cache = decode_block(half, small_params, None, z, first=True)
  assert frames.dtype == jnp.float32
  assert {a.dtype for a in jax.tree.leaves(cache)} == {jnp.dtype('bfloat16')}
  error = np.sqrt(np.mean((frames - exact) ** 2) / np.mean(exact**2))
  assert 0 < error < 0.1


def test_posterior_is_the_encoding_before_normalisation(small_params):
  video = small_video()
  mean, log_var = jit(vae.posterior, static_argnums=0)(
    SMALL, small_params, video
  )
  latents, _ = encode_block(SMALL, small_params, None, video, first=True)
  expected = latents * np.reshape(SMALL.std, (1, 1, 1, 1, -1)) + np.reshape(
    SMALL.mean, (1, 1, 1, 1, -1)
  )
  np.testing.assert_allclose(mean, expected, atol=1e-5)
  assert log_var.shape == mean.shape


@pytest.mark.parametrize(
  ('shape', 'message'),
  [
    ((1, 2, 8, 8, 3), r'2 frames are not 1 \+ 2 k'),
    ((1, 1, 8, 9, 3), '8x9 pixels are not multiples of 2'),
    ((1, 1, 8, 8, 4), 'is not .batch, frames, rows, columns, 3'),
  ],
)
def test_misshapen_video_is_refused_by_name(shape, message):
  with pytest.raises(ValueError, match=message):
    vae.encode(SMALL, {}, jnp.zeros(shape))


def test_latents_of_other_channels_are_refused():
  with pytest.raises(ValueError, match='z_dim=2'):
    vae.decode(SMALL, {}, jnp.zeros((1, 1, 4, 4, 16)))


def test_blocks_that_do_not_fill_are_refused():
  with pytest.raises(ValueError, match='3 frames after the first'):
    vae.decode_in_blocks(
      SMALL, {}, jnp.zeros((1, 4, 4, 4, 2)), frames_per_block=2
    )


def test_pixel_patches_are_the_first_levels_channels():
  cfg = dataclasses.replace(SMALL, patch_size=2)
  init, encode, decode = (
    jit(f, static_argnums=0) for f in (vae.init, vae.encode, vae.decode)
  )
  params = init(cfg, jax.random.key(0))
  video = jax.random.uniform(jax.random.key(1), (1, 5, 8, 16, 3), minval=-1)
  patches = vae_layers.to_patches(video, 2)
  assert patches.shape == (1, 5, 4, 8, 12)
  # Channel 0 has red in its top left pixels, channel 3 in its bottom right.
  np.testing.assert_array_equal(patches[..., 0], video[:, :, ::2, ::2, 0])
  np.testing.assert_array_equal(patches[..., 3], video[:, :, 1::2, 1::2, 0])
  np.testing.assert_array_equal(vae_layers.from_patches(patches, 2), video)
  latents = encode(cfg, params, video)
  assert latents.shape == (1, 3, 2, 4, 2)
  decoded = decode(cfg, params, latents)
  assert decoded.shape == video.shape
  step = functools.partial(decode_block, cfg, params)
  first, cache = step(None, latents[:, :1], first=True)
  rest, _ = step(cache, latents[:, 1:], first=False)
  np.testing.assert_allclose(
    np.concatenate([first, rest], axis=1), decoded, atol=1e-5
  )


def test_config_refuses_sizes_that_do_not_fit():
  with pytest.raises(ValueError, match='mean has 2 entries, z_dim=3'):
    dataclasses.replace(SMALL, z_dim=3)
  with pytest.raises(ValueError, match='one entry fewer'):
    dataclasses.replace(SMALL, temporal_downsample=(True, False))
