"""Adapters beside a network, and merged into it."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import PartitionSpec

from hiar_jax.denoiser import Denoiser
from hiar_jax.models import lora, sharding
from tests import tiny

DENOISER = tiny.DENOISER
EVERYTHING = lora.LoRAConfig(rank=2, alpha=6.0, targets=('.*',))


def base():
  return tiny.random_params(DENOISER, seed=0)


def adapters(config=EVERYTHING, seed=1):
  """Adapters all of which matter."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda a: rng.normal(0, 0.3, a.shape).astype(np.float32),
    lora.init(config, base(), jax.random.key(0)),
  )


def flow(denoiser, params):
  rng = np.random.default_rng(2)
  x = rng.normal(size=(2, 3, 2, 4, 2)).astype(np.float32)
  states = rng.normal(size=(2, 3, 8)).astype(np.float32)
  sigma = np.array([[0.9, 0.5, 0.1]], np.float32)
  text = denoiser.project_text(params, states)
  return denoiser.flow(params, x, sigma, text)[0]


def unrolled():
  config = dataclasses.replace(
    DENOISER.config, unroll=DENOISER.config.num_layers
  )
  return Denoiser(config)


def test_adapters_begin_by_changing_nothing():
  begun = lora.init(EVERYTHING, base(), jax.random.key(0))
  joined = lora.join(base(), begun, EVERYTHING.scale)
  np.testing.assert_array_equal(flow(DENOISER, joined), flow(DENOISER, base()))


@pytest.mark.parametrize('unroll', ['scanned', 'unrolled', 'unstacked'])
def test_a_network_with_adapters_equals_the_merged_one(unroll):
  denoiser = DENOISER if unroll == 'scanned' else unrolled()
  joined = lora.join(base(), adapters(), EVERYTHING.scale)
  merged = lora.merge(base(), adapters(), EVERYTHING.scale)
  assert jax.tree.structure(merged) == jax.tree.structure(base())
  if unroll == 'unstacked':
    joined = denoiser.unstack_layers(joined)
  with_adapters = flow(denoiser, joined)
  np.testing.assert_allclose(
    with_adapters, flow(denoiser, merged), rtol=1e-4, atol=2e-5
  )
  difference = np.abs(with_adapters - flow(denoiser, base()))
  assert difference.max() > 0.1


def test_every_array_of_the_adapters_reaches_the_flow():
  def total(parts):
    joined = lora.join(base(), parts, EVERYTHING.scale)
    return (flow(DENOISER, joined) ** 2).sum()

  gradient = jax.grad(total)(adapters())
  for path, leaf in traverse_util.flatten_dict(gradient, sep='/').items():
    # A bias of keys adds the same to all scores of a query.
    if not path.endswith('k/bias'):
      assert np.abs(leaf).max() > 1e-6, path


def test_the_default_targets_are_the_matrices_of_the_layers():
  config = lora.LoRAConfig(rank=2)
  shapes = lora.shapes(config, base())
  assert config.scale == 1.0
  assert shapes['layers/ffn_in/lora_down'] == (2, 12, 2)
  assert shapes['layers/ffn_in/lora_up'] == (2, 2, 16)
  assert shapes['text_kv/v_lora_up'] == (2, 2, 12)
  # Four of self-attention, two and two of cross-attention, two more.
  assert len(shapes) == 2 * (4 + 4 + 2)


def test_factors_are_divided_as_the_rows_and_columns_of_their_matrix():
  for matrix, down, up in (
    ('layers/ffn_in', (None, 'fsdp', None), (None, None, 'tensor')),
    ('layers/self_attention/o', (None, 'tensor', None), (None, None, 'fsdp')),
    ('text_in', ('fsdp', None), (None, 'tensor')),
    ('head', ('fsdp', None), (None, None)),
  ):
    assert sharding.param_spec(f'{matrix}/lora_down') == PartitionSpec(*down)
    assert sharding.param_spec(f'{matrix}/lora_up') == PartitionSpec(*up)
  with pytest.raises(ValueError, match="fit 'layers/new/lora_up'"):
    sharding.param_spec('layers/new/lora_up')


@pytest.mark.parametrize(
  ('numbers', 'says'),
  [
    ({'rank': 0}, 'lora.rank=0 is below 1'),
    ({'rank': 4, 'alpha': 0.0}, 'lora.alpha=0.0 is not positive'),
    ({'rank': 4, 'targets': ('(',)}, 'no regular expression'),
    ({'rank': 4, 'targets': ('.*', 'attn')}, r"\['attn'\] fit no parameter"),
    ({'rank': 4, 'targets': ()}, 'fit no parameter'),
    (
      {'rank': 13},
      'lora.rank=13 is more than layers/.*/kernel can have, a matrix of 12 x',
    ),
  ],
)
def test_what_does_not_fit_is_named(numbers, says):
  with pytest.raises(ValueError, match=says):
    lora.shapes(lora.LoRAConfig(**numbers), base())
