"""LoRA files of others: merged as their writers mean them, or named.

The merged weights are held to sums under the foreign names, in NumPy.
"""

import json

import jax
import numpy as np
import pytest

import hiar_jax
from hiar_jax.models import lora
from hiar_jax.runtime import errors
from hiar_jax.sampling import loading
from hiar_jax.weights import (
  adapter_files,
  conversion,
  identity,
  lora_files,
  releases,
  safetensors_io,
)
from tests import fake_release

MODEL = fake_release.CONFIGS['transformer']
OPTIONS = conversion.Options(
  latent_size=(4, 4), compute_dtype='float32', attention='xla'
)
RANK, ALPHA, SCALE = 2, 3.0, 0.5
# Wan2.1's name of a matrix -> diffusers'.
MATRICES = {
  'blocks.0.self_attn.q': 'blocks.0.attn1.to_q',
  'blocks.1.self_attn.o': 'blocks.1.attn1.to_out.0',
  'blocks.1.cross_attn.k': 'blocks.1.attn2.to_k',
  'blocks.0.ffn.0': 'blocks.0.ffn.net.0.proj',
  'time_projection.1': 'condition_embedder.time_proj',
  'patch_embedding': 'patch_embedding',
}


@pytest.fixture(scope='module')
def release(tmp_path_factory):
  """A folder of Wan2.1's layout, and the arrays of its transformer."""
  folder = tmp_path_factory.mktemp('release')
  states = fake_release.write_release(
    folder, 'wan', changes={'vae': None, 'text_encoder': None}
  )
  return folder, states['transformer']


def factors(state):
  """Wan2.1's name of a matrix -> (down, up), shaped as trainers have them."""
  rng = np.random.default_rng(3)
  found = {}
  for name in MATRICES:
    outputs, *inputs = state[f'{name}.weight'].shape
    found[name] = (
      rng.normal(size=(RANK, *inputs)).astype(np.float32),
      rng.normal(size=(outputs, RANK, *(1 for _ in inputs[1:]))).astype(
        np.float32
      ),
    )
  return found


def product(down, up):
  whole = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
  return whole.reshape(len(up), *down.shape[1:])


def comfyui(pairs):
  arrays = {}
  for name, (down, up) in pairs.items():
    name = f'diffusion_model.{name}'
    arrays[f'{name}.lora_down.weight'] = down
    arrays[f'{name}.lora_up.weight'] = up
    arrays[f'{name}.alpha'] = np.float32(ALPHA)
  return arrays


def kohya(pairs):
  return {
    'lora_unet_'
    + key.removeprefix('diffusion_model.')
    .replace('.', '_')
    .replace('_lora_down_weight', '.lora_down.weight')
    .replace('_lora_up_weight', '.lora_up.weight')
    .replace('_alpha', '.alpha'): array
    for key, array in comfyui(pairs).items()
  }


def diffusers(pairs, prefix='transformer.', adapter=''):
  arrays = {}
  for name, (down, up) in pairs.items():
    name = prefix + MATRICES[name]
    arrays[f'{name}.lora_A{adapter}.weight'] = down
    arrays[f'{name}.lora_B{adapter}.weight'] = up
  return arrays


def write(path, arrays, metadata=None):
  plan = {name: (a.shape, a.dtype) for name, a in arrays.items()}
  with safetensors_io.Writer(path, plan, metadata=metadata) as writer:
    for name, array in arrays.items():
      writer.write(name, array)
  return path


def write_form(folder, form, pairs):
  """A file of these factors; the weight that alpha gives them."""
  path = folder / 'lora.safetensors'
  header = {'transformer.r': RANK, 'transformer.lora_alpha': ALPHA}
  if form in ('comfyui', 'kohya'):
    write(path, {'comfyui': comfyui, 'kohya': kohya}[form](pairs))
  elif form == 'diffusers':
    write(path, diffusers(pairs))
    return path, 1.0
  elif form == 'header':
    metadata = {'lora_adapter_metadata': json.dumps(header)}
    write(path, diffusers(pairs), metadata)
  else:
    path = folder / 'adapter_model.safetensors'
    write(path, diffusers(pairs, 'base_model.model.', '.default'))
    config = {'r': RANK, 'lora_alpha': ALPHA, 'use_rslora': form == 'rslora'}
    path.with_name('adapter_config.json').write_text(json.dumps(config))
    if form == 'rslora':
      return path, ALPHA / RANK**0.5
  return path, ALPHA / RANK


def merged(source, out, loras):
  """The transformer's arrays after a conversion there and back."""
  conversion.to_ours(
    releases.find(source), out / 'ours', name='x', options=OPTIONS, loras=loras
  )
  conversion.to_foreign(out / 'ours', out / 'back', naming='wan')
  reader = safetensors_io.Reader(
    out / 'back' / 'diffusion_pytorch_model.safetensors'
  )
  return {name: reader.read(name) for name in reader.entries}


def assert_close(found, expected):
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_allclose(found[name], array, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
  'form', ['comfyui', 'kohya', 'diffusers', 'header', 'peft', 'rslora']
)
def test_a_file_is_merged_as_its_writer_means_it(release, tmp_path, form):
  folder, state = release
  pairs = factors(state)
  path, weight = write_form(tmp_path, form, pairs)
  expected = dict(state)
  for name, (down, up) in pairs.items():
    expected[f'{name}.weight'] = state[
      f'{name}.weight'
    ] + SCALE * weight * product(down, up)
  assert_close(merged(folder, tmp_path, [(path, SCALE)]), expected)


def test_differences_are_added_to_weights_biases_and_modulation(
  release, tmp_path
):
  folder, state = release
  rng = np.random.default_rng(4)
  like = lambda name: rng.normal(size=state[name].shape).astype(np.float32)
  expected, arrays = dict(state), {}
  for name, key in (
    ('blocks.0.norm3.weight', 'blocks.0.norm3.diff'),
    ('blocks.0.self_attn.norm_q.weight', 'blocks.0.self_attn.norm_q.diff'),
    ('blocks.1.ffn.2.bias', 'blocks.1.ffn.2.diff_b'),
    ('blocks.1.modulation', 'blocks.1.modulation.diff'),
    ('blocks.0.modulation', 'blocks.0.diff_m'),
    ('head.modulation', 'head.diff_m'),
    ('text_embedding.0.weight', 'text_embedding.0.diff'),
  ):
    arrays[f'diffusion_model.{key}'] = like(name)
    expected[name] = state[name] + arrays[f'diffusion_model.{key}']
  path = write(tmp_path / 'lora.safetensors', arrays)
  assert_close(merged(folder, tmp_path, [path]), expected)


def test_a_bias_of_factors_counts_as_they_do(release, tmp_path):
  folder, state = release
  name = 'blocks.0.self_attn.q'
  arrays = comfyui({name: factors(state)[name]})
  bias = np.arange(24, dtype=np.float32)
  arrays[f'diffusion_model.{name}.lora_B.bias'] = bias
  path = write(tmp_path / 'lora.safetensors', arrays)
  found = merged(folder, tmp_path, [path])
  np.testing.assert_allclose(
    found[f'{name}.bias'],
    state[f'{name}.bias'] + ALPHA / RANK * bias,
    atol=1e-5,
  )


def test_several_files_add_up_on_the_way_out_too(release, tmp_path):
  folder, state = release
  pairs = factors(state)
  conversion.to_ours(
    releases.find(folder), tmp_path / 'ours', name='x', options=OPTIONS
  )
  path, _ = write_form(tmp_path, 'diffusers', pairs)
  conversion.to_foreign(
    tmp_path / 'ours',
    tmp_path / 'out',
    naming='self_forcing',
    loras=[path, (path, -0.25)],
  )
  reader = safetensors_io.Reader(tmp_path / 'out' / 'model.safetensors')
  for name, (down, up) in pairs.items():
    np.testing.assert_allclose(
      reader.read(f'generator_ema.model.{name}.weight'),
      state[f'{name}.weight'] + 0.75 * product(down, up),
      atol=1e-5,
    )


# --- Ours, out and in again.


def drawn(config, model=MODEL):
  rng = np.random.default_rng(5)
  return jax.tree.map(
    lambda a: rng.normal(size=a.shape).astype(np.float32),
    lora.init(config, identity.abstract_params(model), jax.random.key(0)),
  )


@pytest.mark.parametrize('naming', adapter_files.NAMINGS)
def test_adapters_come_back_from_their_file(tmp_path, naming):
  targets = ('.*',) if naming == 'comfyui' else ('.*kernel',)
  config = lora.LoRAConfig(rank=2, alpha=3.0, targets=targets)
  adapters = drawn(config)
  path = tmp_path / 'lora.safetensors'
  adapter_files.save(path, adapters, config, MODEL, naming=naming)
  found = adapter_files.read_adapters(path, config, MODEL)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, adapters
  )


def test_a_pipeline_is_loaded_with_a_lora(tmp_path):
  plain = hiar_jax.load('bouncing')
  model = plain.denoiser.config
  config = lora.LoRAConfig(rank=4, alpha=2.0)
  adapters = drawn(config, model)
  path = tmp_path / 'lora.safetensors'
  adapter_files.save(path, adapters, config, model)
  params = hiar_jax.load('bouncing', loras=[(path, 2.0)]).params
  expected = lora.merge(plain.params, adapters, 2.0 * config.scale)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    params,
    expected,
  )


# --- What does not fit.


def _of(rank=RANK, inputs=24, outputs=24, name='blocks.0.self_attn.q', **more):
  arrays = {
    f'{name}.lora_A.weight': np.ones((rank, inputs), np.float32),
    f'{name}.lora_B.weight': np.ones((outputs, rank), np.float32),
  }
  return arrays | {k.replace('__', '.'): v for k, v in more.items()}


_ONE = np.ones(1, np.float32)
_NAN = {**_of(), 'blocks.0.self_attn.q.lora_B.weight': np.full((24, 2), np.nan)}


@pytest.mark.parametrize(
  ('arrays', 'says'),
  [
    (_of(inputs=5120, outputs=5120), 'of another network: .* of 5120 x 5120'),
    (
      _of(name='blocks.7.self_attn.q'),
      "2 of 2 names that match nothing in the network, such as 'blocks.7.self",
    ),
    (_of(img_emb__proj__diff=_ONE), '1 of 3 names that match nothing'),
    ({'blocks.0.ffn.0.weight': _ONE}, 'is no LoRA: it has'),
    (
      {'blocks.0.ffn.0.hada_w1_a': _ONE, 'blocks.0.ffn.0.alpha': _ONE},
      'a LoRA of another kind, by its .*hada_w1_a',
    ),
    (
      {'blocks.0.ffn.0.lora_A.weight': np.ones((2, 24), np.float32)},
      'has no lora_up beside it',
    ),
    (
      _of() | {'blocks.0.self_attn.q.lora_B.weight': np.ones((24, 3))},
      'has rank 2, its pair 3',
    ),
    (
      {'blocks.0.ffn.0.diff_b': np.ones(3, np.float32)},
      r'has shape \(3,\), not \(16,\)',
    ),
  ],
)
def test_a_file_that_does_not_fit_is_one_line(tmp_path, arrays, says):
  path = write(tmp_path / 'lora.safetensors', arrays)
  with pytest.raises(ValueError, match=says) as caught:
    lora_files.open_lora(path, MODEL)
  message = errors.users_mistake(caught.value)
  assert message and '\n' not in message and str(path) in message


def test_values_that_are_not_finite_are_named(tmp_path):
  path = write(tmp_path / 'lora.safetensors', _NAN)
  opened = lora_files.open_lora(path, MODEL)
  with pytest.raises(ValueError, match='48 of 48 in .*lora_B'):
    opened.added('layers/self_attention/q/kernel', 0)


@pytest.mark.parametrize(
  ('config', 'says'),
  [
    ({'rank': 3}, 'has rank 2 for .*, and lora.rank is 3'),
    ({'rank': 2, 'targets': ('head/kernel',)}, 'an adapter of .*targets not'),
    ({'rank': 2, 'targets': ('.*kernel',)}, 'has nothing for .*head/lora_'),
  ],
)
def test_adapters_of_another_config_are_refused(tmp_path, config, says):
  path = tmp_path / 'lora.safetensors'
  saved = lora.LoRAConfig(rank=2)
  adapter_files.save(path, drawn(saved), saved, MODEL)
  with pytest.raises(ValueError, match=says):
    adapter_files.read_adapters(path, lora.LoRAConfig(**config), MODEL)


def test_diffusers_has_no_name_for_a_vector(tmp_path):
  config = lora.LoRAConfig(rank=2, targets=('.*bias',))
  with pytest.raises(ValueError, match="no name for .*take naming='comfyui'"):
    adapter_files.save(
      *(tmp_path / 'x.safetensors', drawn(config), config, MODEL),
      naming='diffusers',
    )


def test_flags_are_a_path_and_maybe_a_scale(tmp_path):
  (tmp_path / 'a:0.5').touch()
  for value, expected in (
    ('a.safetensors', ('a.safetensors', 1.0)),
    ('a.safetensors:0.5', ('a.safetensors', 0.5)),
    ('C:/a.safetensors', ('C:/a.safetensors', 1.0)),
    (f'{tmp_path}/a:0.5', (f'{tmp_path}/a:0.5', 1.0)),
  ):
    assert lora_files.parse_flag(value) == expected
  with pytest.raises(ValueError, match='is not PATH or PATH:SCALE'):
    lora_files.parse_flag(':0.5')


def test_a_missing_file_is_named():
  with pytest.raises(FileNotFoundError, match='no LoRA at nowhere'):
    loading.load('bouncing', loras=['nowhere'])
