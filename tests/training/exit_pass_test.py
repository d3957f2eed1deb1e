"""The exit step's passes block by block, held to all blocks' at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax import noise_schedule, rollout
from hiar_jax.denoiser import Denoiser
from hiar_jax.models.config import WanConfig
from hiar_jax.training import exit_pass, microbatches
from hiar_jax.training import rollout as training_rollout
from hiar_jax.training.distill_config import DistillConfig
from tests import tiny

BATCH, BLOCKS, SIZE = 2, 3, 2


def sampler_of(denoiser, params, states, **config):
  defaults = dict(frames_per_block=SIZE, window=BLOCKS * SIZE)
  return rollout.Sampler(
    denoiser,
    params,
    denoiser.project_text(params, states),
    rollout.RolloutConfig(
      levels=noise_schedule.warped_levels((1000, 500), 5.0),
      **(defaults | config),
    ),
  )


def setting(denoiser):
  """Parameters, text states and noise."""
  model = denoiser.config
  rng = np.random.default_rng(1)
  states = rng.normal(size=(BATCH, model.text_len, model.text_dim))
  shape = (SIZE, model.latent_height, model.latent_width, model.channels)
  noise = rollout.named_noise(jax.random.split(jax.random.key(2), BATCH), shape)
  return tiny.random_params(denoiser, 0), states.astype(np.float32), noise


def gradient_of(denoiser, states, record, way, **config):
  """Program: parameters to the gradient of x0 times something, and x0 of it."""
  model = denoiser.config
  frames = (BATCH, BLOCKS * SIZE, model.latent_height, model.latent_width)
  cotangent = np.random.default_rng(3).normal(size=(*frames, model.channels))

  def term(params, record, _, block=None):
    sampler = sampler_of(denoiser, params, states, **config)
    if block is None:
      x0 = exit_pass.parallel(sampler, record, past_gradient='detached')
      own, name = slice(None), 'x0'
    else:
      x0 = exit_pass.one_block(sampler, record, block)
      own, name = slice(block * SIZE, (block + 1) * SIZE), f'x0_{block}'
    loss = jnp.sum(x0 * cotangent[:, own].astype(np.float32))
    return loss, {name: x0}

  terms = [term]
  if way == 'blocks':
    terms = [functools.partial(term, block=block) for block in range(BLOCKS)]

  @jax.jit
  def run(params, record):
    grads, x0 = microbatches.gradient(terms, params, record, 1)
    return grads, jnp.concatenate(list(x0.values()), 1)

  return run


def recorded(denoiser, params, states, noise, config, **kwargs):
  @jax.jit
  def record():
    sampler = sampler_of(denoiser, params, states, **config)
    return training_rollout.record_rollout(
      sampler, noise, BLOCKS, 1, order='step_first', **kwargs
    )

  return record()


@pytest.mark.parametrize(
  ('config', 'given', 'blocks_before'),
  [
    ({}, 0, {}),
    # Not all is seen, the first frame for ever, after an image of one frame.
    pytest.param(*({'window': 4, 'sink': 1}, 1, {}), marks=pytest.mark.slow),
    # A length that the program does not know.
    ({'window': 4, 'sink': 2}, 0, {'before': np.int32(2), 'most_before': 3}),
  ],
  ids=['in_ring', 'window', 'longer'],
)
def test_blocks_have_the_gradient_of_the_parallel_pass(
  config, given, blocks_before
):
  denoiser = tiny.DENOISER
  params, states, noise = setting(denoiser)
  if given:
    image = np.random.default_rng(4).normal(size=(BATCH, given, 2, 4, 2))
    blocks_before = {'initial': image.astype(np.float32)}
  record = recorded(denoiser, params, states, noise, config, **blocks_before)
  found, expected = (
    gradient_of(denoiser, states, record, way, **config)(params, record)
    for way in exit_pass.WAYS[::-1]
  )
  largest = max(np.abs(a).max() for a in jax.tree.leaves(expected))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6 * largest),
    found,
    expected,
  )
  # Text is projected with the same parameters.
  assert np.abs(found[0]['text_in']['kernel']).max() > 1e-3 * largest


def test_blocks_hold_the_activations_of_one():
  model = dataclasses.replace(
    tiny.DENOISER.config,
    dim=32,
    ffn_dim=128,
    num_layers=6,
    latent_height=16,
    latent_width=16,
    remat='full',
  )
  denoiser = Denoiser(WanConfig(**dataclasses.asdict(model)))
  params, states, noise = setting(denoiser)
  record = jax.eval_shape(
    lambda: training_rollout.record_rollout(
      sampler_of(denoiser, params, states),
      *(noise, BLOCKS, 1),
      order='step_first',
    )
  )
  sizes = {
    way: gradient_of(denoiser, states, record, way)
    .lower(params, record)
    .compile()
    .memory_analysis()
    .temp_size_in_bytes
    for way in exit_pass.WAYS
  }
  print(sizes)
  assert sizes['blocks'] < 0.6 * sizes['parallel']


def test_a_past_with_a_gradient_wants_the_parallel_pass():
  with pytest.raises(ValueError, match="not with 'straight_through'"):
    DistillConfig(exit_pass='blocks', past_gradient='straight_through')
  with pytest.raises(ValueError, match="exit_pass='serial' is not one of"):
    DistillConfig(exit_pass='serial')
