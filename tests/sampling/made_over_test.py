"""A clip made over: the later steps of a run that came to it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax import noise_schedule, rollout
from hiar_jax.sampling import calls, choices, seeds
from tests.sampling import stream_decoding_test
from tests.sampling.stream_decoding_test import PROMPT

BLOCKS = 3


def pipe(order='block_first', **chosen):
  chosen = {'steps': (1000, 750, 500, 250), 'shift': 1.0} | chosen
  return choices.apply(stream_decoding_test.pipe(), order=order, **chosen)


def request(own, **changes):
  return calls.Request(num_blocks=BLOCKS, order=own.order, seed=3, **changes)


def stopped_before(own, step):
  """Clean estimates from which a run of all blocks enters the step."""
  early = own.rollout.levels[: step + 1]
  keys = seeds.keys(seeds.of_videos(3, 1))
  shape = own.rollout.block_shape(own.denoiser.config)
  noise = rollout.named_noise(keys, shape)

  @jax.jit
  def run(params):
    text = own.denoiser.project_text(params, own.encoder.encode([PROMPT]))
    sampler = rollout.Sampler(own.denoiser, params, text, own.rollout)
    x = rollout.initial_blocks(noise, np.arange(BLOCKS))
    for j in range(step):
      x, _ = rollout.sweep(
        *(sampler, noise, x, np.arange(BLOCKS), sampler.empty_past()),
        first_step=j,
        num_steps=1,
      )
    eps = jax.vmap(lambda b: noise(step, b))(np.arange(BLOCKS))
    return rollout.join_blocks((x - early[-1] * eps) / (1 - early[-1]))

  return np.asarray(run(own.params))


@pytest.mark.parametrize('step', [1, 3])
def test_from_its_own_estimate_a_run_goes_on_as_it_would_have(step):
  own = pipe('step_first')
  whole = own.sample([PROMPT], request(own), progress=False)
  start = calls.Start(stopped_before(own, step), step)
  over = own.sample([PROMPT], request(own), start=start, progress=False)
  np.testing.assert_allclose(over, whole, atol=1e-4)


def test_block_first_runs_the_later_steps_of_each_block_in_turn():
  own = pipe('block_first')
  clip = own.sample([PROMPT], request(own), progress=False)
  start = calls.Start(clip, 2)
  over = own.sample([PROMPT], request(own), start=start, progress=False)
  keys = seeds.keys(seeds.of_videos(3, 1))
  noise = rollout.named_noise(
    keys, own.rollout.block_shape(own.denoiser.config)
  )
  level = own.rollout.levels[2]

  @jax.jit
  def run(params, clip):
    text = own.denoiser.project_text(params, own.encoder.encode([PROMPT]))
    sampler = rollout.Sampler(own.denoiser, params, text, own.rollout)
    x = jnp.stack(jnp.split(clip, BLOCKS, 1))
    eps = jax.vmap(lambda b: noise(2, b))(np.arange(BLOCKS))
    x, _ = rollout.sweep(
      *(sampler, noise, noise_schedule.add_noise(x, eps, level)),
      *(np.arange(BLOCKS), sampler.empty_past()),
      first_step=2,
      num_steps=2,
    )
    return rollout.join_blocks(x)

  np.testing.assert_allclose(over, run(own.params, clip), atol=1e-5)


@pytest.mark.parametrize('order', ['block_first', 'step_first'])
def test_the_less_strength_the_nearer_to_the_clip(order):
  own = pipe(order)
  clip = stream_decoding_test.picture(12)
  made = {
    strength: own(PROMPT, clip=clip, strength=strength, progress=False)
    for strength in (0.3, 0.6, 1.0)
  }
  # 12 frames fill three blocks of two latents, which have 11.
  assert {len(video) for video in made.values()} == {11}
  given = own.encode(clip[:11])[0]
  off = [np.abs(made[s].latents - given).mean() for s in (0.3, 0.6, 1.0)]
  assert off[0] < off[1] < off[2]
  plain = own(PROMPT, num_blocks=3, progress=False)
  np.testing.assert_array_equal(made[1.0].latents, plain.latents)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (
      {'strength': 0.2},
      r'strength=0.2 is below the levels .*1, 0.75, 0.5, 0.2',
    ),
    ({'strength': 1.5}, r'strength=1.5 is not in \(0, 1\]'),
    ({'strength': None}, 'clip and strength go together'),
    ({'strength': 0.5, 'context': 'shared'}, "with context 'shared'"),
    ({'strength': 0.5, 'height': 16}, r'must be uint8 \[F, 16, 8, 3\]'),
    ({'strength': 0.5, 'fit': 'squeeze'}, "fit='squeeze' is not one of"),
  ],
)
def test_what_does_not_fit_is_named(arguments, message):
  order = 'step_first' if 'context' in arguments else 'block_first'
  clip = stream_decoding_test.picture(12)
  with pytest.raises(ValueError, match=message):
    pipe(order)(PROMPT, clip=clip, progress=False, **arguments)


def test_a_clip_too_short_for_a_block_is_named():
  clip = stream_decoding_test.picture(2)
  with pytest.raises(ValueError, match='2 frames does not fill a block, which'):
    pipe()(PROMPT, clip=clip, strength=0.5)


def test_a_first_block_with_levels_of_its_own_is_refused():
  own = pipe()
  config = dataclasses.replace(own.rollout, first_levels=(1.0, 0.0))
  own = dataclasses.replace(own, rollout=config)
  with pytest.raises(ValueError, match='same levels for all blocks'):
    own(PROMPT, clip=stream_decoding_test.picture(12), strength=0.5)


@pytest.mark.parametrize('fit', ['crop', 'pad', 'stretch'])
def test_given_frames_of_any_shape_are_brought_to_the_size(fit):
  own = pipe()
  frames = np.full((1, 20, 60, 3), 200, np.uint8)
  frames[:, :, :20] = 0
  with pytest.raises(ValueError, match=r'must be uint8 \[F, 8, 8, 3\]'):
    own.encode(frames)
  if fit == 'crop':
    like = np.full((1, 8, 8, 3), 200, np.uint8)  # The middle third is grey.
  elif fit == 'pad':
    like = np.zeros((1, 8, 8, 3), np.uint8)
    like[:, 2:5, 3:] = 200
  else:
    like = np.full((1, 8, 8, 3), 200, np.uint8)
    like[:, :, :2], like[:, :, 2] = 0, 60
  off = np.abs(own.encode(frames, fit) - own.encode(like)).mean()
  others = [f for f in ('crop', 'pad', 'stretch') if f != fit]
  assert all(
    np.abs(own.encode(frames, other) - own.encode(like)).mean() > 2 * off
    for other in others
  )
  stream = own.stream(PROMPT, initial_frames=frames, fit=fit)
  assert stream.given.shape == (1, 1, 8, 8, 3)
