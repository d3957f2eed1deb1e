"""A new prompt's keys for frames of the old one: as in a plain loop."""

import functools

import jax
import numpy as np
import pytest

from hiar_jax import noise_schedule, rollout
from hiar_jax.codecs import pixels
from hiar_jax.sampling import streaming
from tests import toy_network
from tests.plain_codec import PlainCodec
from tests.toy_network import CONFIG, DENOISER

LEVELS = noise_schedule.warped_levels((1000, 500), 5.0)
SIZE = 3
BLOCK_SHAPE = (SIZE, *toy_network.FRAME_SHAPE)


@pytest.fixture(autouse=True)
def latents_instead_of_pixels(monkeypatch):
  monkeypatch.setattr(pixels, 'from_float', lambda video: video)


def encode(prompts):
  shape = (CONFIG.text_len, CONFIG.text_dim)
  states = [np.random.default_rng(len(p)).normal(size=shape) for p in prompts]
  return np.stack(states).astype(np.float32)


def keys():
  return jax.random.split(jax.random.key(2), 1)


def make_stream(config, mode='block_first', **kwargs):
  return streaming.Stream(
    streaming.Engine(DENOISER, config, mode),
    toy_network.params(),
    PlainCodec(),
    encode,
    ['a'],
    keys(),
    **kwargs,
  )


@functools.partial(toy_network.jit, static_argnames='mask_shape')
def _flow(params, x, level, text, positions, past, *, mask_shape):
  mask = None if past is None else np.ones(mask_shape, bool)
  return DENOISER.flow(
    *(params, x, level, text),
    positions_F=positions,
    past=past,
    frame_mask=mask,
  )


class PlainLoop:
  """All frames of a video by their index; those of the window pass anew."""

  def __init__(self, config, prompt, frames):
    self.config, self.frames = config, np.moveaxis(frames, 1, 0)
    self.text = toy_network.jit(DENOISER.project_text)(
      toy_network.params(), encode([prompt])
    )

  def one_pass(self, x, level, positions, past):
    frames = 0 if past is None else past.k.shape[2] // CONFIG.tokens_per_frame
    return _flow(
      *(toy_network.params(), x, np.float32(level), self.text),
      *(np.array(positions, np.int32), past),
      mask_shape=(x.shape[1], x.shape[1] + frames),
    )

  def recached(self):
    """K/V of the window's frames, each group from those before it."""
    sink, slots = self.config.sink, self.config.past_frames
    count = len(self.frames)
    kept = [i for i in range(count) if i < sink or i >= count - slots + sink]
    at = kept
    if self.config.positions == 'bounded':
      at = range(count - len(kept), count)
    past = None
    edges = sorted({0, *range(len(kept) % SIZE, len(kept) + 1, SIZE)})
    for start, end in zip(edges[:-1], edges[1:], strict=True):
      x = np.stack([self.frames[i] for i in kept[start:end]], 1)
      _, kv = self.one_pass(x, 0.0, at[start:end], past)
      if past is not None:
        both = jax.tree.map(lambda *a: np.concatenate(a, 2), past, kv)
      past = kv if past is None else both
    return past

  def next_block(self, block):
    """Made from the recached past alone, [1, f, h, w, C]."""
    noise = rollout.named_noise(keys(), BLOCK_SHAPE)
    past, x = self.recached(), noise(0, block)
    at = range(len(self.frames), len(self.frames) + SIZE)
    sampler = rollout.Sampler(DENOISER, {}, self.text, self.config)
    for step in range(len(LEVELS) - 1):
      flow, _ = self.one_pass(x, LEVELS[step], at, past)
      x, _ = sampler.advance(x, flow, noise, step, block)
    return np.asarray(x)


@pytest.mark.parametrize(
  ('positions', 'sink', 'given', 'blocks'),
  [
    ('absolute', 3, 0, 1),
    ('absolute', 3, 0, 4),
    ('bounded', 3, 0, 4),
    ('absolute', 1, 1, 4),
    ('bounded', 0, 0, 5),
  ],
)
def test_recaching_equals_a_plain_loop_over_what_is_kept(
  positions, sink, given, blocks
):
  config = rollout.RolloutConfig(
    levels=LEVELS, window=12, sink=sink, positions=positions
  )
  initial = toy_network.latents(1, given) if given else None
  stream = make_stream(config, initial=initial)
  # One block is made ahead of those that are taken.
  before = [] if initial is None else [np.asarray(initial)]
  taken = [next(stream) for _ in range(blocks - 1)]
  stream.send('another', at=blocks, recache=True)
  taken += [next(stream) for _ in range(2)]

  def expected(prompt, block):
    frames = np.concatenate([*before, *taken[:block]], 1)
    return PlainLoop(config, prompt, frames).next_block(block)

  np.testing.assert_allclose(
    taken[blocks], expected('another', blocks), atol=2e-5
  )
  # A past that is kept makes another block.
  kept = make_stream(config, initial=initial)
  kept.send('another', at=blocks)
  last = [next(kept) for _ in range(blocks + 1)][-1]
  assert np.abs(last - taken[blocks]).max() > 1e-3
  # And so does the next switch, whose window has frames of both prompts.
  stream.send('third one', at=blocks + 2, recache=True)
  taken += [next(stream) for _ in range(2)]
  np.testing.assert_allclose(
    taken[blocks + 2], expected('third one', blocks + 2), atol=2e-5
  )


def test_recache_is_refused_where_pasts_are_of_other_levels():
  config = rollout.RolloutConfig(levels=LEVELS, window=12)
  with pytest.raises(ValueError, match="recache goes with mode 'block_first'"):
    make_stream(config, 'batched').send('another', recache=True)


def test_the_same_prompt_recached_before_the_window_is_full_changes_nothing():
  config = rollout.RolloutConfig(levels=LEVELS, window=12)
  plain, again = make_stream(config), make_stream(config)
  again.send('a', at=2, recache=True)
  for _ in range(4):
    np.testing.assert_allclose(next(again), next(plain), atol=1e-5)
