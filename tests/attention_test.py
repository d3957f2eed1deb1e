"""The back-ends of the attention seam give the same numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.denoiser import Denoiser
from hiar_jax.models import attention
from hiar_jax.models.config import WanConfig
from tests import toy_network

QUERIES, KEYS, HEADS, WIDTH = 300, 700, 2, 8


@functools.cache
def arrays() -> tuple[np.ndarray, ...]:
  rng = np.random.default_rng(0)

  def normal(size):
    return rng.normal(size=(2, size, HEADS, WIDTH)).astype(np.float32)

  return normal(QUERIES), normal(KEYS), normal(KEYS)


def with_gradient(function):
  """The result, and the gradient of a number that all of it enters."""

  @jax.jit
  def run(q, k, v):
    out, pull = jax.vjp(function, q, k, v)
    return out, pull(jnp.sin(out))

  return run(*arrays())


def assert_same(ours, theirs):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs
  )


@pytest.mark.parametrize('length', [None, 333, KEYS])
def test_queries_in_chunks_change_no_value_and_no_gradient(length):
  ours, theirs = (
    with_gradient(
      functools.partial(attention.attend, length=length, backend=backend)
    )
    for backend in ('chunked', 'xla')
  )
  assert_same(ours, theirs)


def test_each_chunk_has_the_rows_of_its_own_mask():
  mask = np.random.default_rng(1).random((QUERIES, KEYS)) < 0.5
  ours, theirs, splash = (
    with_gradient(
      functools.partial(attention.attend, mask_TS=mask, backend=backend)
    )
    for backend in ('chunked', 'xla', 'splash')
  )
  assert_same(ours, theirs)
  assert_same(splash, theirs)


@pytest.mark.parametrize('length', [333, KEYS])
def test_the_tpu_kernel_gives_the_same_values_and_gradients(length):
  ours = with_gradient(
    functools.partial(
      attention.attend_splash, length=jnp.int32(length), interpret=True
    )
  )
  theirs = with_gradient(functools.partial(attention.attend, length=length))
  assert_same(ours, theirs)


def test_the_tpu_kernel_may_be_mapped_over_stages_of_their_own_length():
  lengths = jnp.array([333, KEYS])

  def mapped(attend):
    return jax.jit(jax.vmap(attend, in_axes=(None, None, None, 0)))(
      *arrays(), lengths
    )

  ours = mapped(functools.partial(attention.attend_splash, interpret=True))
  theirs = mapped(lambda q, k, v, n: attention.attend(q, k, v, length=n))
  assert_same(ours, theirs)


@pytest.mark.parametrize('backend', ['chunked', 'splash'])
def test_the_network_is_the_same_with_every_back_end(backend):
  params, text = toy_network.params(), toy_network.text(2)
  x = toy_network.latents(2, 6)
  config = dataclasses.replace(toy_network.CONFIG, attention=backend)
  ours, theirs = (
    toy_network.jit(denoiser.flow)(params, x, 0.5, text)
    for denoiser in (Denoiser(config), toy_network.DENOISER)
  )
  assert_same(ours, theirs)


def test_an_unknown_back_end_is_refused():
  with pytest.raises(ValueError, match="attention='flash' is not one of"):
    WanConfig.wan_1_3b(attention='flash')
