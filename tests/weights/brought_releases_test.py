"""Releases as people bring them: what is missing or does not go together."""

import json
import os
import pathlib
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest

from hiar_jax.sampling import loading
from hiar_jax.text import tokens
from hiar_jax.weights import (
  conversion,
  conversion_cache,
  finite,
  layouts,
  releases,
)
from tests import fake_release

OPTIONS = conversion.Options(
  latent_size=(4, 4), compute_dtype='float32', attention='xla', head_dim=12
)
LFS = (
  b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5000\n'
)
PAGE = b'<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>'


def transformer(**changes) -> dict[str, np.ndarray]:
  return fake_release.state_dict('transformer', 'wan', **changes)


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('HIAR_JAX_CACHE', str(tmp_path / 'cache'))
  return tmp_path / 'cache'


def test_a_tokenizer_is_looked_at_before_gigabytes_are_converted(tmp_path):
  fake_release.write_release(tmp_path / 'in', 'wan')
  (file,) = (tmp_path / 'in').glob('google/*/tokenizer.json')
  file.write_bytes(LFS)
  with pytest.raises(ValueError, match='tokenizer.json is a Git LFS pointer'):
    conversion.to_ours(
      releases.find(tmp_path / 'in'),
      tmp_path / 'out',
      name='x',
      options=OPTIONS,
    )
  assert not (tmp_path / 'out').exists()


def _renamed(rename):
  return {rename(name): array for name, array in transformer().items()}


@pytest.mark.parametrize(
  'pair', [('high_noise_model', 'low_noise_model'), ('transformer',) * 2]
)
def test_two_experts_are_refused_by_name_and_one_is_read(tmp_path, cache, pair):
  pair = (pair[0], 'transformer_2') if pair[0] == pair[1] else pair
  fake_release.write_release(tmp_path / 'a14b', 'wan')
  for path in (tmp_path / 'a14b').glob('diffusion_pytorch_model*'):
    path.unlink()
  for name in pair:
    folder = tmp_path / 'a14b' / name
    fake_release.write(
      folder / 'diffusion_pytorch_model.safetensors', transformer()
    )
  with pytest.raises(ValueError) as caught:
    releases.find(tmp_path / 'a14b')
  caught.match('two transformers as Wan2.2-A14B has')
  caught.match(f'Give .*a14b/{pair[0]} or .*a14b/{pair[1]}, with base=')
  made = conversion_cache.cached(
    tmp_path / 'a14b' / pair[1], base=tmp_path / 'a14b', options=OPTIONS
  )
  assert {p.name for p in made.iterdir()} >= set(layouts.OWN_FILES.values())


def test_wan22s_vae_is_not_passed_over(tmp_path):
  fake_release.write_release(tmp_path, 'wan')
  (tmp_path / 'Wan2.1_VAE.safetensors').unlink()
  state = {
    'encoder.downsamples.0.downsamples.0.residual.0.gamma': np.ones(2),
    'encoder.conv1.weight': np.ones(2),
  }
  fake_release.write(tmp_path / 'Wan2.2_VAE.safetensors', state)
  with pytest.raises(ValueError, match='Wan2.2_VAE.* is the VAE of Wan2.2'):
    conversion.open_networks(releases.find(tmp_path), OPTIONS)


def _single_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """As ComfyUI's repository has them, the tokenizer inside the encoder."""
  sentencepiece = pytest.importorskip('sentencepiece')
  folder.mkdir()
  corpus = folder / 'corpus.txt'
  corpus.write_text('a red disc\na cat and a dog\nred dog\n' * 20)
  sentencepiece.SentencePieceTrainer.train(
    input=str(corpus),
    model_prefix=str(folder / 'pieces'),
    vocab_size=18,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    minloglevel=2,
  )
  model = np.frombuffer((folder / 'pieces.model').read_bytes(), np.uint8)
  for file in folder.iterdir():
    file.unlink()
  encoder = fake_release.state_dict('text_encoder', 'diffusers')
  paths = []
  for name, state in (
    ('wan2.1_t2v.safetensors', _renamed('model.diffusion_model.{}'.format)),
    ('wan_2.1_vae.safetensors', fake_release.state_dict('vae', 'wan')),
    ('umt5_xxl_fp16.safetensors', encoder | {'spiece_model': model}),
  ):
    fake_release.write(folder / name, state)
    paths.append(folder / name)
  return paths


@pytest.mark.parametrize('how', ['folder', 'list', 'commas'])
def test_three_single_files_are_told_apart_by_their_contents(
  tmp_path, cache, how
):
  paths = _single_files(tmp_path / 'files')
  name = {
    'folder': tmp_path / 'files',
    'list': paths,
    'commas': ','.join(map(str, paths)),
  }[how]
  made = conversion_cache.cached(
    name,
    options=OPTIONS,
    needs=('transformer', 'vae', 'text_encoder', 'tokenizer'),
  )
  assert {p.name for p in made.iterdir()} >= set(layouts.OWN_FILES.values())
  # The tokenizer comes out of the text encoder's file.
  ids = tokens.load_tokenizer(made / 'tokenizer')('a red dog')
  assert ids[-1] == 1 and len(ids) > 2
  pipe = loading.load(made)
  assert pipe.encoder.encode(['a red dog']).shape == (1, 512, 16)


def test_two_files_of_one_kind_are_named(tmp_path):
  paths = [tmp_path / 'a.safetensors', tmp_path / 'b.safetensors']
  for path in paths:
    fake_release.write(path, transformer())
  with pytest.raises(ValueError, match='a.safetensors.*b.safe.* both a transf'):
    releases.locate(paths)


def test_comfyuis_folders_are_known(tmp_path):
  paths = _single_files(tmp_path / 'files')
  for path, folder in zip(paths, ('diffusion_models', 'vae', 'text_encoders')):
    (tmp_path / folder).mkdir()
    path.rename(tmp_path / folder / path.name)
  assert not releases.find(tmp_path).tokenizer
  assert releases.find(tmp_path).vae.name == 'wan_2.1_vae.safetensors'


@pytest.mark.parametrize('at_load', [False, True])
def test_parts_that_do_not_go_together_are_both_named(tmp_path, at_load):
  fake_release.write_release(tmp_path / 'in', 'wan')
  wide = transformer(channels=32)
  file = tmp_path / 'in' / layouts.FILES['wan']['transformer']
  if not at_load:
    config = json.loads((tmp_path / 'in' / 'config.json').read_text())
    config |= {'in_dim': 32, 'out_dim': 32}
    (tmp_path / 'in' / 'config.json').write_text(json.dumps(config))
    fake_release.write(file, wide)
  convert = lambda: conversion.to_ours(
    releases.find(tmp_path / 'in'),
    tmp_path / 'out',
    name='x',
    options=OPTIONS,
  )
  message = r'{}.* and .*{}.* do not go together: the transformer takes 32 lat'
  if not at_load:
    with pytest.raises(ValueError, match=message.format(file.name, 'VAE')):
      convert()
    assert not (tmp_path / 'out').exists()
    return
  convert()
  path = tmp_path / 'out' / 'config.json'
  config = json.loads(path.read_text())
  config['model']['channels'] = 32
  path.write_text(json.dumps(config))
  with pytest.raises(ValueError, match=message.format('student', 'vae.safe')):
    loading.load(tmp_path / 'out')
  config['model']['channels'] = 16
  config['umt5']['dim'] = 24
  path.write_text(json.dumps(config))
  with pytest.raises(ValueError, match='takes 16 numbers a token.* gives 24'):
    loading.load(tmp_path / 'out')


@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16])
def test_values_that_are_not_finite_are_counted_and_named(tmp_path, dtype):
  state = transformer(dtype=dtype)
  state['blocks.1.ffn.0.bias'][2:4] = np.nan
  state['head.head.bias'][0] = np.inf
  fake_release.write(tmp_path / 'x.safetensors', state)
  with pytest.raises(ValueError) as caught:
    conversion.to_ours(
      releases.find(tmp_path), tmp_path / 'out', name='x', options=OPTIONS
    )
  caught.match("x.safetensors has values that are not finite: .*2 of 16 in 'bl")
  caught.match("1 of 64 in 'head.head.bias'")
  # Nothing half done stays.
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('format', conversion.FORMATS)
def test_loading_counts_values_that_are_not_finite(tmp_path, format):
  fake_release.write_release(tmp_path / 'in', 'wan')
  patch = pytest.MonkeyPatch()
  with patch.context() as patched:
    # Written by what did not look.
    patched.setattr(finite, 'check', lambda *unused: None)
    state = transformer()
    state['head.head.bias'][5] = np.nan
    fake_release.write(
      tmp_path / 'in' / layouts.FILES['wan']['transformer'], state
    )
    conversion.to_ours(
      releases.find(tmp_path / 'in'),
      tmp_path / 'out',
      name='x',
      options=conversion.Options(**(vars(OPTIONS) | {'format': format})),
    )
  with pytest.raises(ValueError, match="not finite: 1 of 64 in 'head/bias'"):
    loading.load(tmp_path / 'out')


def test_what_is_missing_is_said_before_anything_is_converted(tmp_path, cache):
  fake_release.write_release(tmp_path / 'in', 'wan')
  (tmp_path / 'in' / layouts.FILES['wan']['text_encoder']).unlink()
  with pytest.raises(FileNotFoundError) as caught:
    loading.load(tmp_path / 'in')
  caught.match('in: no text encoder. Looked for text_encoder/.*models_t5')
  caught.match('the other parts are in .*in')
  assert not cache.exists()


def test_a_cache_that_cannot_be_written_names_the_variable(
  tmp_path, monkeypatch
):
  fake_release.write_release(tmp_path / 'in', 'wan')
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('HIAR_JAX_CACHE', str(tmp_path / 'file' / 'cache'))
  with pytest.raises(OSError, match='HIAR_JAX_CACHE names another folder'):
    conversion_cache.cached(tmp_path / 'in', options=OPTIONS)


def test_the_next_conversion_clears_what_a_killed_one_left(tmp_path, cache):
  fake_release.write_release(tmp_path / 'in', 'wan')
  # Dies as at SIGKILL, inside the conversion.
  code = (
    'import os, sys\n'
    'from hiar_jax.weights import conversion, conversion_cache\n'
    'conversion.to_ours = lambda *a, **k: os._exit(9)\n'
    'conversion_cache.cached(sys.argv[1])\n'
  )
  done = subprocess.run([sys.executable, '-c', code, str(tmp_path / 'in')])
  assert done.returncode == 9
  (left,) = [p for p in cache.iterdir() if p.is_dir()]
  # One that is being written by a process that lives is let be.
  with conversion_cache._partial_folder(cache / 'other') as living:
    conversion_cache.cached(tmp_path / 'in', options=OPTIONS)
    assert living.exists() and not left.exists()
  (made,) = cache.iterdir()
  assert (made / 'config.json').exists()


def test_a_young_folder_without_its_lock_is_let_be(tmp_path, cache):
  fake_release.write_release(tmp_path / 'in', 'wan')
  for name, age in (('young', 0), ('old', 7200)):
    folder = cache / f'{name}.partial'
    folder.mkdir(parents=True)
    os.utime(folder, (time.time() - age,) * 2)
  conversion_cache.cached(tmp_path / 'in', options=OPTIONS)
  left = {path.name for path in cache.glob('*.partial')}
  assert left == {'young.partial'}


@pytest.mark.parametrize('as_path', [False, True])
def test_a_folder_of_ones_own_is_not_shadowed_by_the_packages(
  tmp_path, cache, monkeypatch, capsys, as_path
):
  fake_release.write_release(tmp_path / 'in', 'wan')
  conversion.to_ours(
    releases.find(tmp_path / 'in'),
    tmp_path / 'bouncing',
    name='mine',
    options=OPTIONS,
  )
  monkeypatch.chdir(tmp_path)
  name = pathlib.Path('./bouncing') if as_path else 'bouncing'
  assert loading.load(name).name == 'mine'
  noted = "'bouncing' is " in capsys.readouterr().err
  assert noted == (not as_path)
  monkeypatch.chdir(tmp_path / 'in')
  with pytest.raises(ValueError, match="no pipeline 'bouncing'"):
    loading.load(pathlib.Path('bouncing'))


@pytest.mark.parametrize('name', ['WanModel', 'CausalWanModel'])
def test_the_base_model_is_said_to_be_no_student(tmp_path, cache, capsys, name):
  fake_release.write_release(tmp_path / 'in', 'wan')
  path = tmp_path / 'in' / 'config.json'
  config = json.loads(path.read_text()) | {'_class_name': name}
  path.write_text(json.dumps(config))
  if name == 'CausalWanModel':
    with pytest.raises(ValueError, match='what these weights were trained for'):
      loading.load(tmp_path / 'in')
  family = None if name == 'WanModel' else 'hiar'
  loading.load(tmp_path / 'in', family=family)
  noted = "are the weights of Wan2.1's own" in capsys.readouterr().err
  assert noted == (name == 'WanModel')
