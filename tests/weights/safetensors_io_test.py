"""Safetensors files: others read ours, damaged ones are named."""

import json

import numpy as np
import pytest
import safetensors.numpy

from hiar_jax.weights import safetensors_io
from tests import fake_release

ARRAYS = {
  'a': np.arange(6, dtype=np.float32).reshape(2, 3),
  'b/c': np.array(7, np.int64),
  'd': np.linspace(-1, 1, 8).astype(fake_release.BFLOAT16).reshape(4, 2),
  'empty': np.zeros((0, 3), np.float16),
}


@pytest.fixture
def shards(tmp_path):
  fake_release.write(tmp_path / 'x.safetensors', ARRAYS, shard_bytes=30)
  return tmp_path


def assert_same(reader):
  assert reader.entries.keys() == ARRAYS.keys()
  for name, array in ARRAYS.items():
    read = reader.read(name)
    assert (read.dtype, read.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(
      fake_release.bits(read), fake_release.bits(array)
    )


def test_the_safetensors_package_reads_what_is_written(tmp_path):
  path = tmp_path / 'x.safetensors'
  fake_release.write(path, ARRAYS)
  with safetensors.safe_open(path, framework='numpy') as file:
    assert set(file.keys()) == ARRAYS.keys()
    for name in ('a', 'b/c', 'empty'):
      np.testing.assert_array_equal(file.get_tensor(name), ARRAYS[name])
    assert file.get_slice('d').get_dtype() == 'BF16'
    assert file.metadata() == {'format': 'pt'}


def test_what_the_safetensors_package_writes_is_read(tmp_path):
  path = tmp_path / 'x.safetensors'
  arrays = {k: v for k, v in ARRAYS.items() if k != 'd'}
  safetensors.numpy.save_file(arrays, path, metadata={'who': 'me'})
  reader = safetensors_io.Reader(path)
  assert reader.metadata == {'who': 'me'}
  for name, array in arrays.items():
    np.testing.assert_array_equal(reader.read(name), array)


def test_shards_are_read_by_file_index_or_any_of_them(shards):
  names = sorted(path.name for path in shards.iterdir())
  assert names == [
    'x-00001-of-00002.safetensors',
    'x-00002-of-00002.safetensors',
    'x.safetensors.index.json',
  ]
  for name in [*names, 'x.safetensors']:
    assert_same(safetensors_io.Reader(shards / name))


def test_a_part_of_an_array_is_read_alone(shards):
  reader = safetensors_io.Reader(shards / 'x.safetensors')
  np.testing.assert_array_equal(reader.read('d', slice(1, 3)), ARRAYS['d'][1:3])


def test_entries_are_written_in_any_order(tmp_path):
  path = tmp_path / 'x.safetensors'
  array = ARRAYS['d']
  plan = {'d': (array.shape, array.dtype)}
  with safetensors_io.Writer(path, plan) as writer:
    for i in (2, 0, 3, 1):
      writer.write('d', array[i], i)
  np.testing.assert_array_equal(safetensors_io.Reader(path).read('d'), array)


def test_an_interrupted_write_leaves_no_file(tmp_path):
  plan = {'a': ((2,), np.dtype(np.float32))}
  path = tmp_path / 'x.safetensors'
  with (
    pytest.raises(KeyboardInterrupt),
    safetensors_io.Writer(path, plan),
  ):
    raise KeyboardInterrupt
  assert not list(tmp_path.iterdir())


def _remove_shard(folder):
  (folder / 'x-00002-of-00002.safetensors').unlink()


def _cut(folder):
  path = folder / 'x-00002-of-00002.safetensors'
  path.write_bytes(path.read_bytes()[:-1])


def _no_header(folder):
  (folder / 'x-00001-of-00002.safetensors').write_bytes(b'\xff' * 9)


def _empty_file(folder):
  (folder / 'x-00001-of-00002.safetensors').write_bytes(b'')


def _not_json(folder):
  path = folder / 'x-00001-of-00002.safetensors'
  path.write_bytes(path.read_bytes().replace(b'{"__', b'("__'))


def _nested_header(folder):
  header = b'{"__metadata__":' + 100_000 * b'[' + 100_000 * b']' + b'}'
  length = len(header).to_bytes(8, 'little')
  (folder / 'x-00001-of-00002.safetensors').write_bytes(length + header)


def _nested_index(folder):
  nested = 100_000 * '{"a":' + '1' + 100_000 * '}'
  (folder / 'x.safetensors.index.json').write_text(nested)


def _wrong_offsets(folder):
  path = folder / 'x-00001-of-00002.safetensors'
  path.write_bytes(path.read_bytes().replace(b'[0,24]', b'[0,99]'))


def _edit_index(folder, edit):
  path = folder / 'x.safetensors.index.json'
  index = json.loads(path.read_text())
  edit(index['weight_map'])
  path.write_text(json.dumps(index))


def _index_names_more(folder):
  _edit_index(
    folder, lambda m: m.update({'more': 'x-00001-of-00002.safetensors'})
  )


def _index_leads_away(folder):
  _edit_index(folder, lambda m: m.update({'a': '../x.safetensors'}))


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (_remove_shard, '1 of 2 shards .* missing: .*x-00002-of-00002'),
    (_cut, 'x-00002-of-00002.* is damaged: it ends within'),
    (_no_header, 'x-00001-of-00002.* it has no safetensors header'),
    (_empty_file, 'x-00001-of-00002.* is empty'),
    (_not_json, 'x-00001-of-00002.* is damaged: its header'),
    (_nested_header, 'x-00001-of-00002.* is damaged: its header .*nested'),
    (_nested_index, 'index.json is not JSON: .*nested'),
    (_wrong_offsets, r'x-00001-of-00002.*0\.\.99 are not the bytes'),
    (_index_names_more, "x-00001-of-00002.* has no 'more'"),
    (_index_leads_away, 'outside its folder'),
  ],
)
def test_a_damaged_set_is_named(shards, damage, message):
  damage(shards)
  with pytest.raises((FileNotFoundError, ValueError), match=message):
    safetensors_io.Reader(shards / 'x.safetensors')


def test_missing_shards_are_named_without_an_index_too(shards):
  (shards / 'x.safetensors.index.json').unlink()
  _remove_shard(shards)
  with pytest.raises(FileNotFoundError, match='1 of 2 .*x-00002-of-00002'):
    safetensors_io.Reader(shards / 'x-00001-of-00002.safetensors')
