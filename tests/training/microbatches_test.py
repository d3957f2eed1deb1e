"""Gradients of parts of a batch, and of the terms of a loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.training import microbatches

PARAMS = {'w': np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)}
BATCH = np.linspace(0, 3, 8, dtype=np.float32).reshape(4, 2)


def first(params, x):
  loss = jnp.mean(jnp.tanh(x @ params['w']))
  return loss, {'first': loss}


def second(params, x):
  loss = 0.3 * jnp.mean(jnp.square(x @ params['w']))
  return loss, {'second': loss}


@pytest.mark.parametrize('num_parts', [1, 2, 4])
def test_terms_have_the_gradient_of_their_sum(num_parts):
  expected = jax.grad(lambda p: first(p, BATCH)[0] + second(p, BATCH)[0])(
    PARAMS
  )
  grads, metrics = jax.jit(
    lambda: microbatches.gradient([first, second], PARAMS, BATCH, num_parts)
  )()
  np.testing.assert_allclose(grads['w'], expected['w'], rtol=1e-6)
  for name, term in (('first', first), ('second', second)):
    np.testing.assert_allclose(metrics[name], term(PARAMS, BATCH)[0], rtol=1e-6)


def test_a_term_waits_for_the_gradient_before_it():
  def broken(params, x):
    loss, metrics = first(params, x)
    return loss * jnp.nan, metrics

  grads, metrics = jax.jit(
    lambda: microbatches.gradient([broken, second], PARAMS, BATCH, 1)
  )()
  assert np.isnan(grads['w']).all()
  assert metrics['first'] == first(PARAMS, BATCH)[0]
  # No update comes of it, and nothing is computed.
  assert np.isnan(metrics['second'])
