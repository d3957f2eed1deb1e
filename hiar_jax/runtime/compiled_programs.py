"""Compiled programs that are kept on disk, so that a second start is short.

jax's own cache does the work. This says where it lies, how large it gets, and
when it is left alone:

  --compilation_cache=FOLDER|off    of every program
  HIAR_JAX_COMPILATION_CACHE        the same, for all of them and for notebooks

and else `programs` in `cache_folder()`. Settings of jax that someone made, such
as JAX_COMPILATION_CACHE_DIR, stay as they are.
"""

import os
import pathlib
import tempfile
from typing import Any

import filelock
import jax
from absl import flags

OFF = 'off'
# The least recently used programs make room: some ten pipelines of Wan2.1's.
MAX_BYTES = 2 * 10**9

_VARIABLE = 'HIAR_JAX_COMPILATION_CACHE'
# Names of jax's cache, for `_mend`.
_ENTRY, _USED, _LOCK = '-cache', '-atime', '.lockfile'

_decided = False


def cache_folder() -> pathlib.Path:
  """Where converted weights and compiled programs are kept.

  HIAR_JAX_CACHE, else XDG_CACHE_HOME/hiar_jax, else ~/.cache/hiar_jax.
  """
  chosen = os.environ.get('HIAR_JAX_CACHE')
  if chosen:
    return pathlib.Path(chosen).expanduser()
  home = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return pathlib.Path(home).expanduser() / 'hiar_jax'


def define_flag() -> None:
  """Gives a program the flag that `keep_by_flag` reads."""
  flags.DEFINE_string(
    'compilation_cache',
    None,
    f'folder of compiled programs, which the next start then need not compile, '
    f"or '{OFF}'; default: {_VARIABLE}, else ~/.cache/hiar_jax/programs",
  )


def keep_by_flag() -> None:
  """`keep` as the program's flag says."""
  keep(flags.FLAGS.compilation_cache)


def keep(choice: str | None = None) -> pathlib.Path | None:
  """Lets jax keep the programs that it compiles from here on.

  The first call of a process decides; later ones change nothing.

  Args:
    choice: a folder, which is made, or OFF. None: what the environment says;
      then a folder that cannot be written, or that is another user's, is not
      used and nothing is said.

  Returns:
    The folder that is used, None if there is none or jax has its own.

  Raises:
    OSError: if a folder that was named cannot be written.
  """
  global _decided
  if _decided:
    return None
  _decided = True
  named = choice or os.environ.get(_VARIABLE)
  if named == OFF:
    return None
  settings: Any = jax.config  # Its own type names no option.
  is_set = settings.jax_compilation_cache_dir is not None
  if not settings.jax_enable_compilation_cache or (is_set and not choice):
    return None
  folder = pathlib.Path(named or cache_folder() / 'programs').expanduser()
  try:
    # Whoever can write a program here can make us run it.
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
    if not named and not _is_own(folder):
      return None
    _mend(folder)
  except (OSError, RuntimeError) as error:
    # RuntimeError: there is no home directory.
    if named:
      raise OSError(
        f'compiled programs cannot be kept in {folder}: {error}'
      ) from error
    return None
  settings = {
    'jax_compilation_cache_dir': str(folder),
    'jax_compilation_cache_max_size': MAX_BYTES,
    # Each small program takes longer to compile than to read.
    'jax_persistent_cache_min_compile_time_secs': 0.0,
    # Those of XLA, in a folder below, would grow without end.
    'jax_persistent_cache_enable_xla_caches': 'none',
  }
  for name, value in settings.items():
    if name.upper() not in os.environ:
      jax.config.update(name, value)
  return folder


def _is_own(folder: pathlib.Path) -> bool:
  return not hasattr(os, 'getuid') or folder.stat().st_uid == os.getuid()


def _mend(folder: pathlib.Path) -> None:
  """Removes what a killed process left half written.

  jax writes an entry and then the time of its use: where that is missing the
  entry may be cut, and jax would warn of it from then on and never replace it.
  """
  try:
    with filelock.FileLock(folder / _LOCK, timeout=0):
      for entry in folder.glob(f'*{_ENTRY}'):
        used = entry.with_name(entry.name.removesuffix(_ENTRY) + _USED)
        if not used.is_file() or used.stat().st_size != 8:
          entry.unlink(missing_ok=True)
          used.unlink(missing_ok=True)
  except filelock.Timeout:
    # Another process has it in use; the next start looks again.
    pass
