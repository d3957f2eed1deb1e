"""Files as people bring them: read if they can be, else said what they are."""

import json
import pathlib

import numpy as np
import pytest

from hiar_jax.text import tokens
from hiar_jax.weights import (
  conversion,
  foreign,
  identity,
  layouts,
  releases,
  safetensors_io,
)
from tests import fake_release

OPTIONS = conversion.Options(
  latent_size=(4, 4), compute_dtype='float32', attention='xla', head_dim=12
)
LFS = (
  b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5000\n'
)
PAGE = b'<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>'


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
  reader = safetensors_io.Reader(path)
  return {name: reader.read(name) for name in reader.entries}


def transformer(**changes) -> dict[str, np.ndarray]:
  return fake_release.state_dict('transformer', 'wan', **changes)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (LFS, 'is a Git LFS pointer of .* bytes'),
    (PAGE, 'is an HTML page'),
    (b'<?xml version="1.0"?><Error>AccessDenied</Error>', 'XML .*AccessDenied'),
    (b'', 'is empty'),
    (b'\0' * 3000, 'zeros at its beginning: its download was not finished'),
    (b'GGUF\x03\0\0\0' + b'\0' * 50, 'is a GGUF file, .*ComfyUI-GGUF'),
    (b'\x1f\x8b\x08\0' + b'x' * 50, 'gzip archive'),
    (b'Entry not found', "text, not weights: 'Entry not found'"),
    (b'{"error": "Access to model is restricted"}', 'text, .*restricted'),
    (b'/annex/objects/SHA256E-s5--ab.pt\n', 'git-annex pointer'),
  ],
)
@pytest.mark.parametrize('name', ['x.pt', 'x.safetensors'])
def test_what_is_no_weights_is_said_to_be_what_it_is(
  tmp_path, name, content, message
):
  if name == 'x.safetensors' and content[:1] in (b'E', b'{'):
    message = 'is damaged'  # Any bytes may be a header's length.
  path = tmp_path / name
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message) as caught:
    releases.find(path)
  assert str(path) in str(caught.value)


@pytest.mark.parametrize('name', ['tokenizer.json', 'spiece.model'])
@pytest.mark.parametrize(
  ('content', 'message'),
  [(LFS, 'is a Git LFS pointer'), (PAGE, 'is an HTML page'), (b'', 'is empty')],
)
def test_a_pointer_or_a_page_is_no_tokenizer(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    tokens.load_tokenizer(tmp_path)


def test_a_config_that_is_a_pointer_is_said_to_be_one(tmp_path):
  fake_release.write(tmp_path / 'x.safetensors', transformer())
  (tmp_path / 'config.json').write_bytes(LFS)
  with pytest.raises(ValueError, match='config.json is a Git LFS pointer'):
    identity.open_network(tmp_path / 'x.safetensors', head_dim=12)


def _renamed(rename):
  return {rename(name): array for name, array in transformer().items()}


@pytest.mark.parametrize(
  'prefix',
  [
    *('net.', 'pipe.dit.', 'transformer.', 'base_model.model.', 'dit.'),
    *('student.', 'ema.model.', 'wan_model.generator.'),
  ],
)
def test_a_prefix_of_all_names_is_taken_off(tmp_path, prefix):
  path = tmp_path / 'x.safetensors'
  fake_release.write(path, _renamed(lambda name: prefix + name))
  network = identity.open_network(path, head_dim=12)
  state = transformer()
  assert network.state.shapes.keys() == state.keys()
  np.testing.assert_array_equal(
    network.state.read('head.head.bias'), state['head.head.bias']
  )


def test_a_text_encoder_is_not_taken_for_one_with_a_prefix(tmp_path):
  state = fake_release.state_dict('text_encoder', 'diffusers')
  # All its names begin with 'encoder.' then.
  state['encoder.embed_tokens.weight'] = state.pop('shared.weight')
  fake_release.write(tmp_path / 'x.safetensors', state)
  network = identity.open_network(tmp_path / 'x.safetensors')
  assert (network.kind, network.naming) == ('text_encoder', 'diffusers')


def test_layers_that_peft_wraps_are_read_and_its_additions_refused(tmp_path):
  wrap = lambda name: (
    'base_model.model.'
    + name.replace('.q.weight', '.q.base_layer.weight').replace(
      '.q.bias', '.q.base_layer.bias'
    )
  )
  path = tmp_path / 'x.safetensors'
  fake_release.write(path, _renamed(wrap))
  assert identity.open_network(path, head_dim=12).kind == 'transformer'
  added = 'base_model.model.blocks.0.self_attn.q.lora_A.default.weight'
  fake_release.write(
    path, _renamed(wrap) | {added: np.zeros((2, 24), np.float32)}
  )
  with pytest.raises(ValueError, match='is a LoRA: .*this file as --lora'):
    identity.open_network(path, head_dim=12)


def test_tables_that_a_network_computes_are_left_out(tmp_path):
  state = transformer() | {
    'freqs': np.zeros((1024, 6), np.float32),
    'rope.freqs_cos': np.zeros((4, 6), np.float32),
  }
  fake_release.write(tmp_path / 'x.safetensors', state)
  network = identity.open_network(tmp_path / 'x.safetensors', head_dim=12)
  assert 'freqs' not in network.state.shapes


def _with(state, *names, dtype=np.float32):
  return state | {name: np.zeros(3, dtype) for name in names}


def _as(dtype):
  return {
    name: array.astype(dtype) if array.ndim > 1 else array
    for name, array in transformer().items()
  }


def _channels(inputs):
  state = transformer()
  weight = state['patch_embedding.weight']
  shape = (weight.shape[0], inputs, *weight.shape[2:])
  return state | {'patch_embedding.weight': np.zeros(shape, np.float32)}


_T5 = {
  name: array
  for name, array in fake_release.state_dict(
    'text_encoder', 'diffusers'
  ).items()
  if 'block.1.layer.0.SelfAttention.relative' not in name
}


@pytest.mark.parametrize(
  ('state', 'message'),
  [
    (
      {
        'diffusion_model.blocks.0.self_attn.q.lora_down.weight': np.ones(2),
        'diffusion_model.blocks.0.self_attn.q.lora_up.weight': np.ones(2),
      },
      'is a LoRA',
    ),
    ({'lora_unet_blocks_0_ffn_0.alpha': np.ones(1)}, 'is a LoRA'),
    (
      _with(transformer(), 'scaled_fp8', 'blocks.0.ffn.0.scale_weight'),
      'is stored in scaled fp8 whose scales are of no float8 or int8 weight',
    ),
    (_as(np.int8), r'is quantised: \d+ of \d+ arrays are integers'),
    (
      _with(transformer(), 'blocks.0.ffn.0.weight.absmax'),
      'is quantised by bitsandbytes',
    ),
    (
      _with(transformer(), 'img_emb.proj.0.weight'),
      'is an image-to-video transformer.*WanImageToVideoPipeline',
    ),
    (_channels(36), 'is an image-to-video transformer'),
    (_channels(48), '48 input and 16 output channels'),
    (_with(transformer(), 'vace_blocks.0.x'), 'is a VACE transformer'),
    (_with(transformer(), 'control_adapter.conv.weight'), 'is a Wan-Fun'),
    (_with(transformer(), 'face_adapter.x'), 'is an Animate transformer'),
    (_with(transformer(), 'audio_injector.x'), 'is a speech-to-video'),
    (
      {
        'decoder.upsamples.0.upsamples.0.residual.2.weight': np.ones(2),
        'encoder.conv1.weight': np.ones(2),
      },
      'is the VAE of Wan2.2-TI2V-5B',
    ),
    (
      _with({}, 'visual.patch_embedding.weight', 'log_scale'),
      'is a CLIP encoder',
    ),
    (_T5, 'is a T5 encoder'),
    (
      {f'model.diffusion_model.{k}': v for k, v in transformer().items()}
      | {'vae.conv1.weight': np.ones(2)},
      r"is an all-in-one checkpoint \(it has \['vae'\]",
    ),
    ({'double_blocks.0.img_attn.qkv.weight': np.ones(2)}, 'another family'),
  ],
)
def test_a_network_of_another_kind_is_said_to_be_that(tmp_path, state, message):
  fake_release.write(tmp_path / 'x.safetensors', state)
  with pytest.raises(ValueError, match=message):
    identity.open_network(tmp_path / 'x.safetensors', head_dim=12)


def test_the_vae_config_of_wan22_is_refused_by_name(tmp_path):
  state = fake_release.state_dict('vae', 'diffusers')
  fake_release.write(tmp_path / 'x.safetensors', state)
  config = layouts.config_of(fake_release.CONFIGS['vae'], 'diffusers')
  config |= {'patch_size': 2, 'is_residual': True, 'in_channels': 12}
  (tmp_path / 'config.json').write_text(json.dumps(config))
  with pytest.raises(ValueError, match="is of Wan2.2-TI2V-5B's VAE"):
    identity.open_network(tmp_path / 'x.safetensors')


def test_an_unfinished_download_is_named(tmp_path):
  (tmp_path / 'model.safetensors.incomplete').write_bytes(b'abc')
  with pytest.raises(ValueError, match='incomplete is a download that was not'):
    releases.find(tmp_path)
  (tmp_path / 'model.safetensors.incomplete').unlink()
  (tmp_path / '__0_0.distcp').write_bytes(b'abc')
  with pytest.raises(ValueError, match='distributed checkpoint; make one'):
    releases.find(tmp_path)


def test_safetensors_named_as_a_pickle_are_read(tmp_path):
  fake_release.write(tmp_path / 'x.safetensors', transformer())
  (tmp_path / 'x.safetensors').rename(tmp_path / 'x.pt')
  state = foreign.StateDict(tmp_path / 'x.pt')
  assert state.shapes.keys() == transformer().keys()


def test_a_link_to_nowhere_is_told(tmp_path):
  fake_release.write_release(tmp_path, 'wan')
  (path,) = tmp_path.glob('diffusion*.safetensors')
  path.unlink()
  path.symlink_to('/nowhere/blob')
  with pytest.raises(
    FileNotFoundError, match='is a link to /nowhere/blob, whi'
  ):
    releases.find(tmp_path)


def test_a_size_in_a_config_that_is_no_number_is_named(tmp_path):
  fake_release.write_release(tmp_path, 'wan')
  file = tmp_path / 'config.json'
  sizes = json.loads(file.read_text())
  file.write_text(json.dumps(sizes | {'num_heads': '2'}))
  (path,) = tmp_path.glob('diffusion*.safetensors')
  with pytest.raises(ValueError, match="json: num_heads='2' is no number"):
    identity.open_network(path)
