"""Converted weights that are kept, and made when they are first needed."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from hiar_jax.models.config import WanConfig
from hiar_jax.runtime import compiled_programs
from hiar_jax.weights import (
  conversion,
  families,
  foreign,
  identity,
  layouts,
  releases,
)
from hiar_jax.weights.conversion import Options, Report
from hiar_jax.weights.releases import Path, Release

# Changes with what is written, so that an older cache is not taken for it.
_CACHE_VERSION = 2
_DEFAULT = Options()
# Ends the name of a folder that is being written.
_PARTIAL = '.partial'
_GRACE_S = 3600
_LOOKED_FOR = {
  'transformer': (
    "transformer/, diffusion_models/, Wan2.1's diffusion_pytorch_model*, or "
    'one file of it'
  ),
  'vae': 'vae/, Wan2.1_VAE*, or one file of it',
  'text_encoder': 'text_encoder/, text_encoders/, models_t5*, or a file of it',
  'tokenizer': 'tokenizer/ and google/umt5-xxl/',
}


def cached(
  name: Path | Sequence[Path],
  *,
  base: Path | Sequence[Path] | None = None,
  options: Options = _DEFAULT,
  needs: Collection[str] = (),
  report: Report | None = None,
  check: Callable[[Release], None] | None = None,
) -> pathlib.Path:
  """A folder of ours for a release, converted unless it was before.

  Conversions are kept in `compiled_programs.cache_folder()`, by the release's
  files, their sizes and times. What an earlier process left there unfinished
  is removed.

  Args:
    name: a file, a folder or a hub's 'owner/name', or several, see
      `releases.locate`.
    base: another that has the parts which this one lacks.
    options: see there.
    needs: parts of a Release that must be there.
    report: see Report.
    check: is shown what was found before it is converted.

  Raises:
    FileNotFoundError, ValueError: see `releases.locate` and
      `conversion.to_ours`; FileNotFoundError if a part in `needs` is missing.
    OSError: if the cache cannot be written.
  """
  release = releases.locate(name)
  if base is not None:
    has = [kind for kind, path in vars(release).items() if path is not None]
    below = releases.locate(base, as_base=True, has=has)
    release = release.over(below)
    if below.transformer not in (None, release.transformer):
      # A training's checkpoint has no config.json; the base tells its heads.
      config = identity.open_network(below.transformer).config
      assert isinstance(config, WanConfig)
      options = dataclasses.replace(options, head_dim=config.head_dim)
    elif width := releases.head_dim(below):
      options = dataclasses.replace(options, head_dim=width)
  _check_parts(name, base, release, needs)
  if check is not None:
    check(release)
  kept = compiled_programs.cache_folder()
  folder = kept / f'{_slug(name)}-{_fingerprint(release, options)}'
  if (folder / layouts.CONFIG_FILE).exists():
    return folder
  with _partial_folder(folder) as partial:
    conversion.to_ours(
      release, partial, name=_slug(name), options=options, report=report
    )
    try:
      partial.rename(folder)
    except OSError:
      # Another process was faster; what it wrote is the same.
      if not (folder / layouts.CONFIG_FILE).exists():
        raise
  return folder


def _check_parts(
  name: Any, base: Any, release: Release, needs: Collection[str]
) -> None:
  """Raises FileNotFoundError for a part that is needed and not there."""
  for part in needs:
    if getattr(release, part) is not None:
      continue
    if part == 'tokenizer' and release.text_encoder is not None:
      network = identity.open_network(release.text_encoder)
      if conversion.has_own_tokenizer(network):
        continue
    # A hub's name is a folder by now: that of what was found.
    folders = {str(p.parent) for p in vars(release).values() if p is not None}
    sources = f'{name}' if base is None else f'{name} and base {base}'
    ending = '' if base is not None else _hint(release)
    missing = part.replace('_', ' ')
    raise FileNotFoundError(
      f'{sources}: no {missing}. Looked for {_LOOKED_FOR[part]}; '
      f'the other parts are in {", ".join(sorted(folders))}{ending}'
    )


def _hint(release: Release) -> str:
  """Which other release has what this one lacks."""
  known = None
  if release.transformer is not None:
    shapes = foreign.StateDict(release.transformer).shapes
    known = families.base_of(shapes.get('patch_embedding.weight', (0,))[0])
  if known is None:
    return '; base=... (--base) may name what has it'
  return f'; base={known!r} (--base={known}) has it, and so has a copy of that'


@contextlib.contextmanager
def _partial_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder beside a coming one, for the rename to be one move.

  A lock is held on it as long as its process lives, by which others tell what
  was left behind.
  """
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clear_stale(folder.parent)
    partial = pathlib.Path(
      tempfile.mkdtemp(
        prefix=f'{folder.name}.', suffix=_PARTIAL, dir=folder.parent
      )
    )
  except OSError as error:
    raise type(error)(
      f'cannot keep conversions in {folder.parent} '
      f'({error.strerror or error}); HIAR_JAX_CACHE names another folder'
    ) from error
  lock = os.open(partial.parent / f'{partial.name}.lock', os.O_CREAT)
  try:
    _lock(lock)
    yield partial
  finally:
    shutil.rmtree(partial, ignore_errors=True)
    (partial.parent / f'{partial.name}.lock').unlink(missing_ok=True)
    os.close(lock)


def _clear_stale(cache: pathlib.Path) -> None:
  """Removes folders whose process is gone."""
  for partial in cache.glob(f'*{_PARTIAL}'):
    path = cache / f'{partial.name}.lock'
    try:
      lock = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
      # It is about to be locked, or its process was killed right there.
      if time.time() - partial.stat().st_mtime < _GRACE_S:
        continue
      shutil.rmtree(partial, ignore_errors=True)
      continue
    try:
      if _lock(lock):
        shutil.rmtree(partial, ignore_errors=True)
        path.unlink(missing_ok=True)
    finally:
      os.close(lock)


def _lock(file: int) -> bool:
  """Locks an open file until it is closed; False if another process has."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError:
    # Or the file system has no locks: then nothing there is ever stale.
    return False
  return True


def _slug(name: Path | Sequence[Path]) -> str:
  """A name for people: that of the folder, or of the file without suffix."""
  path = pathlib.Path(releases.split_names(name)[0]).resolve()
  # A release's version has dots in it.
  return (path.stem if path.is_file() else path.name) or 'release'


def _fingerprint(release: Release, options: Options) -> str:
  """Changes when a file of the release does, or the way to convert it."""
  files = [
    file
    for kind in identity.KINDS
    if (path := getattr(release, kind)) is not None
    for file in releases.files_of(path)
  ]
  stamps = [
    (str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files
  ]
  told = json.dumps(
    [_CACHE_VERSION, stamps, str(release), dataclasses.asdict(options)]
  )
  return hashlib.sha256(told.encode()).hexdigest()[:16]
