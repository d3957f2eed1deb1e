"""The text encoder of published weights: kept, released, or not needed."""

import dataclasses
import pathlib
import weakref

import jax
import numpy as np
import pytest

import hiar_jax
from hiar_jax.sampling import calls
from hiar_jax.text import embeddings
from hiar_jax.text import tokens as text_tokens
from hiar_jax.text import umt5 as text_umt5
from hiar_jax.weights import conversion, layouts, releases
from tests import fake_release

PROMPT = 'a  red disc'
CONFIG = fake_release.CONFIGS['text_encoder']
LENGTH = 8


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> pathlib.Path:
  path = tmp_path_factory.mktemp('released')
  fake_release.write_release(path / 'wan', 'wan')
  conversion.to_ours(
    releases.find(path / 'wan'),
    path / 'ours',
    name='tiny',
    options=conversion.Options(latent_size=(4, 4), compute_dtype='float32'),
  )
  return path / 'ours'


def make_encoder(folder, **options) -> text_umt5.UMT5TextEncoder:
  return text_umt5.UMT5TextEncoder(
    CONFIG,
    folder / layouts.TEXT_ENCODER_FILE,
    text_tokens.load_tokenizer(folder / layouts.TOKENIZER),
    length=LENGTH,
    **options,
  )


@pytest.fixture(scope='module')
def encoder(folder) -> text_umt5.UMT5TextEncoder:
  return make_encoder(folder)


@pytest.fixture
def loads(monkeypatch) -> list:
  """The arrays of every reading of the weights."""
  seen = []
  load = text_umt5._load_params

  def counted(*args):
    params = load(*args)
    seen.append(jax.tree.leaves(params))
    return params

  monkeypatch.setattr(text_umt5, '_load_params', counted)
  return seen


def test_released_weights_are_gone_at_once(folder, loads):
  for keep in (True, False):
    encoder = make_encoder(folder, keep_weights=keep)
    states = encoder.encode([PROMPT, 'a cat'])
    (arrays,) = loads
    assert all(array.is_deleted() != keep for array in arrays)
    alive = [weakref.ref(array) for array in arrays]
    del arrays
    loads.clear()
    if keep:
      encoder.release()
    assert not any(ref() for ref in alive)
    # States of known prompts need no weights; those of others read them again.
    np.testing.assert_array_equal(encoder.encode([PROMPT]), states[:1])
    assert not loads
    encoder.encode(['a dog'])
    assert len(loads) == 1
    loads.clear()


def test_weights_are_freed_before_the_video_starts(folder, loads, monkeypatch):
  pipe = hiar_jax.load(folder, text_encoder='release')
  pipe = dataclasses.replace(
    pipe,
    rollout=dataclasses.replace(pipe.rollout, levels=(1.0, 0.0), window=3),
  )
  in_use = []

  def sample(denoiser, params, config, request, keys, states, *rest, **options):
    del denoiser, params, rest, options
    in_use.extend(not a.is_deleted() for arrays in loads for a in arrays)
    shape = config.block_shape(pipe.denoiser.config)
    assert states.shape == (2, LENGTH, CONFIG.dim)
    return np.zeros((len(keys), *shape), np.float32)

  monkeypatch.setattr(calls, 'sample', sample)
  request = calls.Request(num_blocks=1)
  pipe.sample([PROMPT, 'a cat'], request, progress=False)
  assert len(loads) == 1 and in_use and not any(in_use)


def test_weights_of_no_file_are_not_released():
  params = {'a': jax.numpy.ones(3)}
  with pytest.raises(ValueError, match='come from no file'):
    text_umt5.UMT5TextEncoder(CONFIG, params, list, keep_weights=False)
  with pytest.raises(ValueError, match='come from no file'):
    text_umt5.UMT5TextEncoder(CONFIG, params, list).release()
  assert not params['a'].is_deleted()


def test_a_prompt_is_encoded_once_for_all_processes(
  folder, encoder, loads, tmp_path
):
  cache = tmp_path / 'not' / 'there'
  states = make_encoder(folder, cache=cache).encode([PROMPT, 'a cat'])
  np.testing.assert_array_equal(states, encoder.encode([PROMPT, 'a cat']))
  assert len(list(cache.iterdir())) == 2
  loads.clear()
  # Another process, and the prompt is written in another way.
  again = make_encoder(folder, cache=cache).encode(['a red &amp; disc', PROMPT])
  np.testing.assert_array_equal(again[1], states[0])
  assert len(loads) == 1 and len(list(cache.iterdir())) == 3
  loads.clear()
  again = make_encoder(folder, cache=cache).encode([' a   red disc ', 'a cat'])
  np.testing.assert_array_equal(again, states)
  assert not loads


def test_other_weights_tokens_and_lengths_have_embeddings_of_their_own(
  folder, encoder, tmp_path
):
  params = encoder._params or text_umt5._load_params(
    folder / layouts.TEXT_ENCODER_FILE, CONFIG
  )
  other = jax.tree.map(lambda a: a + 1, params)
  tokenize = text_tokens.load_tokenizer(folder / layouts.TOKENIZER)
  encoders = [
    text_umt5.UMT5TextEncoder(config, weights, tok, length=n, cache=tmp_path)
    for config, weights, tok, n in (
      (CONFIG, params, tokenize, LENGTH),
      (CONFIG, other, tokenize, LENGTH),
      (CONFIG, params, lambda text: [5, 1], LENGTH),
      (CONFIG, params, tokenize, LENGTH - 1),
      (dataclasses.replace(CONFIG, dtype='bfloat16'), params, tokenize, LENGTH),
    )
  ]
  for count, one in enumerate(encoders, start=1):
    one.encode([PROMPT])
    assert len(list(tmp_path.iterdir())) == count
  assert len({one.identity for one in encoders}) == 3
  with pytest.raises(ValueError, match='embeddings of several text encoders'):
    embeddings.EmbeddedPrompts(tmp_path)


def test_embeddings_take_the_encoders_place(folder, encoder, loads, tmp_path):
  states = make_encoder(folder, cache=tmp_path).encode([PROMPT, 'a cat'])
  loads.clear()
  without = tmp_path / 'without'
  without.mkdir()
  for name in ('config.json', 'student.safetensors', 'vae.safetensors'):
    (without / name).symlink_to(folder / name)
  pipe = hiar_jax.load(without, text_encoder=tmp_path)
  found = pipe.encoder.encode(['a cat', 'a red disc'])
  np.testing.assert_array_equal(found, states[::-1])
  assert (pipe.encoder.length, pipe.encoder.dim) == (LENGTH, CONFIG.dim)
  with pytest.raises(ValueError, match="no embeddings of 'a dog', only of"):
    pipe.encoder.encode(['a dog'])
  # One of the files will do for its prompt.
  (file, *_) = (
    path
    for path in tmp_path.glob('*.safetensors')
    if embeddings.read(path).prompt == 'a cat'
  )
  one = embeddings.EmbeddedPrompts(file)
  np.testing.assert_array_equal(one.encode(['a cat']), states[1:])
  assert not loads


def test_what_is_no_embeddings_file_is_named(folder, tmp_path):
  with pytest.raises(FileNotFoundError, match='no text embeddings at .*nowh'):
    hiar_jax.load(folder, text_encoder=tmp_path / 'nowhere')
  with pytest.raises(FileNotFoundError, match='no text embeddings at'):
    hiar_jax.load(folder, text_encoder=tmp_path)
  with pytest.raises(ValueError, match='vae.safetensors has no text embedd'):
    hiar_jax.load(folder, text_encoder=folder / 'vae.safetensors')
  wide = embeddings.Embeddings('a cat', 8, 'x', np.zeros((2, 17), np.float32))
  embeddings.write(tmp_path / 'wide.safetensors', wide)
  with pytest.raises(ValueError, match='8 tokens of width 17, and the network'):
    hiar_jax.load(folder, text_encoder=tmp_path)
  (tmp_path / 'wide.safetensors').write_bytes(b'x' * 20)
  with pytest.raises(ValueError, match='wide.safetensors is damaged'):
    embeddings.read(tmp_path / 'wide.safetensors')


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
  one = embeddings.Embeddings('a cat', 8, 'x', np.zeros((2, 16), np.float32))
  path = tmp_path / 'a.safetensors'

  def refuse(self, target):
    raise OSError('disk full')

  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, 'replace', refuse)
    with pytest.raises(OSError, match='disk full'):
      embeddings.write(path, one)
  assert not list(tmp_path.iterdir())
  embeddings.write(path, one)
  assert [p.name for p in tmp_path.iterdir()] == ['a.safetensors']
