"""Weights as orbax checkpoints: bit by bit, array by array, or named."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

import hiar_jax
from hiar_jax.weights import (
  conversion,
  layouts,
  networks,
  orbax_weights,
  releases,
  safetensors_io,
)
from tests import fake_release

OPTIONS = conversion.Options(
  latent_size=(4, 4), compute_dtype='float32', attention='xla', format='orbax'
)
DTYPES = {
  'transformer': fake_release.BFLOAT16,
  'text_encoder': fake_release.BFLOAT16,
}


@pytest.fixture(scope='module')
def converted(tmp_path_factory):
  """A release, and folders of ours in both formats."""
  folder = tmp_path_factory.mktemp('converted')
  fake_release.write_release(folder / 'wan', 'wan', dtypes=DTYPES)
  release = releases.find(folder / 'wan')
  for name in conversion.FORMATS:
    options = dataclasses.replace(OPTIONS, format=name)
    conversion.to_ours(release, folder / name, name='tiny', options=options)
  return folder


def assert_same_bits(ours, theirs):
  assert ours.entries.keys() == theirs.entries.keys()
  for name, entry in theirs.entries.items():
    found = ours.entries[name]
    assert (found.shape, found.dtype) == (entry.shape, entry.dtype), name
    np.testing.assert_array_equal(
      *(fake_release.bits(reader.read(name)) for reader in (ours, theirs)),
      err_msg=name,
    )


def test_a_release_comes_back_through_orbax_bit_by_bit(converted, tmp_path):
  files = {p.name for p in (converted / 'orbax').iterdir()}
  assert files == {
    *('student.orbax', 'vae.orbax', 'text_encoder.orbax'),
    *('config.json', 'tokenizer'),
  }
  for file in layouts.OWN_FILES.values():
    assert_same_bits(
      *(
        networks.open_weights(converted / name / file)
        for name in ('orbax', 'safetensors')
      )
    )
  conversion.to_foreign(converted / 'orbax', tmp_path, naming='wan')
  for kind in layouts.OWN_FILES:
    path = layouts.FILES['wan'][kind]
    assert_same_bits(
      safetensors_io.Reader(tmp_path / path),
      safetensors_io.Reader(converted / 'wan' / path),
    )


def test_both_formats_load_as_the_same_pipeline(converted):
  ours, theirs = (
    hiar_jax.load(converted / name) for name in ('orbax', 'safetensors')
  )
  for tree in ('params', 'codec'):
    jax.tree.map(
      np.testing.assert_array_equal, getattr(ours, tree), getattr(theirs, tree)
    )
  assert all(isinstance(a, jax.Array) for a in jax.tree.leaves(ours.params))
  prompts = ['a red disc']
  np.testing.assert_array_equal(
    ours.encoder.encode(prompts), theirs.encoder.encode(prompts)
  )
  assert ours.encoder.identity != theirs.encoder.identity


def write(path, arrays, **options):
  plan = {name: (a.shape, a.dtype) for name, a in arrays.items()}
  with orbax_weights.Writer(path, plan, **options) as writer:
    for name, array in arrays.items():
      for index, row in reversed(list(enumerate(array))):
        writer.write(name, row, index)


def test_arrays_are_read_onto_their_shards_and_in_slices(tmp_path):
  rng = np.random.default_rng(0)
  arrays = {
    'a/kernel': rng.normal(size=(4, 64, 32)).astype(ml_dtypes.bfloat16),
    'b': rng.normal(size=(8, 3)).astype(np.float32),
  }
  # Every array a save of its own, in files of their own.
  write(tmp_path / 'w.orbax', arrays, save_bytes=1, shard_bytes=4096)
  data = [f for f in (tmp_path / 'w.orbax').rglob('d/*') if f.is_file()]
  assert len(data) > 3
  mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.P(None, 'x'))
  abstract = {
    'a': {
      'kernel': jax.ShapeDtypeStruct((4, 64, 32), 'float32', sharding=sharding)
    },
    'b': jax.ShapeDtypeStruct((8, 3), 'float32'),
  }
  found = networks.load_weights(tmp_path / 'w.safetensors', abstract)
  assert found['a']['kernel'].sharding == sharding
  np.testing.assert_array_equal(
    found['a']['kernel'], arrays['a/kernel'].astype(np.float32)
  )
  assert isinstance(found['b'], np.ndarray)
  np.testing.assert_array_equal(found['b'], arrays['b'])
  reader = orbax_weights.Reader(tmp_path / 'w.orbax')
  np.testing.assert_array_equal(reader.read('b', slice(2, 4)), arrays['b'][2:4])


def test_memory_is_for_the_arrays_of_one_save(tmp_path):
  """Of 384 MB in arrays of 32 MB, in a process of its own."""
  script = """
import resource, sys
import numpy as np
from hiar_jax.weights import orbax_weights
plan = {f'a{i}': ((8, 2**20), np.dtype('float32')) for i in range(12)}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
with orbax_weights.Writer(sys.argv[1], plan, save_bytes=2**25) as writer:
  for i, (name, (shape, dtype)) in enumerate(plan.items()):
    for row in range(8):
      writer.write(name, np.full(shape[1:], row + i, dtype), row)
    if i == 1:
      before = peak()
print(peak() - before)
"""
  done = subprocess.run(
    [sys.executable, '-c', script, tmp_path / 'w.orbax'],
    env={'JAX_PLATFORMS': 'cpu', 'PATH': ''},
    cwd=pathlib.Path(hiar_jax.__file__).parents[1],
    capture_output=True,
    text=True,
    check=False,
  )
  assert not done.returncode, done.stderr
  assert int(done.stdout) < 100  # MB


def test_what_is_missing_or_cut_is_named(converted, tmp_path):
  def damaged(name):
    folder = tmp_path / name
    write(folder / 'w.orbax', {'a': np.ones((2, 3), np.float32)})
    (file,) = sorted((folder / 'w.orbax').rglob('manifest.ocdbt'))[:1]
    return folder / 'w.safetensors', file

  abstract = {'a': jax.ShapeDtypeStruct((2, 3), 'float32')}
  path, file = damaged('missing')
  file.unlink()
  with pytest.raises(FileNotFoundError, match=f'incomplete: no {file}'):
    networks.load_weights(path, abstract)
  path, file = damaged('cut')
  file.write_bytes(file.read_bytes()[:-1])
  with pytest.raises(ValueError, match=f'{file} is damaged: it has'):
    networks.load_weights(path, abstract)
  path, _ = damaged('unfinished')
  (path.with_suffix('.orbax') / 'files.json').unlink()
  with pytest.raises(
    FileNotFoundError, match='w.orbax are incomplete: no .*fi'
  ):
    networks.load_weights(path, abstract)
  path, _ = damaged('shape')
  wrong = {'a': jax.ShapeDtypeStruct((3, 2), 'float32')}
  with pytest.raises(ValueError, match=r'a has shape \(2, 3\), not \(3, 2\)'):
    networks.load_weights(path, wrong)
  with pytest.raises(FileNotFoundError, match='no weights at .*nowhere'):
    networks.load_weights(tmp_path / 'nowhere.safetensors', abstract)


def test_a_failed_conversion_leaves_no_checkpoint(converted, tmp_path):
  path = tmp_path / 'w.orbax'
  plan = {'a': ((2, 3), np.dtype('float32'))}
  with (
    pytest.raises(OSError, match='lost'),
    orbax_weights.Writer(path, plan, save_bytes=1) as writer,
  ):
    writer.write('a', np.ones((2, 3), np.float32))
    assert list(tmp_path.iterdir())
    raise OSError('lost')
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_program_writes_orbax_for_this_library_alone(converted, tmp_path):
  root = pathlib.Path(hiar_jax.__file__).parents[1]

  def run(*flags):
    return subprocess.run(
      [
        sys.executable,
        'launch/convert_checkpoint.py',
        '--format=orbax',
        *flags,
      ],
      cwd=root,
      capture_output=True,
      text=True,
      check=False,
    )

  done = run(
    *(f'--weights={converted / "wan"}', f'--out={tmp_path / "ours"}'),
    *('--height=32', '--width=32'),
  )
  assert not done.returncode, done.stderr
  assert 'student.orbax (' in done.stdout
  assert hiar_jax.load(tmp_path / 'ours').frame_shape == (8, 8, 3)
  config = json.loads((tmp_path / 'ours' / 'config.json').read_text())
  assert config['model']['attention'] == 'auto'
  done = run(
    *(f'--weights={tmp_path / "ours"}', f'--out={tmp_path / "back"}'),
    '--to=wan',
  )
  assert done.returncode == 2
  assert done.stderr.startswith('error: --format=orbax goes with --to=hiar_jax')
