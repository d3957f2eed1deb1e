"""Compiled programs are kept, within bounds, and leave other settings alone."""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from hiar_jax.runtime import compiled_programs

_SETTINGS = (
  'jax_compilation_cache_dir',
  'jax_compilation_cache_max_size',
  'jax_enable_compilation_cache',
  'jax_persistent_cache_enable_xla_caches',
  'jax_persistent_cache_min_compile_time_secs',
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
  """A process that has decided nothing yet, of a user with an empty home."""
  before = {name: getattr(jax.config, name) for name in _SETTINGS}
  monkeypatch.setattr(compiled_programs, '_decided', False)
  for name in ('HIAR_JAX_COMPILATION_CACHE', 'HIAR_JAX_CACHE'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'home'))
  jax.config.update('jax_compilation_cache_dir', None)
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  jax.clear_caches()


@pytest.fixture
def hits():
  """How many programs came from the disk."""
  seen = []
  note = lambda event, **unused: (
    seen.append(event) if event.endswith('/cache_hits') else None
  )
  jax.monitoring.register_event_listener(note)
  yield seen
  jax.monitoring.unregister_event_listener(note)


def _program(shape):
  """As another process would make it: compiled anew."""
  jax.clear_caches()
  x = np.linspace(0, 1, np.prod(shape), dtype=np.float32).reshape(shape)
  run = jax.jit(lambda x: jnp.tanh(x @ x.T) + jax.random.normal(_KEY, shape))
  return np.asarray(run(x))


_KEY = jax.random.key(0)


def test_a_program_that_was_kept_gives_the_same_bits(tmp_path, hits):
  plain = _program((7, 7))
  folder = compiled_programs.keep()
  assert folder == tmp_path / 'home' / 'hiar_jax' / 'programs'
  assert folder.stat().st_mode & 0o077 == 0
  first = _program((7, 7))
  assert not hits and list(folder.glob('*-cache'))
  second = _program((7, 7))
  assert hits
  np.testing.assert_array_equal(first, plain)
  np.testing.assert_array_equal(second, plain)


def test_programs_never_take_more_than_the_limit(monkeypatch):
  limit = 60_000
  monkeypatch.setattr(compiled_programs, 'MAX_BYTES', limit)
  folder = compiled_programs.keep()
  kept, written = set(), 0
  for size in range(2, 12):
    _program((size, size))
    entries = {p.name: p.stat().st_size for p in folder.glob('*-cache')}
    assert sum(entries.values()) <= limit
    written += sum(n for name, n in entries.items() if name not in kept)
    kept |= entries.keys()
  assert written > limit  # So some had to go.


def test_a_folder_by_flag_or_variable_and_off(tmp_path, monkeypatch):
  assert compiled_programs.keep(str(tmp_path / 'flag')) == tmp_path / 'flag'
  # The first word counts: `load` in a program does not overrule its flag.
  assert compiled_programs.keep() is None
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'flag')
  jax.config.update('jax_compilation_cache_dir', None)
  for choice, variable, expected in (
    (None, str(tmp_path / 'variable'), tmp_path / 'variable'),
    (None, 'off', None),
    ('off', str(tmp_path / 'variable'), None),
  ):
    monkeypatch.setattr(compiled_programs, '_decided', False)
    monkeypatch.setenv('HIAR_JAX_COMPILATION_CACHE', variable)
    jax.config.update('jax_compilation_cache_dir', None)
    assert compiled_programs.keep(choice) == expected
    found = jax.config.jax_compilation_cache_dir
    assert found == (expected and str(expected))


def test_settings_of_jax_that_someone_made_stay(tmp_path, monkeypatch):
  jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'theirs'))
  assert compiled_programs.keep() is None
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'theirs')
  assert jax.config.jax_compilation_cache_max_size == -1
  jax.config.update('jax_compilation_cache_dir', None)
  jax.config.update('jax_enable_compilation_cache', False)
  monkeypatch.setattr(compiled_programs, '_decided', False)
  assert compiled_programs.keep() is None
  assert jax.config.jax_compilation_cache_dir is None
  jax.config.update('jax_enable_compilation_cache', True)
  monkeypatch.setattr(compiled_programs, '_decided', False)
  monkeypatch.setenv('JAX_COMPILATION_CACHE_MAX_SIZE', '-1')
  assert compiled_programs.keep()
  assert jax.config.jax_compilation_cache_max_size == -1


def test_a_home_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
  assert compiled_programs.keep() is None
  assert jax.config.jax_compilation_cache_dir is None
  monkeypatch.setattr(compiled_programs, '_decided', False)
  with pytest.raises(OSError, match='cannot be kept in .*file/programs'):
    compiled_programs.keep(str(tmp_path / 'file' / 'programs'))


@pytest.mark.skipif(not hasattr(os, 'getuid'), reason='needs user ids')
def test_the_folder_of_another_user_is_not_trusted(tmp_path, monkeypatch):
  monkeypatch.setattr(os, 'getuid', lambda: 12345)
  assert compiled_programs.keep() is None
  assert jax.config.jax_compilation_cache_dir is None


def test_what_a_killed_process_left_is_made_anew(hits, monkeypatch):
  folder = compiled_programs.keep()
  plain = _program((5, 5))
  for entry in folder.glob('*-cache'):
    entry.write_bytes(entry.read_bytes()[:50])
    pathlib.Path(str(entry).removesuffix('-cache') + '-atime').unlink()
  monkeypatch.setattr(compiled_programs, '_decided', False)
  jax.config.update('jax_compilation_cache_dir', None)
  compilation_cache.reset_cache()
  compiled_programs.keep()
  np.testing.assert_array_equal(_program((5, 5)), plain)
  assert not hits
  _program((5, 5))
  assert hits
