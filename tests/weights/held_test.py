"""Weights in 8 bits: read so, merged before, divided and multiplied with."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.models import lora, quantised
from hiar_jax.sampling import loading
from hiar_jax.weights import held, networks, safetensors_io
from tests import fake_release, toy_network
from tests.weights import lora_files_test

DENOISER = toy_network.DENOISER
KERNEL = 'layers/ffn_in/kernel'


def flat(params):
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


def flow(params):
  text = DENOISER.project_text(params, toy_network.text_states(1))
  rng = np.random.default_rng(0)
  x = rng.normal(size=(1, 3, *toy_network.FRAME_SHAPE)).astype(np.float32)
  return np.asarray(DENOISER.flow(params, x, 0.5, text)[0])


@pytest.mark.parametrize(
  ('how', 'bound'),
  [
    (held.Held('int8'), 0.02),
    (held.Held('float8'), 0.07),
    (held.Held('int8', 'int8'), 0.03),
    (held.Held('float8', 'float8'), 0.1),
  ],
  ids=str,
)
def test_a_pass_is_close_to_that_of_the_whole_weights(how, bound):
  params = toy_network.params()
  put = toy_network.jit(lambda params: how.put(params, 'float32'))(params)
  assert jax.tree.map(lambda a: (a.shape, a.dtype), put) == jax.tree.map(
    lambda a: (a.shape, a.dtype), how.shapes(params, 'float32')
  )
  whole = flow(params)
  off = np.sqrt(np.mean((flow(put) - whole) ** 2)) / whole.std()
  assert 1e-4 < off < bound
  # Layer by layer the same.
  unrolled = dataclasses.replace(
    DENOISER,
    config=dataclasses.replace(DENOISER.config, unroll=2),
  )
  apart = unrolled.unstack_layers(put)
  assert isinstance(apart['layers'], tuple)
  np.testing.assert_allclose(flow(apart), flow(put), atol=1e-5)


def test_products_in_8_bits_multiply_8_bits_by_8_bits():
  how = held.Held('int8', 'int8')
  abstract = how.shapes(toy_network.params(), 'float32')
  text = jax.eval_shape(
    DENOISER.project_text, abstract, toy_network.text_states(1)
  )
  x = jnp.zeros((1, 3, *toy_network.FRAME_SHAPE))
  run = lambda params, text: DENOISER.flow(params, x, 0.5, text)[0]
  program = str(jax.make_jaxpr(run)(abstract, text))
  # q, k, v and o, those of the text and the feed-forward pair.
  assert len(re.findall(r'preferred_element_type=int32', program)) == 8


def test_what_is_read_is_what_the_whole_weights_are_brought_to(tmp_path):
  path, params = tmp_path / 'w.safetensors', toy_network.params()
  networks.save_weights(path, params, dtype='bfloat16')
  stored = networks.load_weights(path, params)
  for how in (held.Held('int8'), held.Held('float8', 'float8')):
    read = networks.load_weights(path, how.shapes(params, 'bfloat16'))
    expected = flat(how.put(stored, 'bfloat16'))
    found = flat(read)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
      assert_same_numbers(name, found[name], array)


def assert_same_numbers(name, found, expected):
  """The same; in 8 bits but for a few that lie between two."""
  assert found.dtype == expected.dtype, name
  off = found.astype(np.float32) != expected.astype(np.float32)
  if quantised.kind_of(found.dtype):
    assert off.mean() < 0.01, name
    return
  np.testing.assert_allclose(
    found.astype(np.float32), expected.astype(np.float32), 1e-6, err_msg=name
  )


@pytest.fixture(scope='module')
def release(tmp_path_factory):
  folder = tmp_path_factory.mktemp('hiar')
  fake_release.write_release(folder, 'wan')
  return folder


def load(folder, tmp_path, monkeypatch, **options):
  monkeypatch.setenv('HIAR_JAX_CACHE', str(tmp_path / 'cache'))
  return loading.load(folder, family='hiar', height=8, width=8, **options)


def test_a_pipeline_says_what_it_is_held_in(
  release, tmp_path, monkeypatch, capsys
):
  pipe = load(
    release, tmp_path, monkeypatch, weights_dtype='int8', past_dtype='float8'
  )
  said = capsys.readouterr().err
  assert 'HiAR: step_first' in said
  assert '; weights in int8, past in float8\n' in said
  read = pipe.params['layers']['ffn_in']
  assert read['kernel'].dtype == jnp.int8
  assert read['kernel_scale'].dtype == jnp.float32
  assert read['bias'].dtype == jnp.bfloat16
  assert pipe.rollout.past_dtype == 'float8'
  whole = load(release, tmp_path, monkeypatch)
  assert pipe.identity != whole.identity
  # And makes videos.
  with whole.stream('a cat') as a, pipe.stream('a cat') as b:
    assert np.abs(next(a).astype(int) - next(b)).mean() < 16


def test_a_lora_is_added_before(release, tmp_path, monkeypatch):
  state = safetensors_io.Reader(release / 'diffusion_pytorch_model.safetensors')
  arrays = {name: state.read(name) for name in state.entries}
  path, _ = lora_files_test.write_form(
    tmp_path, 'comfyui', lora_files_test.factors(arrays)
  )
  given = {'loras': [path]}
  merged = load(
    release, tmp_path, monkeypatch, weights_dtype='float32', **given
  )
  pipe = load(release, tmp_path, monkeypatch, weights_dtype='int8', **given)
  expected = flat(held.Held('int8').put(merged.params, 'bfloat16'))
  for name, array in flat(pipe.params).items():
    assert_same_numbers(name, array, expected[name])


def test_scales_lie_with_their_columns(release, tmp_path, monkeypatch):
  one = load(release, tmp_path, monkeypatch, weights_dtype='int8')
  pipe = load(
    release,
    tmp_path,
    monkeypatch,
    weights_dtype='int8',
    past_dtype='int8',
    mesh='stage=2,tensor=2',
  )
  for name in ('ffn_in', 'ffn_out'):
    mine, whole = (p.params['layers'][name] for p in (pipe, one))
    for part in ('kernel', 'kernel_scale'):
      np.testing.assert_array_equal(mine[part], whole[part])
  widths = {
    s.data.shape[-1]
    for s in pipe.params['layers']['ffn_in']['kernel_scale'].addressable_shards
  }
  assert widths == {fake_release.CONFIGS['transformer'].ffn_dim // 2}
  with pipe.stream('a cat') as a, one.stream('a cat', past_dtype='int8') as b:
    for _ in range(2):
      # bfloat16 in another order of sums.
      assert np.abs(next(a).astype(int) - next(b)).mean() < 2
    past = a._state.past.k
  assert {s.data.shape[-2] for s in past.scale.addressable_shards} == {1}
  assert past.numbers.dtype == jnp.int8


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    ({'weights_dtype': 'int4'}, r"weights_dtype='int4' is not one of \("),
    ({'past_dtype': 'bf16'}, r"past_dtype='bf16' is not one of \('int8'"),
    ({'products_dtype': 'int8'}, "needs weights_dtype='int8', which is None"),
    ({'products_dtype': 'int4'}, "products_dtype='int4' is not one of"),
  ],
)
def test_what_is_no_dtype_is_named_before_files_are_looked_for(wrong, message):
  with pytest.raises(ValueError, match=message):
    loading.load('nowhere', **wrong)


def test_the_matrices_of_the_layers_are_nearly_all_numbers():
  params = jax.eval_shape(DENOISER.init, jax.random.key(0))
  kept = held.Held('int8').shapes(params, 'bfloat16')
  names = {name for name in flat_shapes(kept) if quantised.matrix(name)}
  assert len(names) == len(lora.shapes(lora.LoRAConfig(1), params)) / 2
  assert KERNEL + quantised.SCALE in names


def flat_shapes(tree):
  return networks.shapes(tree)
