"""Files as people have them: fp8 and int8 with scales, a file a layer, hubs."""

import json

import ml_dtypes
import numpy as np
import pytest

from hiar_jax.weights import (
  conversion,
  foreign,
  hub,
  identity,
  releases,
  safetensors_io,
)
from tests import fake_release

FP8, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
OPTIONS = conversion.Options(
  latent_size=(4, 4), compute_dtype='float32', attention='xla', head_dim=12
)


def is_linear(name, array):
  return (
    name.startswith('blocks.') and name.endswith('weight') and (array.ndim == 2)
  )


def quantised(dtype, per_row, end, *, kept=(), marks=True):
  """(file, what it stands for): matrices of the layers in fewer bits."""
  most = {np.int8: 127.0}.get(dtype, 448.0)
  file, meant = {}, {}
  for name, array in fake_release.state_dict('transformer', 'wan').items():
    if not is_linear(name, array) or name.startswith(tuple(kept)):
      file[name] = meant[name] = array.astype(np.float16 if kept else BF16)
      continue
    axis = 1 if per_row else None
    scale = np.abs(array).max(axis, keepdims=per_row).astype(np.float32) / most
    few = array / scale
    few = np.rint(few).astype(dtype) if dtype == np.int8 else few.astype(dtype)
    stem = name.removesuffix('.weight')
    file |= {name: few, f'{stem}.{end}': np.asarray(scale)}
    if marks:
      file[f'{stem}.scale_input'] = np.ones((), np.float32)
    meant[name] = (few.astype(np.float32) * scale).astype(BF16)
  if marks:
    file['scaled_fp8'] = np.zeros(2, FP8)
  return file, meant


@pytest.mark.parametrize(
  ('dtype', 'per_row', 'end', 'prefix', 'marks'),
  [
    (FP8, False, 'scale_weight', 'model.diffusion_model.', True),
    (FP8, False, 'scale_weight', '', True),
    (FP8, True, 'weight_scale', '', False),
    (np.int8, True, 'weight_scale', 'diffusion_model.', False),
    (ml_dtypes.float8_e5m2, True, 'weight_scale', 'net.', True),
  ],
)
def test_scaled_weights_are_read_as_what_they_stand_for(
  tmp_path, dtype, per_row, end, prefix, marks
):
  file, meant = quantised(dtype, per_row, end, marks=marks)
  path = tmp_path / 'x.safetensors'
  fake_release.write(path, {prefix + k: v for k, v in file.items()})
  network = identity.open_network(path, head_dim=12)
  assert network.state.shapes.keys() == meant.keys()
  for name, array in meant.items():
    read = network.state.read(name)
    assert read.dtype == network.state.dtypes[name] == array.dtype, name
    np.testing.assert_array_equal(read, array)


def test_fp8_without_scales_stands_for_itself(tmp_path):
  state = {
    name: array.astype(FP8 if is_linear(name, array) else np.float16)
    for name, array in fake_release.state_dict('transformer', 'wan').items()
  }
  fake_release.write(tmp_path / 'x.safetensors', state)
  network = identity.open_network(tmp_path / 'x.safetensors', head_dim=12)
  name = 'blocks.0.ffn.0.weight'
  np.testing.assert_array_equal(
    network.state.read(name), state[name].astype(BF16)
  )


def test_a_scaled_file_with_whole_layers_is_converted(tmp_path):
  file, meant = quantised(FP8, False, 'scale_weight', kept=('blocks.0.',))
  fake_release.write(tmp_path / 'x.safetensors', file)
  release = releases.find(tmp_path / 'x.safetensors')
  conversion.to_ours(release, tmp_path / 'out', name='x', options=OPTIONS)
  reader = safetensors_io.Reader(tmp_path / 'out' / 'student.safetensors')
  ffn = reader.read('layers/ffn_in/kernel')
  for layer in range(2):
    np.testing.assert_array_equal(
      ffn[layer].T, meant[f'blocks.{layer}.ffn.0.weight'].astype(np.float32)
    )


def test_a_scaled_text_encoder_is_read(tmp_path):
  state = fake_release.state_dict('text_encoder', 'diffusers')
  name = 'encoder.block.1.layer.1.DenseReluDense.wo.weight'
  state |= {
    name: state[name].astype(FP8),
    name.replace('.weight', '.scale_weight'): np.float32(3.0).reshape(()),
    'scaled_fp8': np.zeros(2, FP8),
  }
  fake_release.write(tmp_path / 'umt5.safetensors', state)
  network = identity.open_network(tmp_path / 'umt5.safetensors')
  np.testing.assert_array_equal(
    network.state.read(name), (3 * state[name].astype(np.float32)).astype(BF16)
  )


def test_scales_by_block_are_refused_with_both_shapes(tmp_path):
  file, _ = quantised(FP8, True, 'weight_scale')
  file['blocks.1.ffn.0.weight_scale'] = np.ones((2, 3), np.float32)
  fake_release.write(tmp_path / 'x.safetensors', file)
  with pytest.raises(ValueError, match=r'has shape \(2, 3\) for a weight of'):
    foreign.StateDict(tmp_path / 'x.safetensors')


@pytest.fixture
def by_layer(tmp_path):
  """LightX2V's layout: block_0, block_1, non_block, and an index."""
  file, meant = quantised(FP8, True, 'weight_scale', marks=False)
  groups = {}
  for name, array in file.items():
    head, layer, *_ = name.split('.')
    group = f'block_{layer}' if head == 'blocks' else 'non_block'
    groups.setdefault(f'{group}.safetensors', {})[name] = array
  for group, arrays in groups.items():
    fake_release.write(tmp_path / group, arrays)
  index = {name: g for g, arrays in groups.items() for name in arrays}
  (tmp_path / 'diffusion_pytorch_model.safetensors.index.json').write_text(
    json.dumps({'metadata': {}, 'weight_map': index})
  )
  return tmp_path, meant


def test_a_file_a_layer_is_one_set_by_its_index(by_layer):
  folder, meant = by_layer
  release = releases.find(folder)
  network = conversion.open_networks(release, OPTIONS)['transformer']
  assert network.state.shapes.keys() == meant.keys()
  assert {f.name for f in releases.files_of(release.transformer)} >= {
    *('block_0.safetensors', 'block_1.safetensors', 'non_block.safetensors'),
  }


def test_a_layer_that_is_missing_is_named(by_layer):
  folder, _ = by_layer
  (folder / 'block_1.safetensors').unlink()
  with pytest.raises(FileNotFoundError, match='block_1.safetensors'):
    conversion.open_networks(releases.find(folder), OPTIONS)


def test_of_a_hubs_files_a_layer_all_are_fetched():
  sizes = {
    'config.json': 1,
    'diffusion_pytorch_model.safetensors.index.json': 1,
    **{f'block_{i}.safetensors': 9 for i in range(3)},
    'non_block.safetensors': 9,
    'README.md': 1,
  }
  assert set(hub.choose(sizes, 'a/b')) == sizes.keys() - {'README.md'}


@pytest.mark.parametrize(
  'name',
  [
    'a/b:checkpoints/x.pt',
    'a/b/checkpoints/x.pt',
    'a/b:x++/framewise-2step.pt',
  ],
)
def test_a_file_in_a_repository_has_two_spellings(name):
  assert hub.is_name(name)
  assert not hub.is_name('a:b/c:d')


def test_a_colon_fetches_that_file_alone(tmp_path, monkeypatch):
  huggingface_hub = pytest.importorskip('huggingface_hub')
  sizes, asked = {'ckpt/x.pt': 5, 'ckpt/y.pt': 7, 'other.pt': 9}, []

  class Api:
    def model_info(self, repo, files_metadata):
      asked.append(repo)
      siblings = [_file(f, n) for f, n in sizes.items()]
      return type('Info', (), {'siblings': siblings, 'sha': 'ab'})

  def _file(name, size):
    return type('File', (), {'rfilename': name, 'size': size})

  def fetch(repo, **options):
    asked.extend(options['allow_patterns'])
    return str(tmp_path)

  monkeypatch.delenv('HF_HUB_OFFLINE', raising=False)
  monkeypatch.setattr(huggingface_hub, 'HfApi', Api)
  monkeypatch.setattr(huggingface_hub, 'snapshot_download', fetch)
  assert hub.download('a/b:ckpt/x.pt') == tmp_path / 'ckpt/x.pt'
  assert asked == ['a/b', 'ckpt/x.pt']


def test_one_of_two_experts_is_not_taken_for_the_whole(tmp_path):
  fake_release.write(
    tmp_path / 'transformer' / 'diffusion_pytorch_model.safetensors',
    fake_release.state_dict('transformer', 'diffusers'),
  )
  index = {'transformer': ['diffusers', 'X'], 'transformer_2': [None, None]}
  (tmp_path / 'model_index.json').write_text(json.dumps(index))
  assert releases.find(tmp_path).transformer is not None
  index['transformer_2'] = ['diffusers', 'X']
  (tmp_path / 'model_index.json').write_text(json.dumps(index))
  with pytest.raises(ValueError, match='two transformers as Wan2.2-A14B has'):
    releases.find(tmp_path)


def test_wan22s_5b_is_refused_by_name(tmp_path):
  state = fake_release.state_dict('transformer', 'wan', channels=48)
  fake_release.write(tmp_path / 'x.safetensors', state)
  with pytest.raises(ValueError, match='the transformer of Wan2.2-TI2V-5B'):
    releases.find(tmp_path / 'x.safetensors')
