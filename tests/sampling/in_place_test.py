"""Streams whose passes write their window where it lies."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from hiar_jax import noise_schedule, rollout
from hiar_jax.codecs import pixels
from hiar_jax.denoiser import Denoiser
from hiar_jax.sampling import passes, streaming
from tests import toy_network
from tests.plain_codec import PlainCodec

CONFIG = dataclasses.replace(
  toy_network.CONFIG, unroll=toy_network.CONFIG.num_layers
)
DENOISER = Denoiser(CONFIG)
LEVELS = noise_schedule.warped_levels((1000, 700, 400), 5.0)


@pytest.fixture(autouse=True)
def latents_instead_of_pixels(monkeypatch):
  monkeypatch.setattr(pixels, 'from_float', lambda video: video)


@functools.cache
def params():
  return jax.tree.map(jnp.asarray, toy_network.draw_params(DENOISER))


def encode(prompts):
  shape = (CONFIG.text_len, CONFIG.text_dim)
  states = [np.random.default_rng(len(p)).normal(size=shape) for p in prompts]
  return np.stack(states).astype(np.float32)


def rollout_config(mode, **changes):
  context = 'shared' if mode == 'shared' else 'matched'
  sizes = {'frames_per_block': 2, 'window': 6, 'sink': 1} | changes
  return rollout.RolloutConfig(levels=LEVELS, context=context, **sizes)


def initial(given, batch):
  if not given:
    return None
  shape = (batch, given, *toy_network.FRAME_SHAPE)
  return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def stage_mesh(size):
  kinds = (AxisType.Auto,)
  devices = jax.devices()[:size]
  return jax.make_mesh((size,), ('stage',), axis_types=kinds, devices=devices)


def make_stream(
  mode, prompts=('a', 'bc'), mesh=None, given=0, num_blocks=None, **changes
):
  engine = streaming.Engine(
    DENOISER, rollout_config(mode, **changes), mode, mesh, in_place=True
  )
  return streaming.Stream(
    *(engine, params(), PlainCodec(), encode, list(prompts)),
    jax.random.split(jax.random.key(2), len(prompts)),
    initial=initial(given, len(prompts)),
    num_blocks=num_blocks,
  )


def take(stream, num_blocks):
  return np.concatenate([next(stream) for _ in range(num_blocks)], 1)


def offline(mode, num_blocks, prompts=('a', 'bc'), given=0, **changes):
  config = rollout_config(mode, **changes)
  text = DENOISER.project_text(params(), encode(prompts))
  keys = jax.random.split(jax.random.key(2), len(prompts))
  order = 'block_first' if mode == 'block_first' else 'step_first'
  shape = config.block_shape(CONFIG)

  @toy_network.jit
  def run(params):
    return getattr(rollout, order)(
      rollout.Sampler(DENOISER, params, text, config),
      rollout.named_noise(keys, shape),
      num_blocks,
      initial(given, len(prompts)),
    )

  return run(params())[:, given:]


# Given: nothing, one image, more than the window holds.
@pytest.mark.parametrize(
  ('mode', 'given'), [('serial', 1), ('shared', 0), ('block_first', 7)]
)
def test_a_stream_pass_by_pass_equals_the_offline_rollout(mode, given):
  ours = take(make_stream(mode, given=given), 6)
  np.testing.assert_allclose(ours, offline(mode, 6, given=given), atol=1e-5)


def test_at_its_end_a_stream_makes_the_passes_of_its_last_block_alone(
  monkeypatch,
):
  made = []

  def count(name):
    whole = getattr(passes.Passes, name)

    def counted(*arguments):
      made.append(name)
      return whole(*arguments)

    monkeypatch.setattr(passes.Passes, name, counted)

  count('_denoise')
  count('_commit')
  ours = np.concatenate([*make_stream('serial', num_blocks=3)], 1)
  np.testing.assert_allclose(ours, offline('serial', 3), atol=1e-5)
  steps = rollout_config('serial').num_steps
  assert made.count('_denoise') == steps * 3
  assert made.count('_commit') == steps * 2


def test_stages_that_write_in_place_equal_the_offline_rollout():
  ours = take(make_stream('batched', mesh=stage_mesh(3), given=1), 6)
  expected = offline('batched', 6, given=1)
  np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_recaching_equals_that_of_a_stream_that_copies():
  def blocks(stream):
    stream.send('another', at=5, recache=True)
    return take(stream, 8)

  ours = make_stream('block_first', ('a',))
  engine = streaming.Engine(DENOISER, ours.engine.config, 'block_first')
  theirs = streaming.Stream(
    *(engine, params(), PlainCodec(), encode, ['a']),
    jax.random.split(jax.random.key(2), 1),
  )
  np.testing.assert_allclose(blocks(ours), blocks(theirs), atol=2e-5)


def test_in_place_is_refused_where_a_past_is_read_otherwise_than_written():
  bounded = dict(positions='bounded', sink=2)
  for mode, changes, why in (
    ('batched', {}, 'a batch share their passes'),
    ('serial', {'past_dtype': 'int8'}, 'held as int8'),
    ('serial', bounded, 'other positions'),
  ):
    with pytest.raises(ValueError, match=why):
      make_stream(mode, **changes)
  scanned = Denoiser(toy_network.CONFIG)
  engine = streaming.Engine(scanned, rollout_config('serial'), 'serial')
  with pytest.raises(ValueError, match='layers are not apart'):
    dataclasses.replace(engine, in_place=True)
  assert engine.written_in_place().by_pass
