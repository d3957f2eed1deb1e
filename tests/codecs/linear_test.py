"""The linear codec: faithful, whitened, streamable, storable."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.codecs import linear, pixels
from hiar_jax.data import bouncing

CFG = bouncing.WorldConfig(num_frames=6)


@pytest.fixture(scope='module')
def codec():
  return linear.fit_linear_codec(
    bouncing.videos(CFG, seed=0, num=200), channels=16
  )


@pytest.fixture(scope='module')
def held_out():
  return np.stack(
    [
      bouncing.render(bouncing.sample_scene(CFG, 99, index), CFG)
      for index in range(32)
    ]
  )


def psnr(a, b):
  error = np.asarray(a, np.float64) - np.asarray(b, np.float64)
  return 10 * np.log10(255**2 / np.mean(error**2))


def test_held_out_videos_survive_the_round_trip(codec, held_out):
  latents = codec.encode(pixels.to_float(held_out))
  decoded = pixels.from_float(codec.decode(latents))
  assert latents.shape == (32, 6, 8, 8, 16)
  assert psnr(decoded, held_out) > 28.0


def test_more_channels_lose_less(held_out):
  video = pixels.to_float(held_out)
  quality = []
  for channels in (3, 8, 16):
    codec = linear.fit_linear_codec(
      bouncing.videos(CFG, seed=0, num=50), channels=channels
    )
    decoded = pixels.from_float(codec.decode(codec.encode(video)))
    quality.append(psnr(decoded, held_out))
  assert quality[0] + 3 < quality[1] < quality[2] - 2


def test_all_channels_lose_nothing_but_rounding(held_out):
  # Noise, because the world's own patches do not fill all directions.
  rng = np.random.default_rng(0)
  size = 2 * 2 * 3
  rotation = np.linalg.qr(rng.normal(size=(size, size)))[0]
  codec = linear.LinearCodec(
    mean_P=jnp.zeros(size),
    encoder_PC=jnp.asarray(rotation, jnp.float32),
    decoder_CP=jnp.asarray(rotation.T, jnp.float32),
    spatial_stride=2,
  )
  video = rng.uniform(-1, 1, (2, 3, 8, 6, 3)).astype(np.float32)
  decoded = codec.decode(codec.encode(video))
  np.testing.assert_allclose(decoded, video, atol=1e-5)


def test_latents_are_white_over_the_world(codec):
  videos = np.stack(
    [
      bouncing.render(bouncing.sample_scene(CFG, 0, index), CFG)
      for index in range(200)
    ]
  )
  latents = np.asarray(codec.encode(pixels.to_float(videos)))
  latents = latents.reshape(-1, 16)
  np.testing.assert_allclose(latents.mean(axis=0), 0, atol=1e-3)
  np.testing.assert_allclose(np.cov(latents.T), np.eye(16), atol=1e-2)


def test_patches_come_back_in_place():
  video = np.random.default_rng(0).normal(size=(2, 3, 16, 24, 3))
  patches = linear.to_patches(video, 8)
  assert patches.shape == (2, 3, 2, 3, 192)
  np.testing.assert_array_equal(
    patches[1, 2, 1, 0].reshape(8, 8, 3), video[1, 2, 8:, :8]
  )
  np.testing.assert_array_equal(linear.from_patches(patches, 8), video)


@pytest.mark.parametrize('pieces', [(6,), (1, 2, 3), (1,) * 6])
def test_streamed_decoding_equals_decoding_at_once(codec, held_out, pieces):
  latents = codec.encode(pixels.to_float(held_out[:2]))
  state = codec.init_decode_state(2)
  videos = []
  for piece in jnp.split(latents, np.cumsum(pieces)[:-1], axis=1):
    video, state = codec.decode_stream(state, piece)
    videos.append(video)
  np.testing.assert_allclose(
    jnp.concatenate(videos, axis=1), codec.decode(latents), atol=1e-6
  )


def test_decoded_values_are_clipped_to_pixels(codec):
  decoded = codec.decode(100 * jnp.ones((1, 1, 8, 8, 16)))
  assert decoded.min() >= -1.0
  assert decoded.max() <= 1.0


def test_codec_is_an_argument_of_jit(codec, held_out):
  video = pixels.to_float(held_out[:2])
  encode = jax.jit(lambda codec, video: codec.encode(video))
  np.testing.assert_allclose(
    encode(codec, video), codec.encode(video), atol=1e-5
  )


def test_stored_codec_is_bit_exact_and_small(codec, tmp_path):
  path = tmp_path / 'codec.npz'
  linear.save_linear_codec(codec, path)
  loaded = linear.load_linear_codec(path)
  chex.assert_trees_all_equal(loaded, codec)
  assert path.stat().st_size < 200_000


def test_codec_states_its_shape(codec):
  assert codec.channels == 16
  assert codec.spatial_stride == 8
  assert codec.temporal_stride == 1


def test_pixels_survive_the_float_range():
  levels = np.arange(256, dtype=np.uint8)
  floats = pixels.to_float(levels)
  assert floats[0] == -1.0
  assert floats[-1] == 1.0
  np.testing.assert_array_equal(pixels.from_float(floats), levels)


def test_a_frame_that_does_not_divide_is_refused(codec):
  with pytest.raises(ValueError, match=r'60x64 frame .* patches of 8'):
    codec.encode(jnp.zeros((1, 1, 60, 64, 3)))


def test_too_many_channels_are_refused():
  with pytest.raises(ValueError, match=r'channels=193 must be in \[1, 192\]'):
    linear.fit_linear_codec(bouncing.videos(CFG, seed=0, num=1), channels=193)


def test_whitening_sets_how_loud_the_channels_are():
  half, none = (
    linear.fit_linear_codec(
      bouncing.videos(CFG, seed=0, num=50), channels=8, whitening=whitening
    )
    for whitening in (0.5, 0.0)
  )
  # A decoder row's length is its channel's scale in pixels.
  scale = [np.linalg.norm(codec.decoder_CP, axis=1) for codec in (half, none)]
  np.testing.assert_allclose(scale[1], scale[1][0], rtol=1e-4)
  assert scale[0][-1] < scale[0][0]
  with pytest.raises(ValueError, match=r'whitening=2 must be in \[0, 1\]'):
    linear.fit_linear_codec(
      bouncing.videos(CFG, seed=0, num=1), channels=8, whitening=2
    )
