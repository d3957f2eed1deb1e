"""Passes divided over devices make the video of one device."""

import dataclasses

import jax
import numpy as np
import pytest

from hiar_jax import noise_schedule, rollout
from hiar_jax.codecs import pixels
from hiar_jax.sampling import choices, decoding, loading, meshes, streaming
from hiar_jax.text import word_hash
from tests import fake_release, toy_network
from tests.sampling import recache_test, stream_decoding_test
from tests.sampling.recache_test import CONFIG, DENOISER, PlainCodec, encode

LEVELS = noise_schedule.warped_levels((1000, 750, 500, 250), 5.0)


@pytest.fixture(autouse=True)
def latents_instead_of_pixels(monkeypatch):
  # Programs that were compiled with one of them do not do for the other.
  decoding._decode_block.clear_cache()
  with monkeypatch.context() as patched:
    patched.setattr(pixels, 'from_float', lambda video: video)
    yield
  decoding._decode_block.clear_cache()


def stream(mode, mesh=None, **changes):
  context = 'shared' if mode == 'shared' else 'matched'
  config = rollout.RolloutConfig(
    levels=LEVELS, window=9, sink=3, context=context, **changes
  )
  return streaming.Stream(
    streaming.Engine(DENOISER, config, mode, mesh),
    toy_network.params(),
    PlainCodec(),
    encode,
    ['a'],
    recache_test.keys(),
  )


def blocks(made, count=5):
  # Told ahead: stages begin blocks at other times than a loop does.
  made.send('another one', at=3)
  return np.concatenate([next(made) for _ in range(count)], 1)


@pytest.mark.parametrize(
  ('mode', 'sizes', 'changes'),
  [
    ('batched', 'stage=2,tensor=2,context=2', {}),
    pytest.param(
      *('batched', 'stage=4,tensor=2', {'positions': 'bounded'}),
      marks=pytest.mark.slow,
    ),
    ('batched', 'stage=2,context=2', {'past_dtype': 'int8'}),
    pytest.param(*('shared', 'stage=3,tensor=2', {}), marks=pytest.mark.slow),
    ('block_first', 'tensor=2,context=2', {'positions': 'bounded'}),
  ],
)
def test_a_divided_stream_equals_that_of_one_device(mode, sizes, changes):
  mesh = meshes.make(meshes.parse(sizes))
  ours = blocks(stream(mode, mesh, **changes))
  np.testing.assert_allclose(ours, blocks(stream(mode, **changes)), atol=2e-5)


def test_every_device_has_its_part_of_weights_and_pasts():
  mesh = meshes.make(meshes.parse('stage=2,tensor=2'))
  made = stream('batched', mesh)
  next(made)
  kernel = made._params['layers']['self_attention']['q']['kernel']
  whole = kernel.shape
  assert {s.data.shape for s in kernel.addressable_shards} == {
    (*whole[:2], whole[2] // 2)
  }
  assert heads_a_device(made._state.past) == CONFIG.num_heads // 2


def heads_a_device(past):
  (shape,) = {s.data.shape for s in past.k.addressable_shards}
  whole = past.k.shape
  assert (*shape[:4], shape[5]) == (whole[0] // 2, *whole[1:4], whole[5])
  return shape[4]


@pytest.mark.parametrize(
  ('sizes', 'heads', 'exchanged'),
  [('stage=2,context=2', 1, True), ('stage=2,tensor=2,context=2', 1, False)],
)
def test_tokens_are_exchanged_for_heads_where_these_divide(
  sizes, heads, exchanged
):
  mesh = meshes.make(meshes.parse(sizes))
  made = stream('batched', mesh)
  next(made)
  assert heads_a_device(made._state.past) == heads
  run = lambda params, x, text: DENOISER.flow(params, x, 0.5, text)[0]
  x = np.zeros((1, 3, *toy_network.FRAME_SHAPE), np.float32)
  with meshes.under(mesh):
    text = jax.jit(DENOISER.project_text)(made._params, encode(['a']))
    program = jax.jit(run).lower(made._params, x, text).compile().as_text()
  assert ('all-to-all' in program) == exchanged


@pytest.mark.parametrize(
  ('sizes', 'order', 'context', 'num_given'),
  [
    ('tensor=2', 'block_first', 'clean', 3),
    ('context=2', 'step_first', 'matched', 0),
    ('stage=2,tensor=2', 'step_first', 'matched', 3),
    ('stage=2', 'step_first', 'shared', 0),
  ],
)
def test_a_divided_call_equals_that_of_one_device(
  sizes, order, context, num_given
):
  own = dataclasses.replace(
    stream_decoding_test.pipe(),
    encoder=word_hash.WordHashEncoder(8, 4),
  )
  settings = {'order': order, 'context': context, 'num_blocks': 4, 'seed': 2}
  given = stream_decoding_test.picture(num_given) if num_given else None
  plain = own('a cat', initial_frames=given, progress=False, **settings)
  divided = dataclasses.replace(own, mesh=meshes.make(meshes.parse(sizes)))
  video = divided('a cat', initial_frames=given, progress=False, **settings)
  np.testing.assert_allclose(video.latents, plain.latents, atol=5e-5)


def test_processes_would_make_the_call_of_one(monkeypatch):
  own = dataclasses.replace(
    stream_decoding_test.pipe(), mesh=meshes.make(meshes.parse('tensor=2'))
  )
  settings = {'order': 'block_first', 'num_blocks': 3, 'progress': False}
  plain = own('a cat', **settings)
  # As it is made where there are several: by the programs of a stream.
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  video = own('a cat', **settings)
  np.testing.assert_allclose(video.latents, plain.latents, atol=1e-5)


def test_a_device_of_its_own_decodes_beside_those_that_denoise():
  sizes = meshes.parse('stage=2,decode=1')
  own = stream_decoding_test.pipe()
  beside = dataclasses.replace(
    own,
    mesh=meshes.make(sizes),
    codec=jax.device_put(own.codec, meshes.decoders(sizes)[0]),
  )
  given = stream_decoding_test.picture(3)
  video = own('a cat', num_blocks=3, initial_frames=given, progress=False)
  made = beside('a cat', num_blocks=3, initial_frames=given, progress=False)
  stream_decoding_test.assert_same_pixels(made.frames, video.frames)
  stream = beside.stream('a cat', initial_frames=given)
  frames = stream_decoding_test.streamed(stream, 3)
  stream_decoding_test.assert_same_pixels(frames, video.frames)
  (decoded,) = {a.device for a in jax.tree.leaves(stream._decoder)}
  assert decoded == jax.devices()[2]
  assert decoded not in stream.engine.mesh.devices


def test_a_call_with_stages_says_what_it_does_not_make():
  mesh = meshes.make(meshes.parse('stage=2'))
  own = dataclasses.replace(stream_decoding_test.pipe(), mesh=mesh)
  with pytest.raises(ValueError, match="'hybrid' order has no stages"):
    own('a cat', order='hybrid', anchor_blocks=1, progress=False)
  with pytest.raises(ValueError, match="'block_first' makes .* has no stages"):
    own('a cat', order='block_first', progress=False)


def test_weights_are_read_in_the_shards_of_their_place(tmp_path, monkeypatch):
  monkeypatch.setenv('HIAR_JAX_CACHE', str(tmp_path / 'cache'))
  fake_release.write_release(tmp_path / 'hiar', 'wan')
  pipe = loading.load(tmp_path / 'hiar', family='hiar', mesh='stage=2,tensor=2')
  read = pipe.params['layers']['ffn_in']['kernel']
  width = fake_release.CONFIGS['transformer'].ffn_dim
  assert {s.data.shape[-1] for s in read.addressable_shards} == {width // 2}
  assert len(read.addressable_shards) == 4
  # A stream takes them as they lie.
  put = meshes.put_params(pipe.denoiser, pipe.params, pipe.mesh)
  assert put['layers']['ffn_in']['kernel'] is read
  with pytest.raises(ValueError, match='num_heads=2 is not divisible by'):
    loading.load(tmp_path / 'hiar', family='hiar', mesh='tensor=4')


def test_a_frame_is_divided_as_load_is_told(tmp_path, monkeypatch):
  monkeypatch.setenv('HIAR_JAX_CACHE', str(tmp_path / 'cache'))
  fake_release.write_release(tmp_path / 'hiar', 'wan')
  own = {'family': 'hiar', 'mesh': 'decode=2', 'tiles': 2}
  codec = loading.load(tmp_path / 'hiar', **own).codec
  assert (codec.bands.in_turn, codec.bands.count) == (2, 4)
  for a in jax.tree.leaves(codec.params):
    assert a.devices() == set(jax.devices()[1:3])
  with pytest.raises(ValueError, match='tiles of frames that have'):
    loading.load(tmp_path / 'hiar', **own | {'tiles': 50})
  # Any other codec is decoded by one device, whole.
  monkeypatch.setattr(loading, '_load_codec', lambda *unused: PlainCodec())
  with pytest.raises(ValueError, match="decode=2 divides .* Wan's VAE; .*hiar"):
    loading.load(tmp_path / 'hiar', **own)
  plain = dataclasses.replace(stream_decoding_test.pipe(), codec=PlainCodec())
  with pytest.raises(ValueError, match='not with PlainCodec'):
    choices.apply(plain, tiles=2)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('stages=4', "'stages=4' is not AXIS=SIZE with an axis of"),
    ('stage=4,stage=2', 'names stage twice'),
    ('stage=0', 'stage=0 is below 1'),
    ('stage=4,tensor=4', 'needs 16 devices, and there are 8'),
    ('stage=4,tensor=2,decode=1', 'needs 9 devices, and there are 8'),
    ('stage=4,decode=5', 'needs 9 devices, and there are 8'),
  ],
)
def test_a_mesh_that_is_none_is_named(text, message):
  with pytest.raises(ValueError, match=message):
    meshes.make(meshes.parse(text))


def test_a_network_that_does_not_divide_is_named():
  mesh = meshes.make(meshes.parse('tensor=4'))
  with pytest.raises(ValueError, match='num_heads=2 is not divisible by'):
    stream('block_first', mesh)
  mesh = meshes.make(meshes.parse('stage=2'))
  with pytest.raises(ValueError, match='has no stages'):
    stream('block_first', mesh)
