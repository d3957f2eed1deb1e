"""A stream makes the blocks of the offline rollout, one after the other."""

import functools

import jax
import numpy as np
import pytest

from hiar_jax import codecs, noise_schedule, rollout, streaming
from hiar_jax.denoiser import Denoiser
from hiar_jax.models.config import WanConfig

LEVELS = noise_schedule.warped_levels((1000, 750, 500, 250), 5.0)
DENOISER = Denoiser(
  WanConfig(
    dim=32,
    ffn_dim=64,
    num_heads=2,
    num_layers=1,
    latent_height=2,
    latent_width=2,
    channels=4,
    freq_dim=16,
    text_dim=8,
    text_len=4,
  )
)


class PlainCodec:
  """Hands latents out as they are, so that tests see them."""

  def init_decode_state(self, batch_size):
    return ()

  def decode_stream(self, state, latents):
    return latents, state


jax.tree_util.register_static(PlainCodec)


@functools.cache
def params():
  leaves, treedef = jax.tree.flatten(DENOISER.init(jax.random.key(0)))
  rng = np.random.default_rng(0)
  return treedef.unflatten(
    [x + 0.2 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
  )


def encode(prompts):
  states = [np.random.default_rng(len(p)).normal(size=(4, 8)) for p in prompts]
  return np.stack(states).astype(np.float32)


@pytest.fixture(autouse=True)
def latents_instead_of_pixels(monkeypatch):
  monkeypatch.setattr(codecs, 'float_to_pixels', lambda video: video)


def make_stream(mode='batched', prompts=('a',), **kwargs):
  context = 'shared' if mode == 'shared' else 'matched'
  config = rollout.RolloutConfig(
    levels=LEVELS, window=6, sink=1, context=context
  )
  return streaming.Stream(
    streaming.Engine(DENOISER, config, mode),
    params(),
    PlainCodec(),
    encode,
    list(prompts),
    jax.random.split(jax.random.key(2), len(prompts)),
    **kwargs,
  )


def take(stream, num_blocks):
  return np.concatenate([next(stream) for _ in range(num_blocks)], 1)


def offline(mode, num_blocks, prompts=('a',)):
  context = 'shared' if mode == 'shared' else 'matched'
  config = rollout.RolloutConfig(
    levels=LEVELS, window=6, sink=1, context=context
  )
  text = DENOISER.project_text(params(), encode(prompts))
  keys = jax.random.split(jax.random.key(2), len(prompts))

  @jax.jit
  def run(params):
    return rollout.step_first(
      rollout.Sampler(DENOISER, params, text, config),
      rollout.named_noise(keys, (3, 2, 2, 4)),
      num_blocks,
    )

  return run(params())


@pytest.mark.parametrize('mode', streaming.MODES)
def test_stream_equals_the_offline_rollout(mode):
  prompts = ('a', 'bc')
  ours = take(make_stream(mode, prompts), 9)
  np.testing.assert_allclose(ours, offline(mode, 9, prompts), atol=1e-5)


@pytest.mark.parametrize('mode', ['batched', 'shared'])
def test_a_prompt_changes_the_video_from_its_block_on_and_not_before(mode):
  before = take(make_stream(mode), 8)
  stream = make_stream(mode)
  start = [next(stream) for _ in range(2)]
  block = stream.send('another one')
  rest = [next(stream) for _ in range(6)]
  after = np.concatenate(start + rest, 1)
  cut = 3 * block
  np.testing.assert_array_equal(after[:, :cut], before[:, :cut])
  assert np.abs(after[:, cut : cut + 3] - before[:, cut : cut + 3]).max() > 0.01


def test_many_prompt_changes_keep_every_block_at_its_own_prompt():
  # Every block has its own prompt; block b must equal that of a stream whose
  # prompts changed at the same blocks, however far ahead it was told.
  prompts = ['a' * (b + 1) for b in range(9)]
  one, two = make_stream(), make_stream('serial')
  videos = []
  for stream in (one, two):
    blocks = []
    for b in range(1, 9):
      stream.send(prompts[b])
      blocks.append(next(stream))
    videos.append(np.concatenate(blocks, 1))
  np.testing.assert_allclose(videos[0], videos[1], atol=1e-5)


def test_a_prompt_can_be_told_ahead_but_not_of_a_started_block():
  ahead, live = make_stream(), make_stream()
  ahead.send('another one', at=3)
  first = [next(live)]
  assert live.send('another one', at=3) == 3
  live = np.concatenate([*first, take(live, 5)], 1)
  np.testing.assert_array_equal(take(ahead, 6), live)
  with pytest.raises(ValueError, match=r'block 3 has been started.* 7'):
    ahead.send('too late', at=3)


@pytest.mark.parametrize('mode', ['batched', 'shared'])
def test_frame_300000_behaves_like_frame_0(mode):
  near = take(make_stream(mode), 8)
  far = take(make_stream(mode, origin=300_000), 8)
  np.testing.assert_allclose(far, near, atol=1e-4)


def test_a_stream_compiles_nothing_after_its_second_block():
  stream = make_stream()
  take(stream, 2)
  size = streaming._ticks._cache_size()
  take(stream, 6)
  assert streaming._ticks._cache_size() == size


@pytest.mark.parametrize(
  ('mode', 'context', 'message'),
  [
    ('fast', 'matched', "mode 'fast' is not one of"),
    ('shared', 'matched', 'does not go with context'),
    ('batched', 'shared', 'does not go with context'),
  ],
)
def test_an_engine_that_cannot_run_is_refused(mode, context, message):
  config = rollout.RolloutConfig(levels=LEVELS, context=context)
  with pytest.raises(ValueError, match=message):
    streaming.Engine(DENOISER, config, mode)
