"""Text states on disk: what an encoder gives, resumable, held to prompts."""

import dataclasses
import pathlib

import ml_dtypes
import numpy as np
import pytest
from array_record.python import array_record_module

from hiar_jax.data import prompts as data_prompts
from hiar_jax.data import sources, text_states
from hiar_jax.text import word_hash

ENCODER = word_hash.WordHashEncoder(dim=8, length=6)
TEXTS = [
  'a red disc',
  'one two three four five six seven eight',
  '一只猫',
  'disc',
  'a small blue ring 🎈',
  'ring',
  'a b c',
]
SHARD = 3


@pytest.fixture(scope='module')
def prompts(tmp_path_factory):
  path = tmp_path_factory.mktemp('prompts') / 'prompts.txt'
  path.write_text('\n'.join(TEXTS))
  return data_prompts.FilePrompts(path)


def make(directory, prompts, encoder=ENCODER, num=0, **options):
  manifest = text_states.make_manifest(
    prompts, encoder, num=num, shard_size=SHARD
  )
  return text_states.make(
    directory, manifest, prompts, encoder, batch_size=2, **options
  )


@pytest.fixture(scope='module')
def whole(prompts, tmp_path_factory):
  directory = tmp_path_factory.mktemp('whole')
  assert make(directory, prompts)
  text_states.add_captions(directory, ENCODER, ['', 'a bad disc'])
  return directory


def contents(directory):
  return {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()}


@pytest.fixture
def copied(whole, tmp_path):
  for path in whole.iterdir():
    if path.is_file():
      (tmp_path / path.name).write_bytes(path.read_bytes())
  return tmp_path


def test_states_are_those_of_the_encoder_in_bfloat16(whole, prompts):
  states = text_states.StoredStates(whole, prompts)
  wanted = ENCODER.encode(TEXTS).astype(ml_dtypes.bfloat16)
  assert len(states) == len(TEXTS)
  for i in range(len(TEXTS)):
    element = states[i]['text']
    assert element.dtype == np.float32
    np.testing.assert_array_equal(element, wanted[i].astype(np.float32))
  batch = next(sources.batches(states, batch_size=4, seed=0))
  assert states.finish(batch)['text'].shape == (4, 6, 8)


def test_padding_is_not_stored(whole):
  reader = array_record_module.ArrayRecordReader(
    str(whole / 'states-00000.array_record')
  )
  rows = [
    len(text_states._unpack(reader.read([i])[0])[1]) for i in range(SHARD)
  ]
  reader.close()
  assert rows == [3, 6, 1]


def test_the_stored_encoder_knows_the_texts_beside_the_prompts(whole):
  encoder = text_states.StoredEncoder(whole)
  assert encoder.identity == ENCODER.identity
  np.testing.assert_array_equal(
    encoder.encode(['a bad  disc', '']), ENCODER.encode(['a bad disc', ''])
  )
  np.testing.assert_array_equal(encoder.prepare('')['text'], np.zeros((6, 8)))
  with pytest.raises(ValueError, match="no embeddings of 'x'.*encode prompts"):
    encoder.encode(['x'])


def test_texts_that_are_there_are_not_encoded_again(copied):
  texts = ['', 'a cat']
  assert text_states.add_captions(copied, ENCODER, texts) == 2
  assert text_states.add_captions(copied, ENCODER, [*texts, 'a dog']) == 1
  other = dataclasses.replace(ENCODER, seed=1)
  text_states.add_captions(copied, other, ['a fox'])
  with pytest.raises(ValueError, match='of several text encoders'):
    text_states.StoredEncoder(copied)


def test_a_removed_file_is_made_again_bit_by_bit(whole, copied, prompts):
  kept = (copied / 'states-00000.array_record').stat().st_mtime_ns
  (copied / 'states-00001.array_record').unlink()
  with pytest.raises(FileNotFoundError, match='states-00001.array_record'):
    text_states.StoredStates(copied, prompts)
  counts = []
  assert make(copied, prompts, progress=counts.append)
  assert counts == [2, 1]
  assert contents(copied) == contents(whole)
  assert (copied / 'states-00000.array_record').stat().st_mtime_ns == kept


def test_a_stop_on_request_drops_the_file_under_way(whole, prompts, tmp_path):
  counts = []
  assert not make(
    tmp_path,
    prompts,
    progress=counts.append,
    should_stop=lambda: len(counts) == 3,
  )
  assert sorted(contents(tmp_path)) == [
    'manifest.json',
    'states-00000.array_record',
  ]
  assert make(tmp_path, prompts)
  assert contents(tmp_path) == contents(whole)


def test_processes_share_the_files(whole, prompts, tmp_path):
  for i in (1, 0):
    assert make(tmp_path, prompts, shard_index=i, num_shards=2)
  assert contents(tmp_path) == contents(whole)


def test_a_set_of_whole_files_may_grow(whole, prompts, tmp_path):
  make(tmp_path, prompts, num=3)
  make(tmp_path, prompts)
  assert contents(tmp_path) == contents(whole)


def test_tokens_that_are_lost_are_counted(prompts):
  found = text_states.count_cut(prompts, ENCODER, range(len(TEXTS)))
  assert found == (1, 2)


@pytest.mark.parametrize(
  'encoder, text, message',
  [
    (ENCODER, 'other', 'other text states: prompts.sha256: '),
    (dataclasses.replace(ENCODER, seed=1), None, 'encoder: .* -> '),
  ],
)
def test_states_of_something_else_are_refused(
  whole, prompts, tmp_path, encoder, text, message
):
  before = contents(whole)
  if text is not None:
    path = tmp_path / 'prompts.txt'
    path.write_text('\n'.join([*TEXTS[:-1], text]))
    prompts = data_prompts.FilePrompts(path)
    with pytest.raises(ValueError, match=message):
      text_states.StoredStates(whole, prompts)
  with pytest.raises(ValueError, match=message):
    make(whole, prompts, encoder)
  assert contents(whole) == before


def test_numbers_that_do_not_fit_are_named(prompts, tmp_path):
  with pytest.raises(ValueError, match='num=8 is more than the 7 prompts'):
    make(tmp_path, prompts, num=8)
  with pytest.raises(ValueError, match='shard_size=0'):
    text_states.make_manifest(prompts, ENCODER, num=0, shard_size=0)
  with pytest.raises(FileNotFoundError, match='hiar-jax encode prompts makes'):
    text_states.StoredEncoder(tmp_path / 'none')


def _cut(path: pathlib.Path):
  path.write_bytes(path.read_bytes()[:-40])


def _garbage(path: pathlib.Path):
  path.write_bytes(b'x' * 400)


def _other(path: pathlib.Path):
  path.write_bytes((path.parent / 'states-00000.array_record').read_bytes())


@pytest.mark.parametrize(
  'damage, message',
  [
    (_cut, 'states-00001.array_record is damaged'),
    (_garbage, 'states-00001.array_record is damaged'),
    (pathlib.Path.unlink, 'states-00001.array_record is missing'),
    (_other, 'has not the states 3 to 5'),
  ],
)
def test_verify_finds_a_planted_fault(copied, damage, message):
  assert text_states.verify(copied) == []
  damage(copied / 'states-00001.array_record')
  problems = text_states.verify(copied)
  assert any(message in problem for problem in problems), problems


def test_a_damaged_set_is_not_read(copied, prompts):
  _other(copied / 'states-00001.array_record')
  states = text_states.StoredStates(copied, prompts)
  with pytest.raises(ValueError, match='text states 4 .* of prompt 1'):
    states[4]
  _garbage(copied / 'states-00001.array_record')
  with pytest.raises(ValueError, match='damaged'):
    text_states.StoredStates(copied, prompts)


def test_an_encoder_that_diverges_is_an_error(prompts, tmp_path):
  class Diverging:
    dim, length, identity, negative_prompt = 8, 6, 'x', ''

    def encode(self, captions):
      states = ENCODER.encode(captions)
      states[-1, 0, 0] = np.inf
      return states

  with pytest.raises(ValueError, match=r'the states of prompt \d+ are not'):
    make(tmp_path, prompts, Diverging())
  assert sorted(contents(tmp_path)) == ['manifest.json']
