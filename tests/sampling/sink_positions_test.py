"""A sink at bounded positions: as in a loop that places its keys anew."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax import noise_schedule, rollout
from hiar_jax.models import kv_cache, rope
from hiar_jax.models.kv_cache import KV
from tests import toy_network
from tests.toy_network import CONFIG, DENOISER

LEVELS = noise_schedule.warped_levels((1000, 500), 5.0)
SIZE, BLOCKS, TOKENS = 3, 6, CONFIG.tokens_per_frame
BLOCK_SHAPE = (SIZE, *toy_network.FRAME_SHAPE)


def noise():
  keys = jax.random.split(jax.random.key(5), 1)
  return rollout.named_noise(keys, BLOCK_SHAPE)


def sampler(window, sink, positions):
  config = rollout.RolloutConfig(
    levels=LEVELS, window=window, sink=sink, positions=positions
  )
  params, text = toy_network.params(), toy_network.text(1)
  return rollout.Sampler(DENOISER, params, text, config)


@functools.cache
def made(window, sink, positions):
  own = sampler(window, sink, positions)
  run = toy_network.jit(lambda: rollout.block_first(own, noise(), BLOCKS))
  return np.asarray(run())


def placed_anew(k_NTHK, frames):
  """Keys moved by so many frames, in float64 complex numbers."""
  pairs = CONFIG.head_dim // 2
  turned = rope.pair_split(CONFIG.head_dim)[0]
  angles = np.zeros(pairs)
  angles[:turned] = frames * rope.frequencies(turned)
  z = k_NTHK[..., 0::2] + 1j * k_NTHK[..., 1::2].astype(np.complex128)
  z = z * np.exp(1j * angles)
  return np.stack([z.real, z.imag], -1).reshape(k_NTHK.shape)


class PlainLoop:
  """Blocks one after the other; every frame's keys with their position."""

  def __init__(self, window, sink):
    self.slots, self.sink = window - SIZE, sink
    self.frames = []  # (k, v, position) of each, [N, 1, P, H, K].

  def seen(self):
    """What is kept of the frames, in order, at positions 0, 1, ..."""
    kept = self.frames[: self.sink]
    rest = self.frames[self.sink :]
    ring = self.slots - self.sink
    kept = kept + (rest[-ring:] if ring else [])
    return [
      (placed_anew(k, to - position), v)
      for to, (k, v, position) in enumerate(kept)
    ]

  def one_pass(self, x, level):
    seen = self.seen()
    given = x, np.float32(level), toy_network.params(), toy_network.text(1)
    if not seen:
      return _first_pass(*given)
    k, v = (np.concatenate(a, 2) for a in zip(*seen, strict=True))
    return _pass(*given, len(seen), KV(k=k.astype(np.float32), v=v))

  def run(self):
    video = []
    for block in range(BLOCKS):
      x = np.asarray(noise()(0, block))
      for step in range(len(LEVELS) - 1):
        flow, _ = self.one_pass(x, LEVELS[step])
        x0 = x - LEVELS[step] * np.asarray(flow)
        eps = np.asarray(noise()(step + 1, block))
        x = (1 - LEVELS[step + 1]) * x0 + LEVELS[step + 1] * eps
      start = len(self.seen())
      _, kv = self.one_pass(x, 0.0)
      k, v = np.asarray(kv.k), np.asarray(kv.v)
      for i in range(SIZE):
        own = slice(i * TOKENS, (i + 1) * TOKENS)
        self.frames.append((k[:, :, own], v[:, :, own], start + i))
      video.append(x)
    return np.concatenate(video, 1)


@toy_network.jit
def _first_pass(x, level, params, text):
  return DENOISER.flow(params, x, level, text, positions_F=jnp.arange(SIZE))


@toy_network.jit
def _pass(x, level, params, text, start, past):
  frames = past.k.shape[2] // TOKENS
  return DENOISER.flow(
    *(params, x, level, text),
    positions_F=start + jnp.arange(SIZE),
    past=past,
    frame_mask=np.ones((SIZE, SIZE + frames), bool),
  )


@pytest.mark.parametrize(('window', 'sink'), [(9, 3), (9, 1), (6, 3)])
def test_a_bounded_sink_equals_a_loop_that_places_its_keys_anew(window, sink):
  expected = PlainLoop(window, sink).run()
  ours = made(window, sink, 'bounded')
  np.testing.assert_allclose(ours, expected, atol=2e-5)
  # The same as absolute until the window is full, and not after.
  absolute, full = made(window, sink, 'absolute'), window
  np.testing.assert_allclose(ours[:, :full], absolute[:, :full], atol=1e-6)
  assert np.abs(ours - absolute).max() > 1e-3


def _flow_at(own, blocks_before):
  past, frames = own.empty_past(), toy_network.latents(1, 12)
  past = own.anchor(past, frames[:, :3])
  # As if so many blocks had been made since; their slots are written anew.
  past = past.replace(frames=SIZE * (blocks_before - 1))
  past = own.anchor(past, frames[:, 3:9])
  return own.denoise(toy_network.latents(1, SIZE, seed=4), past, 0)[0]


@pytest.mark.parametrize('positions', ['bounded', 'absolute'])
def test_blocks_10_1000_and_100000_are_alike(positions):
  own = sampler(9, 3, positions)
  run = toy_network.jit(functools.partial(_flow_at, own))
  flows = [np.asarray(run(b)) for b in (10, 1_000, 100_000)]
  off = max(np.abs(flow - flows[0]).max() for flow in flows[1:])
  assert (off < 1e-5) == (positions == 'bounded'), off


def test_the_sink_of_one_of_several_caches_is_its_own():
  caches = jax.tree.map(
    lambda *a: jnp.stack(a),
    *(
      kv_cache.init_cache(CONFIG, 1, 6, 3, bounded=True).replace(
        frames=jnp.int32(frames)
      )
      for frames in (3, 6, 10)
    ),
  )
  shifts = [kv_cache.Picked(caches, jnp.int32(i)).sink_shift for i in range(3)]
  assert list(map(int, shifts)) == [0, 0, 4]
