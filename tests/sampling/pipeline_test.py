"""The pipeline makes what the step-first rollout makes, tick by tick."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from hiar_jax import noise_schedule, rollout
from hiar_jax.denoiser import Denoiser
from hiar_jax.models.config import WanConfig
from hiar_jax.sampling import pipeline
from tests import toy_network

LEVELS = noise_schedule.warped_levels((1000, 750, 500, 250), 5.0)
DENOISER = Denoiser(
  WanConfig(
    dim=32,
    ffn_dim=64,
    num_heads=2,
    num_layers=2,
    latent_height=4,
    latent_width=4,
    channels=4,
    freq_dim=16,
    text_dim=8,
    text_len=4,
  )
)
BLOCK = (3, 4, 4, 4)


# The most blocks and samples of a comparison; fewer are a part of these.
BLOCKS, BATCH = 7, 3


@functools.cache
def params():
  return toy_network.draw_params(DENOISER, scale=0.2)


@functools.cache
def prompts(batch):
  states = np.random.default_rng(1).normal(size=(BATCH, 4, 8))
  return jax.jit(DENOISER.project_text)(
    params(), states[:batch].astype(np.float32)
  )


def keys(batch):
  return jax.random.split(jax.random.key(2), BATCH)[:batch]


def stage_mesh(devices):
  return jax.make_mesh(
    (devices,),
    ('stage',),
    axis_types=(AxisType.Auto,),
    devices=jax.devices()[:devices],
  )


@functools.cache
def reference(config, batch, num_blocks, given=0):
  initial = given_frames(given) if given else None

  @jax.jit
  def run(params, text):
    sampler = rollout.Sampler(DENOISER, params, text, config)
    noise = rollout.named_noise(keys(batch), BLOCK)
    return rollout.step_first(sampler, noise, num_blocks, initial)

  return np.asarray(run(params(), prompts(batch)))


def step_first(config, batch, num_blocks):
  """The start of one long rollout, as no block depends on a later one."""
  whole = reference(config, batch, BLOCKS)
  return whole[:, : num_blocks * config.frames_per_block]


def given_frames(count):
  frames = np.random.default_rng(3).normal(size=(1, count, 4, 4, 4))
  return frames.astype(np.float32)


def pipelined(config, batch, num_blocks, initial=None, **kwargs):
  stages = pipeline.Pipeline(DENOISER, config, **kwargs)

  @jax.jit
  def run(params, text):
    return pipeline.pipelined(
      stages, params, text, keys(batch), num_blocks, initial
    )

  return run(params(), prompts(batch))


@pytest.mark.parametrize(
  ('batch', 'num_blocks', 'fused', 'kwargs'),
  [
    (1, 1, False, {}),
    (1, 7, False, {}),
    (1, 7, True, {}),
    (3, 5, False, {'window': 6, 'stepping': 'ode'}),
    (1, 5, False, {'window': 6, 'sink': 1}),
    (1, 5, True, {'window': 6, 'sink': 1}),
    (1, 4, True, {'window': 6, 'sink': 3, 'context': 'clean'}),
    (1, 3, False, {'window': 3}),
  ],
)
def test_stages_as_a_batch_equal_the_step_first_rollout(
  batch, num_blocks, fused, kwargs
):
  config = rollout.RolloutConfig(levels=LEVELS, **kwargs)
  ours = pipelined(config, batch, num_blocks, fused=fused)
  np.testing.assert_allclose(
    ours, step_first(config, batch, num_blocks), atol=1e-5
  )


@pytest.mark.parametrize(
  ('devices', 'fused'),
  [
    # Two stages on a device are of the same kind as four.
    pytest.param(1, False, marks=pytest.mark.slow),
    (2, False),
    (4, False),
    (2, True),
  ],
)
def test_stages_over_devices_equal_the_step_first_rollout(devices, fused):
  config = rollout.RolloutConfig(levels=LEVELS, window=6)
  ours = pipelined(config, 1, 4, mesh=stage_mesh(devices), fused=fused)
  np.testing.assert_allclose(ours, step_first(config, 1, 4), atol=1e-5)


def test_stages_one_after_the_other_equal_the_step_first_rollout():
  config = rollout.RolloutConfig(levels=LEVELS, window=6)
  ours = pipelined(config, 1, 4, batched=False)
  np.testing.assert_allclose(ours, step_first(config, 1, 4), atol=1e-5)


def test_given_frames_stand_in_every_stage():
  config = rollout.RolloutConfig(levels=LEVELS, window=6)
  ours = pipelined(config, 1, 3, given_frames(4))
  np.testing.assert_allclose(ours, reference(config, 1, 3, given=4), atol=1e-5)


@pytest.mark.parametrize('fused', [False, True])
def test_nan_in_the_bubbles_never_reaches_the_output(fused):
  config = rollout.RolloutConfig(levels=LEVELS, window=6)
  stages = pipeline.Pipeline(DENOISER, config, fused=fused)
  text = prompts(1)
  bank, slots = pipeline.single_prompt(text, stages.num_ticks(3), 4)

  @jax.jit
  def run(params):
    state = stages.init_state(params, text)
    bubbles = jnp.full_like(state.hold, jnp.nan)
    state = state.replace(hold=bubbles, inbox=bubbles)
    return stages.run(params, bank, slots, keys(1), state)[1]

  sent = run(params())
  blocks = [stages.finish_tick(b) for b in range(3)]
  video = rollout.join_blocks(sent[np.array(blocks), -1])
  # The ticks before the first block are bubbles, so this test sees NaN.
  assert np.isnan(sent[0]).all()
  np.testing.assert_allclose(video, step_first(config, 1, 3), atol=1e-5)


@pytest.mark.slow
def test_30_blocks_over_devices_equal_with_nan_in_every_bubble():
  config = rollout.RolloutConfig(levels=LEVELS, window=6, sink=1)
  stages = pipeline.Pipeline(DENOISER, config, mesh=stage_mesh(4))
  text = prompts(3)
  bank, slots = pipeline.single_prompt(text, stages.num_ticks(30), 4)

  @jax.jit
  def run(params, keys):
    state = stages.init_state(params, text)
    bubbles = jnp.full_like(state.hold, jnp.nan)
    state = state.replace(hold=bubbles, inbox=bubbles)
    return stages.run(params, bank, slots, keys, state)[1]

  sent = run(params(), keys(3))
  assert np.isnan(sent[0, -1]).all()
  blocks = [stages.finish_tick(b) for b in range(30)]
  video = np.asarray(rollout.join_blocks(sent[np.array(blocks), -1]))
  error = np.abs(video - reference(config, 3, 30)).max()
  print(f'30 blocks, batch 3, 4 devices: max error {error:.1e}')
  assert error < 1e-5


def test_first_block_leaves_after_s_ticks_and_all_after_2b_plus_s_minus_2():
  config = rollout.RolloutConfig(levels=LEVELS)
  stages = pipeline.Pipeline(DENOISER, config)
  assert stages.finish_tick(0) + 1 == 4
  assert [stages.num_ticks(b) for b in (1, 7, 30)] == [4, 16, 62]
  fused = pipeline.Pipeline(DENOISER, config, fused=True)
  assert [fused.num_ticks(b) for b in (1, 7, 30)] == [4, 10, 33]


def test_only_latents_hop_between_devices():
  config = rollout.RolloutConfig(levels=LEVELS, window=6)
  stages = pipeline.Pipeline(DENOISER, config, mesh=stage_mesh(4))
  text = prompts(1)
  bank, slots = pipeline.single_prompt(text, 2, 4)
  state = stages.init_state(params(), text)
  run = jax.jit(stages.run)
  hlo = run.lower(params(), bank, slots, keys(1), state).compile().as_text()
  hops = re.findall(r'(\S+) collective-permute', hlo)
  assert hops and all(shape.startswith('f32[1,1,3,4,4,4]') for shape in hops)
  for collective in ('all-gather', 'all-reduce', 'all-to-all'):
    assert f' {collective}' not in hlo


@pytest.mark.parametrize(
  ('mesh', 'kwargs', 'message'),
  [
    (3, {}, '4 stages do not divide over 3 devices'),
    (None, {'context': 'shared'}, 'needs shared_pipeline'),
  ],
)
def test_a_pipeline_that_cannot_run_is_refused(mesh, kwargs, message):
  config = rollout.RolloutConfig(levels=LEVELS, **kwargs)
  with pytest.raises(ValueError, match=message):
    pipeline.Pipeline(DENOISER, config, mesh=mesh and stage_mesh(mesh))
