"""umT5 in batches: as one prompt at a time, and the same over a mesh."""

import jax
import numpy as np
import pytest

from hiar_jax.data import sources
from hiar_jax.models import sharding
from hiar_jax.text import encoders, umt5_batches
from hiar_jax.text import tokens as text_tokens
from hiar_jax.text import umt5 as text_umt5
from hiar_jax.weights import conversion, layouts, releases
from tests import fake_release

LENGTH = 6
CAPTIONS = ('a red disc', '', 'a cat & a dog & a red cat', 'dog', ' a  cat')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('released')
  fake_release.write_release(path / 'wan', 'wan')
  conversion.to_ours(
    releases.find(path / 'wan'),
    path / 'ours',
    name='tiny',
    options=conversion.Options(latent_size=(4, 4), compute_dtype='float32'),
  )
  return path / 'ours'


def open_encoder(folder, mesh=None, **options):
  section = {'encoder': 'umt5', 'folder': str(folder), 'length': LENGTH}
  section['dtype'] = 'float32'
  return encoders.open_encoder(section | options, mesh)


def one_by_one(folder):
  return text_umt5.UMT5TextEncoder(
    fake_release.CONFIGS['text_encoder'],
    folder / layouts.TEXT_ENCODER_FILE,
    text_tokens.load_tokenizer(folder / layouts.TOKENIZER),
    length=LENGTH,
  )


def test_a_batch_has_the_states_of_its_prompts_alone(folder, monkeypatch):
  wanted = one_by_one(folder).encode(CAPTIONS)
  for multiple in (64, 2):  # Padded to the length, and to the longest.
    monkeypatch.setattr(umt5_batches, '_ROUND', multiple)
    encoder = open_encoder(folder)
    assert (encoder.dim, encoder.length) == (16, LENGTH)
    states = encoder.encode(CAPTIONS)
    np.testing.assert_allclose(states, wanted, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(states == 0, wanted == 0)
  assert encoder.encode(['dog']).shape == (1, LENGTH, 16)


def test_training_reads_ids_and_encodes_them_in_its_loop(folder):
  encoder = open_encoder(folder)

  class Source:
    def __len__(self):
      return len(CAPTIONS)

    def __getitem__(self, index):
      return encoder.prepare(CAPTIONS[index]) | {'video': np.ones(2)}

  batch = next(sources.batches(Source(), batch_size=4, seed=0))
  assert {a.dtype for k, a in batch.items() if 'text' in k} == {np.dtype('i4')}
  done = encoder.finish(batch)
  assert done.keys() == {'text', 'video', 'index'}
  wanted = encoder.encode([CAPTIONS[i] for i in batch['index']])
  np.testing.assert_allclose(done['text'], wanted, rtol=0, atol=1e-5)


def test_a_mesh_changes_no_states(folder):
  wanted = open_encoder(folder).encode(CAPTIONS)
  mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
  encoder = open_encoder(folder, mesh)
  np.testing.assert_allclose(
    encoder.encode(CAPTIONS), wanted, rtol=0, atol=1e-5
  )
  rows = [encoder.prepare(caption) for caption in CAPTIONS[:4]]
  batch = jax.tree.map(lambda *x: np.stack(x), *rows)
  done = encoder.finish(sharding.put_batch(batch, mesh))['text']
  assert done.sharding.spec == jax.sharding.PartitionSpec(sharding.BATCH)
  np.testing.assert_allclose(done, wanted[:4], rtol=0, atol=1e-5)
  kernel = encoder._params['layers']['q']['kernel']
  assert kernel.addressable_shards[0].data.size == kernel.size // 4


def test_weights_are_in_the_dtype_they_are_computed_in(folder):
  encoder = open_encoder(folder, dtype='bfloat16')
  encoder.encode(['dog'])
  leaves = jax.tree.leaves(encoder._params)
  assert {leaf.dtype for leaf in leaves} == {jax.numpy.bfloat16.dtype}


def test_identities_differ_where_states_do(folder, tmp_path):
  first = open_encoder(folder).identity
  assert open_encoder(folder).identity == first
  assert open_encoder(folder, length=4).identity != first
  assert open_encoder(folder, dtype='bfloat16').identity != first
  other = tmp_path / 'other'
  other.mkdir()
  for path in folder.iterdir():
    if path.name != layouts.TOKENIZER:
      (other / path.name).symlink_to(path)
  fake_release.write_words(other / layouts.TOKENIZER)
  assert open_encoder(other).identity == first
  tokenizer = other / layouts.TOKENIZER / 'tokenizer.json'
  tokenizer.write_text(tokenizer.read_text().replace('"cat"', '"cow"'))
  assert open_encoder(other).identity != first


def test_tokens_that_are_cut_are_counted(folder):
  encoder = open_encoder(folder)
  assert [encoder.num_cut(caption) for caption in CAPTIONS] == [0, 0, 4, 0, 0]


@pytest.mark.parametrize(
  'section, error, message',
  [
    ({}, ValueError, 'text.folder is missing'),
    ({'folder': '/none'}, FileNotFoundError, 'no text encoder in /none'),
    ({'folder': '/none', 'dpeth': 1}, TypeError, 'dpeth'),
  ],
)
def test_what_is_missing_is_named(section, error, message):
  with pytest.raises(error, match=message):
    encoders.open_encoder({'encoder': 'umt5'} | section)


def test_heads_that_do_not_divide_are_named(folder):
  mesh = sharding.make_mesh(sharding.MeshConfig(tensor=4, fsdp=2))
  with pytest.raises(ValueError, match='umt5: num_heads=2 .* tensor=4'):
    open_encoder(folder, mesh)
