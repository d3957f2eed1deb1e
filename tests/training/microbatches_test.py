"""Gradients of parts of a batch, and of the terms of a loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.denoiser import Denoiser
from hiar_jax.training import microbatches
from tests import tiny

PARAMS = {'w': np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)}
BATCH = np.linspace(0, 3, 8, dtype=np.float32).reshape(4, 2)


def first(params, x, _):
  loss = jnp.mean(jnp.tanh(x @ params['w']))
  return loss, {'first': loss}


def second(params, x, _):
  loss = 0.3 * jnp.mean(jnp.square(x @ params['w']))
  return loss, {'second': loss}


@pytest.mark.parametrize('num_parts', [1, 2, 4])
def test_terms_have_the_gradient_of_their_sum(num_parts):
  expected = jax.grad(
    lambda p: first(p, BATCH, ())[0] + second(p, BATCH, ())[0]
  )(PARAMS)
  grads, metrics = jax.jit(
    lambda: microbatches.gradient([first, second], PARAMS, BATCH, num_parts)
  )()
  np.testing.assert_allclose(grads['w'], expected['w'], rtol=1e-6)
  for name, term in (('first', first), ('second', second)):
    np.testing.assert_allclose(
      metrics[name], term(PARAMS, BATCH, ())[0], rtol=1e-6
    )


def test_a_term_waits_for_the_gradient_before_it():
  def broken(params, x, read):
    loss, metrics = first(params, x, read)
    return loss * jnp.nan, metrics

  grads, metrics = jax.jit(
    lambda: microbatches.gradient([broken, second], PARAMS, BATCH, 1)
  )()
  assert np.isnan(grads['w']).all()
  np.testing.assert_allclose(
    metrics['first'], first(PARAMS, BATCH, ())[0], rtol=1e-6
  )
  # No update comes of it, and nothing is computed.
  assert np.isnan(metrics['second'])


def network_term(denoiser, sigma):
  """Loss of a network, with a gradient of what it makes of the text too."""
  model = denoiser.config
  rng = np.random.default_rng(1)
  states = rng.normal(size=(1, model.text_len, model.text_dim))
  shape = (1, 2, model.latent_height, model.latent_width, model.channels)
  x, target = rng.normal(size=(2, *shape)).astype(np.float32)

  def term(params, scale, _):
    text = denoiser.project_text(params, scale * states.astype(np.float32))
    flow, _ = denoiser.flow(params, x, sigma, text)
    return jnp.mean(jnp.square(flow - target)), {f'{sigma}': jnp.mean(flow)}

  return term


@pytest.mark.parametrize('num_parts', [1, 2])
@pytest.mark.parametrize('remat', ['none', 'full'])
def test_a_network_has_the_same_gradient_in_place(remat, num_parts):
  model = dataclasses.replace(tiny.DENOISER.config, remat=remat)
  denoiser = Denoiser(model)
  params = tiny.random_params(denoiser, 0)
  terms = [network_term(denoiser, sigma) for sigma in (0.3, 0.8)]
  parts = np.float32([1, -2])[:num_parts].reshape(-1, 1, 1)

  def whole(params):
    losses = [term(params, p[None], ())[0] for term in terms for p in parts]
    return sum(losses) / num_parts

  expected = jax.jit(jax.grad(whole))(params)
  found, _ = jax.jit(
    lambda params: microbatches.gradient(terms, params, parts, num_parts)
  )(params)
  largest = max(np.abs(a).max() for a in jax.tree.leaves(expected))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 * largest),
    found,
    expected,
  )


def test_every_further_term_holds_no_further_stack_of_gradients():
  model = dataclasses.replace(
    tiny.DENOISER.config, dim=96, ffn_dim=256, num_layers=8, remat='full'
  )
  denoiser = Denoiser(model)
  params = jax.eval_shape(denoiser.init, jax.random.key(0))
  stack = sum(4 * a.size for a in jax.tree.leaves(params))

  def temporaries(sigmas):
    terms = [network_term(denoiser, sigma) for sigma in sigmas]
    part = np.ones((1, 1, 1), np.float32)
    run = jax.jit(lambda params: microbatches.gradient(terms, params, part, 1))
    memory = run.lower(params).compile().memory_analysis()
    return memory.temp_size_in_bytes

  one, three = temporaries((0.3,)), temporaries((0.3, 0.5, 0.8))
  assert three < one + 0.3 * stack
