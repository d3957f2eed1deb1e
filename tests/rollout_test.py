"""The orders of denoising against their definitions, one pass at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax import noise_schedule, rollout
from hiar_jax.models.config import WanConfig
from hiar_jax.models.kv_cache import KV, Picked
from tests import toy_network
from tests.toy_network import CONFIG, DENOISER

LEVELS = noise_schedule.warped_levels((1000, 667, 333), 5.0)
STEPS, BLOCKS, SIZE, BATCH = len(LEVELS) - 1, 3, 3, 2
TOKENS = CONFIG.tokens_per_frame
BLOCK_SHAPE = (SIZE, *toy_network.FRAME_SHAPE)


def keys(batch: int) -> jax.Array:
  return jax.random.split(jax.random.key(5), 3)[:batch]


def noise_of(batch: int) -> rollout.Noise:
  return rollout.named_noise(keys(batch), BLOCK_SHAPE)


@toy_network.jit
def noise_bank():
  """All noise that a rollout may ask for, [level, block, B, ...]."""
  both = jax.vmap(jax.vmap(noise_of(BATCH), (None, 0)), (0, None))
  return both(jnp.arange(STEPS + 1), jnp.arange(BLOCKS))


@toy_network.jit
def network_pass(params, text, x, level, positions, past, visible_S):
  """Flow and K/V of frames that see themselves and some frames of `past`."""
  num_frames = positions.shape[0]
  visible = jnp.broadcast_to(visible_S, (num_frames, visible_S.shape[0]))
  own = jnp.ones((num_frames, num_frames), bool)
  return DENOISER.flow(
    params,
    x,
    level,
    text,
    positions_F=positions,
    past=past,
    frame_mask=jnp.concatenate([own, visible], 1),
  )


class PlainLoop:
  """The definitions, with all K/V in frame order instead of a ring.

  Attributes:
    x: block -> its latents now.
  """

  def __init__(self, given=None, window=12, sink=0, stepping='sde'):
    self.window, self.sink, self.stepping = window, sink, stepping
    self.given = given
    self.first = 0 if given is None else given.shape[1]
    self.noise = np.asarray(noise_bank())
    self.x = list(self.noise[0])

  def empty(self) -> KV:
    """A past of every frame, of which none is seen before it is written."""
    frames = self.first + BLOCKS * SIZE
    shape = (2, BATCH, frames * TOKENS, 2, CONFIG.head_dim)
    past = KV(np.full(shape, 1e3, np.float32), np.full(shape, 1e3, np.float32))
    if self.given is not None:
      self._write(past, self._pass(self.given, 0.0, 0, past)[1], 0)
    return past

  def _pass(self, x, level, start, past):
    frames = np.arange(past.k.shape[2] // TOKENS)
    end = start + x.shape[1]
    seen = (frames >= end - self.window + self.sink) | (frames < self.sink)
    visible = (frames < start) & seen
    positions = start + np.arange(x.shape[1], dtype=np.int32)
    flow, kv = network_pass(
      toy_network.params(),
      toy_network.text(BATCH),
      x,
      np.float32(level),
      positions,
      past,
      visible,
    )
    return np.asarray(flow), kv

  def _write(self, past, kv, start):
    tokens = slice(start * TOKENS, start * TOKENS + kv.k.shape[2])
    past.k[:, :, tokens], past.v[:, :, tokens] = kv.k, kv.v

  def denoise(self, block, step, past):
    """D and the step to t_{step+1}: (x at that level, x0, K/V)."""
    x, sigma, after = self.x[block], LEVELS[step], LEVELS[step + 1]
    flow, kv = self._pass(x, sigma, self.first + block * SIZE, past)
    x0 = x - sigma * flow
    if self.stepping == 'ode':
      return x + (after - sigma) * flow, x0, kv
    eps = self.noise[step + 1, block]
    return (1 - after) * x0 + after * eps, x0, kv

  def commit(self, block, x, level, past):
    """C, written into `past`."""
    start = self.first + block * SIZE
    self._write(past, self._pass(x, level, start, past)[1], start)

  def sweep(self, blocks, steps, past, context='matched'):
    for block in blocks:
      for step in steps:
        seen = self.x[block]
        self.x[block], x0, _ = self.denoise(block, step, past)
      if context == 'clean':
        self.commit(block, x0, 0.0, past)
      elif context == 'input':
        self.commit(block, seen, LEVELS[steps[-1]], past)
      else:
        self.commit(block, self.x[block], LEVELS[steps[-1] + 1], past)

  def video(self):
    blocks = [] if self.given is None else [self.given]
    return np.concatenate([*blocks, *self.x], 1)


def plain_step_first(loop, context='matched'):
  for step in range(STEPS):
    loop.sweep(range(BLOCKS), [step], loop.empty(), context)


def plain_block_first(loop):
  loop.sweep(range(BLOCKS), range(STEPS), loop.empty())


def plain_hybrid_blocks(loop):
  """The first block to its end; then it stands, clean, in every past."""
  loop.sweep([0], range(STEPS), loop.empty())
  for step in range(STEPS):
    past = loop.empty()
    loop.commit(0, loop.x[0], 0.0, past)
    loop.sweep([1, 2], [step], past)


def plain_hybrid_steps(loop):
  """Two steps of each block at a time, and the last one step-first."""
  loop.sweep(range(BLOCKS), [0, 1], loop.empty())
  loop.sweep(range(BLOCKS), [2], loop.empty())


def plain_shared(loop):
  """One past per step; D(b, j + 1) is the commit of step j."""
  pasts = [loop.empty() for _ in range(STEPS)]
  for block in range(BLOCKS):
    start = loop.first + block * SIZE
    kvs = []
    for step in range(STEPS):
      loop.x[block], _, kv = loop.denoise(block, step, pasts[step])
      kvs.append(kv)
    loop.commit(block, loop.x[block], 0.0, pasts[-1])
    for step in range(STEPS - 1):
      loop._write(pasts[step], kvs[step + 1], start)


WIDE = {'window': 12}
EULER = {'window': 12, 'stepping': 'ode'}
NARROW = {'window': 6, 'sink': 1}
IMAGE = {'given': np.asarray(toy_network.latents(BATCH, 1, seed=9))}
VIDEO = {'given': np.asarray(toy_network.latents(BATCH, 3, seed=8))}


@functools.cache
def program(make, config):
  """A rollout, compiled once for all tests that ask for it."""

  def run(params, text, given):
    sampler = rollout.Sampler(DENOISER, params, text, config)
    return make(sampler, noise_of(BATCH), BLOCKS, given)

  return toy_network.jit(run)


def ours(make, given=None, **settings):
  config = rollout.RolloutConfig(levels=LEVELS, **settings)
  text = toy_network.text(BATCH)
  return np.asarray(program(make, config)(toy_network.params(), text, given))


one_block_before = functools.partial(rollout.hybrid, anchor_blocks=1)
two_steps_before = functools.partial(rollout.hybrid, block_first_steps=2)


@pytest.mark.parametrize(
  ('make', 'plain', 'settings', 'context'),
  [
    (rollout.step_first, plain_step_first, WIDE, 'matched'),
    (
      rollout.step_first,
      plain_step_first,
      WIDE | {'stepping': 'ode'},
      'matched',
    ),
    (rollout.step_first, plain_step_first, NARROW | IMAGE, 'matched'),
    (
      rollout.step_first,
      functools.partial(plain_step_first, context='clean'),
      NARROW,
      'clean',
    ),
    (
      rollout.step_first,
      functools.partial(plain_step_first, context='input'),
      NARROW | IMAGE,
      'input',
    ),
    (rollout.block_first, plain_block_first, WIDE, 'input'),
    (rollout.step_first, plain_shared, WIDE, 'shared'),
    (rollout.step_first, plain_shared, NARROW | IMAGE, 'shared'),
    (rollout.block_first, plain_block_first, NARROW | IMAGE, 'matched'),
    (one_block_before, plain_hybrid_blocks, NARROW | VIDEO, 'matched'),
    (two_steps_before, plain_hybrid_steps, NARROW | IMAGE, 'matched'),
  ],
)
def test_every_order_equals_a_plain_loop_of_its_definition(
  make, plain, settings, context
):
  loop = PlainLoop(**settings)
  plain(loop)
  video = ours(make, context=context, **settings)
  np.testing.assert_allclose(video, loop.video(), atol=1e-4)


def test_the_orders_differ():
  videos = [
    ours(rollout.step_first, **WIDE),
    ours(rollout.step_first, context='shared', **WIDE),
    ours(rollout.step_first, **EULER),
  ]
  for i, one in enumerate(videos):
    for other in videos[:i]:
      assert np.abs(one - other).max() > 1e-2


def test_a_sample_does_not_depend_on_its_batch():
  params, text = toy_network.params(), toy_network.text(3)
  config = rollout.RolloutConfig(levels=LEVELS, **WIDE)

  @toy_network.jit
  def run(params, keys_B, text):
    sampler = rollout.Sampler(DENOISER, params, text, config)
    noise = rollout.named_noise(keys_B, BLOCK_SHAPE)
    return rollout.step_first(sampler, noise, BLOCKS)

  together = run(params, keys(3), text)
  for i in range(3):
    of_one = jax.tree.map(lambda leaf, i=i: leaf[:, i : i + 1], text)
    alone = run(params, keys(3)[i : i + 1], of_one)
    np.testing.assert_allclose(alone[0], together[i], atol=1e-5)


def test_noise_follows_from_its_name_alone():
  noise = noise_of(3)
  forward = [np.asarray(noise(j, b)) for j in range(2) for b in range(2)]
  backward = [np.asarray(noise(j, b)) for j in (1, 0) for b in (1, 0)]
  np.testing.assert_array_equal(forward, backward[::-1])
  assert len({draw.tobytes() for draws in forward for draw in draws}) == 12
  traced = jax.jit(noise)(1, 0)
  np.testing.assert_array_equal(traced, forward[2])


BY_STEP = [(b, j) for j in range(STEPS) for b in range(BLOCKS)]
BY_BLOCK = sorted(BY_STEP)
LAST_STEP = [(b, STEPS - 1) for b in range(BLOCKS)]
REACHED = lambda step: LEVELS[step + 1]
CLEAN = lambda step: 0.0
OWN = lambda step: LEVELS[step]


@dataclasses.dataclass(frozen=True)
class LevelsAsKV:
  """Stands for a denoiser: each pass's K/V say the level it was told.

  Attributes:
    passes: (level told, levels found in the past) of each pass.
  """

  config: WanConfig
  passes: list

  def flow(self, params, x, sigma, text, *, past):
    del params, text
    if isinstance(past, Picked):
      past = past.cut_out()
    seen = np.asarray(past.k)[
      0, 0, : int(past.filled) * past.tokens_per_frame, 0, 0
    ]
    self.passes.append((float(sigma), seen))
    tokens = x.shape[1] * self.config.tokens_per_frame
    shape = (*past.k.shape[:2], tokens, *past.k.shape[3:])
    kv = np.full(shape, sigma, np.float32)
    return jnp.zeros_like(x), KV(kv, kv)


@pytest.mark.parametrize(
  ('make', 'context', 'order', 'commits', 'level_of_past'),
  [
    (rollout.step_first, 'matched', BY_STEP, BY_STEP, REACHED),
    (rollout.step_first, 'clean', BY_STEP, BY_STEP, CLEAN),
    (rollout.step_first, 'input', BY_STEP, BY_STEP, OWN),
    (rollout.step_first, 'shared', BY_BLOCK, LAST_STEP, REACHED),
    (rollout.block_first, 'matched', BY_BLOCK, LAST_STEP, CLEAN),
  ],
)
def test_each_denoise_pass_sees_earlier_blocks_at_the_level_of_the_context(
  make, context, order, commits, level_of_past
):
  denoiser = LevelsAsKV(CONFIG, [])
  config = rollout.RolloutConfig(levels=LEVELS, context=context, **WIDE)
  sampler = rollout.Sampler(denoiser, {}, toy_network.text(1), config)
  # Eager, so that the stand-in sees numbers.
  with jax.disable_jit():
    make(sampler, noise_of(1), BLOCKS)
  passes = iter(denoiser.passes)
  for block, step in order:
    level, seen = next(passes)
    assert level == np.float32(LEVELS[step])
    assert seen.size == block * SIZE * TOKENS
    np.testing.assert_array_equal(seen, np.float32(level_of_past(step)))
    # The last block's are read by none.
    if (block, step) in commits and block < BLOCKS - 1:
      next(passes)
  assert not list(passes)


@pytest.mark.parametrize(
  ('make', 'passes'),
  [
    # One block of S + 1 passes; two of 2S, but for the last one's commits.
    (one_block_before, STEPS + 1 + STEPS * (2 * 2 - 1)),
    # Two steps and a commit a block, then 2 (S - 2); less the last one's.
    (two_steps_before, BLOCKS * 3 - 1 + (STEPS - 2) * (2 * BLOCKS - 1)),
  ],
)
def test_the_hybrid_orders_commit_every_block_once(make, passes):
  denoiser = LevelsAsKV(CONFIG, [])
  config = rollout.RolloutConfig(levels=LEVELS, **WIDE)
  sampler = rollout.Sampler(denoiser, {}, toy_network.text(1), config)
  with jax.disable_jit():
    make(sampler, noise_of(1), BLOCKS)
  assert len(denoiser.passes) == passes


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'levels': (1.0, 0.5)}, r'\(1.0, 0.5\) do not end with 0'),
    ({'frames_per_block': 0}, 'frames_per_block=0 is below 1'),
    ({'window': 7}, 'window=7 is not a positive multiple of .*=3'),
    ({'window': 6, 'sink': 4}, r'sink=4 is not within 0..3.*window=6'),
    ({'stepping': 'heun'}, "stepping='heun' is not one of"),
    ({'context': 'noisy'}, "context='noisy' is not one of"),
  ],
)
def test_settings_that_do_not_fit_are_refused_with_their_values(
  settings, message
):
  with pytest.raises(ValueError, match=message):
    rollout.RolloutConfig(**({'levels': LEVELS} | settings))


@pytest.mark.parametrize(
  ('arguments', 'context', 'message'),
  [
    ({}, 'matched', 'not 0 and 0'),
    ({'anchor_blocks': 1, 'block_first_steps': 2}, 'matched', 'not 1 and 2'),
    ({'anchor_blocks': 4}, 'matched', r'anchor_blocks=4 not in 0..3'),
    ({'block_first_steps': 4}, 'matched', r'block_first_steps=4 not in 0..3'),
    ({'anchor_blocks': 1}, 'shared', "no context 'shared'"),
  ],
)
def test_hybrids_that_mean_nothing_are_refused(arguments, context, message):
  config = rollout.RolloutConfig(levels=LEVELS, context=context)
  sampler = rollout.Sampler(DENOISER, {}, toy_network.text(1), config)
  with pytest.raises(ValueError, match=message):
    rollout.hybrid(sampler, noise_of(1), BLOCKS, **arguments)
