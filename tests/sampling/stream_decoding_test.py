"""A stream's pixels are a call's, with a decoder that looks at the past.

Latents are compared in streaming_test.py. Here the codec is the video VAE,
whose decoder has a state: what a block looks like depends on those before it.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from hiar_jax import noise_schedule, rollout
from hiar_jax.codecs import vae as codecs_vae
from hiar_jax.denoiser import Denoiser
from hiar_jax.models import vae
from hiar_jax.models.config import WanConfig
from hiar_jax.sampling import decoding, meshes, video_pipeline
from hiar_jax.text import word_hash
from tests import toy_network

VAE = vae.VAEConfig(
  base_dim=4,
  z_dim=4,
  dim_mult=(1, 1),
  num_res_blocks=1,
  temporal_downsample=(True,),
  mean=(0.0,) * 4,
  std=(1.0,) * 4,
)
DENOISER = Denoiser(
  WanConfig(
    dim=32,
    ffn_dim=64,
    num_heads=2,
    num_layers=1,
    latent_height=4,
    latent_width=4,
    channels=4,
    freq_dim=16,
    text_dim=8,
    text_len=4,
  )
)
PROMPT, OTHER = 'a red disc', 'two green squares'


@functools.cache
def pipe(context='matched', sink=0):
  params = jax.tree.map(
    jax.numpy.asarray, toy_network.draw_params(DENOISER, scale=0.2)
  )
  return video_pipeline.VideoPipeline(
    name='tiny',
    denoiser=DENOISER,
    params=params,
    encoder=word_hash.WordHashEncoder(8, 4),
    codec=codecs_vae.VAECodec(vae.init(VAE, jax.random.key(1)), VAE),
    rollout=rollout.RolloutConfig(
      levels=noise_schedule.warped_levels((1000, 500), 5.0),
      frames_per_block=2,
      window=6,
      sink=sink,
      context=context,
    ),
    order='step_first',
    fps=8.0,
    schedule={'shift': 5.0, 'indices': (1000, 500)},
  )


def picture(num_frames):
  return np.random.default_rng(3).integers(
    *(0, 256, (num_frames, 8, 8, 3)), np.uint8
  )


def streamed(stream, num_blocks):
  """Frames of one sample, the given ones first."""
  blocks = [] if stream.given is None else [stream.given]
  blocks += [next(stream) for _ in range(num_blocks)]
  return np.concatenate(blocks, 1)[0]


def assert_same_pixels(ours, theirs):
  assert ours.shape == theirs.shape
  # A value on the edge of rounding may fall to either side.
  assert np.abs(ours.astype(int) - theirs).max() <= 1


@pytest.mark.parametrize('num_given', [0, 1, 3, 5])
@pytest.mark.parametrize(
  ('mode', 'sink'),
  [('batched', 0), ('serial', 1), ('shared', 1), ('block_first', 1)],
)
def test_a_stream_shows_what_a_call_shows(mode, sink, num_given):
  own = pipe('shared' if mode == 'shared' else 'matched', sink)
  given = picture(num_given) if num_given else None
  order = 'block_first' if mode == 'block_first' else 'step_first'
  video = own(
    *(PROMPT,),
    **dict(num_blocks=5, seed=2, order=order, progress=False),
    initial_frames=given,
  )
  stream = own.stream(PROMPT, seed=2, mode=mode, initial_frames=given)
  frames = streamed(stream, 5)
  assert len(frames) == num_given + 5 * 4 - (0 if num_given else 1)
  assert_same_pixels(frames, video.frames)


def test_tiles_show_the_same():
  given = picture(3)
  video = pipe()(PROMPT, num_blocks=2, initial_frames=given, progress=False)
  tiled = pipe()(
    *(PROMPT,),
    **dict(num_blocks=2, initial_frames=given, tiles=2, progress=False),
  )
  assert_same_pixels(tiled.frames, video.frames)
  stream = pipe().stream(PROMPT, initial_frames=given, tiles=3)
  assert set(stream._decoder) == {'front', 'bands'}
  assert_same_pixels(streamed(stream, 2), video.frames)
  with pytest.raises(ValueError, match='5 tiles of frames that have 4 rows'):
    pipe()(PROMPT, tiles=5)


def test_devices_that_share_a_frame_show_the_same():
  given = picture(3)
  video = pipe()(PROMPT, num_blocks=2, initial_frames=given, progress=False)
  sizes = meshes.parse('stage=2,decode=2')
  beside = dataclasses.replace(
    pipe(),
    mesh=meshes.make(sizes),
    codec=pipe().codec.divided(meshes.decoders(sizes), 4),
  )
  stream = beside.stream(PROMPT, initial_frames=given, tiles=2)
  assert_same_pixels(streamed(stream, 2), video.frames)
  decoded = {d for a in jax.tree.leaves(stream._decoder) for d in a.devices()}
  assert decoded == set(jax.devices()[2:4])


def test_given_frames_are_those_of_the_codec():
  given = picture(3)
  stream = pipe().stream(PROMPT, initial_frames=given)
  latents = pipe().encode(given)
  decoded, _ = decoding.decode_blocks(pipe().codec, latents, 2)
  np.testing.assert_array_equal(stream.given, decoded)
  assert np.abs(stream.given[0].astype(int) - given).max() > 0


def test_several_samples_go_on_from_the_same_frames():
  given = picture(1)
  stream = pipe().stream([PROMPT, OTHER], seed=2, initial_frames=given)
  both = np.concatenate([stream.given, next(stream)], 1)
  alone = streamed(pipe().stream(PROMPT, seed=2, initial_frames=given), 1)
  assert_same_pixels(both[0], alone)
  np.testing.assert_array_equal(both[0, :1], both[1, :1])
  assert np.abs(both[0].astype(int) - both[1]).max() > 10


@pytest.mark.parametrize('devices', [1, 2])
def test_stages_on_devices_show_the_same(devices):
  mesh = jax.make_mesh(
    (devices,),
    ('stage',),
    axis_types=(AxisType.Auto,),
    # Not the first: what is decoded must follow the blocks.
    devices=jax.devices()[1 : 1 + devices],
  )
  given = picture(3)
  video = pipe()(
    PROMPT, num_blocks=3, seed=2, initial_frames=given, progress=False
  )
  stream = pipe().stream(PROMPT, seed=2, mesh=mesh, initial_frames=given)
  assert_same_pixels(streamed(stream, 3), video.frames)


@pytest.mark.parametrize('mode', ['batched', 'shared'])
def test_a_prompt_switch_leaves_the_frames_before_it_alone(mode):
  own = pipe('shared' if mode == 'shared' else 'matched')
  given = picture(1)
  before = streamed(own.stream(PROMPT, mode=mode, initial_frames=given), 5)
  stream = own.stream(PROMPT, mode=mode, initial_frames=given)
  stream.send(OTHER, at=3)
  after = streamed(stream, 5)
  cut = 1 + 3 * 4
  np.testing.assert_array_equal(after[:cut], before[:cut])
  assert np.abs(after[cut:].astype(int) - before[cut:]).max() > 10


@pytest.mark.parametrize('recache', [False, True])
def test_weights_of_the_block_first_order_stream_in_it(recache):
  own = dataclasses.replace(pipe(), order='block_first')
  stream = own.stream(PROMPT, seed=2, window=4)
  assert stream.mode == 'block_first'
  stream.send(OTHER, at=2, recache=recache)
  video = own(PROMPT, num_blocks=4, seed=2, window=4, progress=False)
  frames = streamed(stream, 4)
  assert_same_pixels(frames[:7], video.frames[:7])
  assert np.abs(frames[7:].astype(int) - video.frames[7:]).max() > 5


def test_an_order_and_a_mode_that_are_chosen_go_together():
  with pytest.raises(ValueError, match="'block_first' is not that of stream"):
    pipe().stream(PROMPT, order='block_first', mode='batched')


@pytest.mark.parametrize(
  'chosen',
  [
    {'frames_per_block': 1, 'steps': (1000, 750, 500)},
    {'window': 4, 'height': 16, 'width': 24, 'positions': 'bounded'},
  ],
)
def test_what_is_chosen_of_a_stream_is_chosen_of_a_call(chosen):
  chosen = chosen | {'order': 'block_first'}
  video = pipe()(PROMPT, num_blocks=4, seed=2, progress=False, **chosen)
  frames = streamed(pipe().stream(PROMPT, seed=2, **chosen), 4)
  assert_same_pixels(frames, video.frames)
