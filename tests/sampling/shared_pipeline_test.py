"""The pipeline of the shared context equals rollout.shared_context."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from hiar_jax import noise_schedule, rollout
from hiar_jax.sampling import pipeline
from hiar_jax.sampling.shared_pipeline import SharedPipeline
from tests import toy_network as toy

LEVELS = {
  steps: noise_schedule.warped_levels(indices, 5.0)
  for steps, indices in (
    (1, (1000,)),
    (3, (1000, 700, 400)),
    (4, (1000, 750, 500, 250)),
  )
}
BLOCK = (3, *toy.FRAME_SHAPE)


def make_config(steps=4, **kwargs):
  kwargs = {'window': 6, 'context': 'shared'} | kwargs
  return rollout.RolloutConfig(levels=LEVELS[steps], **kwargs)


def keys(batch):
  return jax.random.split(jax.random.key(2), batch)


def stage_mesh(devices):
  return jax.make_mesh(
    (devices,),
    ('stage',),
    axis_types=(AxisType.Auto,),
    devices=jax.devices()[:devices],
  )


@functools.cache
def shared_context(config, batch, num_blocks, initial_frames=0):
  initial = toy.latents(batch, initial_frames) if initial_frames else None

  @jax.jit
  def run(params, text):
    return rollout.shared_context(
      rollout.Sampler(toy.DENOISER, params, text, config),
      rollout.named_noise(keys(batch), BLOCK),
      num_blocks,
      initial,
    )

  return run(toy.params(), toy.text(batch))


def pipelined(stages, batch, num_blocks, initial=None):
  run = jax.jit(functools.partial(pipeline.pipelined, stages), static_argnums=3)
  return run(toy.params(), toy.text(batch), keys(batch), num_blocks, initial)


@pytest.mark.parametrize(
  ('batch', 'num_blocks', 'kwargs'),
  [
    (1, 1, {}),
    (3, 2, {'stepping': 'ode', 'sink': 1}),
    (1, 7, {'sink': 1}),
    (1, 3, {'steps': 1, 'context_level': 0.1}),
  ],
)
def test_stages_on_one_device_equal_the_rollout(batch, num_blocks, kwargs):
  config = make_config(**kwargs)
  ours = pipelined(SharedPipeline(toy.DENOISER, config), batch, num_blocks)
  wanted = shared_context(config, batch, num_blocks)
  np.testing.assert_allclose(ours, wanted, atol=1e-5)


@pytest.mark.parametrize(
  ('devices', 'passes', 'batch', 'num_blocks', 'kwargs'),
  [
    (1, 2, 1, 7, {'sink': 1}),  # Three stages on a device.
    (2, 3, 1, 7, {'sink': 1}),
    (3, 2, 3, 2, {'stepping': 'ode', 'sink': 1}),
    (2, 2, 1, 1, {'steps': 3}),
  ],
)
def test_stages_over_devices_equal_the_rollout(
  devices, passes, batch, num_blocks, kwargs
):
  config = make_config(**kwargs)
  stages = SharedPipeline(
    toy.DENOISER, config, passes=passes, mesh=stage_mesh(devices)
  )
  ours = pipelined(stages, batch, num_blocks)
  wanted = shared_context(config, batch, num_blocks)
  np.testing.assert_allclose(ours, wanted, atol=1e-5)


def test_given_frames_stand_in_every_past():
  config = make_config()
  stages = SharedPipeline(toy.DENOISER, config)
  ours = pipelined(stages, 1, 3, toy.latents(1, 4))
  wanted = shared_context(config, 1, 3, initial_frames=4)
  np.testing.assert_allclose(ours, wanted, atol=1e-5)


@pytest.mark.parametrize('devices', [None, 3])
def test_nan_in_the_bubbles_reaches_neither_output_nor_pasts(devices):
  config = make_config()
  mesh = devices and stage_mesh(devices)
  stages = SharedPipeline(toy.DENOISER, config, mesh=mesh)
  turns = stages.num_turns(3)
  bank, slots = pipeline.single_prompt(toy.text(1), turns, 3)

  @jax.jit
  def run(params, bank):
    state = stages.init_state(params, toy.text(1))
    state = state.replace(inbox=jnp.full_like(state.inbox, jnp.nan))
    return stages.run(params, bank, slots, keys(1), state)

  state, sent = run(toy.params(), bank)
  # The exit stage has no block in the first turn, so this test sees NaN.
  assert np.isnan(stages.finished(sent, 0)).all()
  video = rollout.join_blocks(stages.finished(sent, range(1, turns)))
  np.testing.assert_allclose(video, shared_context(config, 1, 3), atol=1e-5)
  for past in state.pasts:
    assert np.isfinite(past.k).all() and np.isfinite(past.v).all()
  # Of the pasts of steps 0..4, the last the commit's, each has the frames of
  # the blocks that have come to the step after it; the sixth serves none.
  frames = np.stack([past.frames for past in state.pasts], 1)
  np.testing.assert_array_equal(frames.ravel(), [12, 9, 9, 6, 6, 0])


@pytest.mark.parametrize(
  ('steps', 'devices', 'passes', 'num_stages', 'turns'),
  [(4, None, 2, 3, 8), (4, 2, 3, 2, 8), (4, 3, 2, 3, 8), (3, 2, 2, 2, 8)],
)
def test_a_block_leaves_every_p_ticks_the_first_after_s(
  steps, devices, passes, num_stages, turns
):
  stages = SharedPipeline(
    toy.DENOISER, make_config(steps), mesh=devices and stage_mesh(devices)
  )
  assert (stages.passes, stages.num_stages) == (passes, num_stages)
  assert stages.finish_tick(0) + 1 == steps
  assert stages.finish_tick(7) - stages.finish_tick(6) == passes
  assert stages.num_turns(7) == turns
  # The tick of a block's last step lies in the turn that finishes it.
  assert stages.finish_tick(6) // passes == stages.finish_turn(6)


def test_latents_hop_on_and_the_kv_of_one_block_hop_back():
  stages = SharedPipeline(toy.DENOISER, make_config(), mesh=stage_mesh(3))
  bank, slots = pipeline.single_prompt(toy.text(1), 2, 3)
  state = stages.init_state(toy.params(), toy.text(1))
  run = jax.jit(stages.run)
  hlo = run.lower(toy.params(), bank, slots, keys(1), state).compile().as_text()
  hops = re.findall(
    r'= \(?(\w+\[[\d,]*\]).*? collective-permute(?:-start)?\('
    r'.*?source_target_pairs=(\{\{.*?\}\})',
    hlo,
  )
  # [stage, layers, batch, 3 frames of 2 tokens, heads, width]
  kv = ('f32[1,2,1,6,2,8]', '{{1,0},{2,1}}')
  assert sorted(hops) == sorted([kv, kv, ('f32[1,1,3,2,4,2]', '{{0,1},{1,2}}')])
  for collective in ('all-gather', 'all-reduce', 'all-to-all'):
    assert f' {collective}' not in hlo


@pytest.mark.parametrize(
  ('kwargs', 'options', 'message'),
  [
    ({'context': 'matched'}, {}, "context 'matched' needs pipeline.Pipeline"),
    ({}, {'mesh': 4}, r'4 steps does not divide over 4 devices.*\[1, 2, 3\]'),
    ({}, {'passes': 2, 'mesh': 2}, '3 stages do not divide over 2 devices'),
    ({}, {'passes': 1}, r'passes=1 is not in 2\.\.5'),
  ],
)
def test_a_pipeline_that_cannot_run_is_refused(kwargs, options, message):
  if 'mesh' in options:
    options = options | {'mesh': stage_mesh(options['mesh'])}
  with pytest.raises(ValueError, match=message):
    SharedPipeline(toy.DENOISER, make_config(**kwargs), **options)
