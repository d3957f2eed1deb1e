"""The tiny VAE as a codec: streamed as whole, read from published files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.codecs import tiny
from hiar_jax.models import tiny_vae
from hiar_jax.sampling import loading
from hiar_jax.weights import safetensors_io, tiny_vae_files
from tests import fake_release


def published():
  """Small numbers by their published names."""
  rng = np.random.default_rng(0)
  return {
    name: (rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(
      np.float32
    )
    if len(shape) > 1
    else np.zeros(shape, np.float32)
    for name, shape in tiny_vae.shapes().items()
  }


@pytest.fixture(scope='module')
def file(tmp_path_factory):
  path = tmp_path_factory.mktemp('tiny') / 'taew2_1.safetensors'
  fake_release.write(path, published())
  return path


@pytest.fixture(scope='module')
def codec(file):
  return tiny.load_tiny_codec(file)


def latents(frames):
  rng = np.random.default_rng(1)
  return jnp.asarray(rng.normal(size=(1, frames, 2, 3, 16)), jnp.float32)


@pytest.mark.parametrize('sizes', [(1, 1, 1, 1, 1), (3, 2), (2, 3)])
def test_streamed_frames_are_those_of_the_whole(codec, sizes):
  decode = jax.jit(tiny.TinyCodec.decode_stream)
  whole, _ = decode(codec, (), latents(5))
  assert whole.shape == (1, 17, 16, 24, 3)
  state, parts, start = codec.init_decode_state(1), [], 0
  for size in sizes:
    part, state = decode(codec, state, latents(5)[:, start : start + size])
    parts.append(part)
    start += size
  np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-5)
  # A frame is seen by those after it, and by none before.
  other = latents(5).at[:, 2].add(1.0)
  changed = np.abs(decode(codec, (), other)[0] - whole).max((0, 2, 3, 4))
  assert changed[:5].max() < 1e-6 and changed[5:].min() > 1e-3


def test_encoding_takes_one_frame_and_four_for_each_latent(codec):
  encode = jax.jit(tiny.TinyCodec.encode)
  video = jnp.asarray(
    np.random.default_rng(2).uniform(-1, 1, (1, 9, 16, 24, 3)), jnp.float32
  )
  whole = encode(codec, video)
  assert whole.shape == (1, 3, 2, 3, 16)
  # The end is filled up with its last frame.
  longer = jnp.concatenate([video, video[:, -1:].repeat(4, 1)], 1)
  np.testing.assert_allclose(
    encode(codec, longer)[:, :2], whole[:, :2], atol=1e-5
  )
  np.testing.assert_allclose(
    encode(codec, longer)[:, 2], whole[:, 2], atol=1e-5
  )
  with pytest.raises(ValueError, match=r'8 frames are not 1 \+ 4k'):
    codec.encode(video[:, :8])
  with pytest.raises(ValueError, match='frames of 12x24 are no multiples of 8'):
    codec.encode(video[:, :, :12])


def test_of_a_grow_layer_with_more_rows_the_last_count(tmp_path, codec):
  state, name = published(), 'decoder.7.conv.weight'
  state[name] = np.concatenate([np.full_like(state[name], 9.0), state[name]])
  fake_release.write(tmp_path / 'x.safetensors', state)
  more = tiny_vae_files.read(tmp_path / 'x.safetensors')
  np.testing.assert_array_equal(more[name], codec.params[name])


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda s: s.pop('decoder.22.bias'), "'decoder.22.bias' is missing"),
    (lambda s: s.update(x=np.zeros(2, np.float32)), "'x' is unknown"),
    (
      lambda s: s.update({'decoder.22.bias': np.zeros(4, np.float32)}),
      r"'decoder.22.bias' has shape \(4,\), not \(3,\)",
    ),
    (
      lambda s: s.update({'decoder.22.bias': np.full(3, np.nan, np.float32)}),
      'not finite',
    ),
  ],
)
def test_what_does_not_fit_is_named(tmp_path, change, message):
  state = published()
  change(state)
  fake_release.write(tmp_path / 'x.safetensors', state)
  with pytest.raises(ValueError, match=message):
    tiny_vae_files.read(tmp_path / 'x.safetensors')


def test_a_pipeline_is_loaded_with_it_in_the_place_of_its_vae(
  file, tmp_path, monkeypatch
):
  monkeypatch.setenv('HIAR_JAX_CACHE', str(tmp_path / 'cache'))
  fake_release.write_release(tmp_path / 'base', 'wan')
  path = tmp_path / 'base' / 'Wan2.1_VAE.safetensors'
  wan = tmp_path / 'other' / path.name
  wan.parent.mkdir()
  path.rename(wan)
  # The base needs no VAE of its own then.
  pipe = loading.load(tmp_path / 'base', family='self-forcing', vae=file)
  assert isinstance(pipe.codec, tiny.TinyCodec)
  assert pipe.frame_shape == (480, 832, 3)
  whole = loading.load(tmp_path / 'base', family='self-forcing', vae=wan)
  assert whole.codec.config.base_dim == 4
  assert whole.identity != pipe.identity
  with pytest.raises(FileNotFoundError, match='no vae'):
    loading.load(tmp_path / 'base', family='self-forcing')
  with pytest.raises(ValueError, match='has no VAE'):
    student = tmp_path / 'base' / 'diffusion_pytorch_model.safetensors'
    loading.load(tmp_path / 'base', family='self-forcing', vae=student)
  assert safetensors_io.Reader(file).entries.keys() == published().keys()
