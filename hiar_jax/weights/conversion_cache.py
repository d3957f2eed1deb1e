"""Converted weights that are kept, and made when they are first needed."""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile

from hiar_jax.runtime import compiled_programs
from hiar_jax.weights import conversion, identity, layouts, releases
from hiar_jax.weights.conversion import Options, Report
from hiar_jax.weights.releases import Release

# Changes with what is written, so that an older cache is not taken for it.
_CACHE_VERSION = 1
_DEFAULT = Options()


def cached(
  name: str | os.PathLike,
  *,
  base: str | os.PathLike | None = None,
  options: Options = _DEFAULT,
  report: Report | None = None,
) -> pathlib.Path:
  """A folder of ours for a release, converted unless it was before.

  Conversions are kept in `compiled_programs.cache_folder()`, by the release's
  files, their sizes and times.

  Args:
    name: a file, a folder or a hub's 'owner/name'.
    base: another that has the parts which this one lacks.
    options: see there.
    report: see Report.

  Raises:
    FileNotFoundError, ValueError: see `releases.find`, `hub.download`
      and `conversion.to_ours`.
  """
  release = releases.locate(name)
  if base is not None:
    below = releases.locate(base)
    release = release.over(below)
    if below.transformer not in (None, release.transformer):
      # A training's checkpoint has no config.json; the base tells its heads.
      config = identity.open_network(below.transformer).config
      options = dataclasses.replace(options, head_dim=config.head_dim)
  kept = compiled_programs.cache_folder()
  folder = kept / f'{_slug(name)}-{_fingerprint(release, options)}'
  if (folder / layouts.CONFIG_FILE).exists():
    return folder
  folder.parent.mkdir(parents=True, exist_ok=True)
  # Beside it, for the rename to be one move: no process sees half of it.
  partial = pathlib.Path(
    tempfile.mkdtemp(prefix=f'{folder.name}.', dir=folder.parent)
  )
  try:
    conversion.to_ours(
      release, partial, name=_slug(name), options=options, report=report
    )
    try:
      partial.rename(folder)
    except OSError:
      # Another process was faster; what it wrote is the same.
      if not (folder / layouts.CONFIG_FILE).exists():
        raise
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return folder


def _slug(name: str | os.PathLike) -> str:
  """A name for people: that of the folder, or of the file without suffix."""
  path = pathlib.Path(name).resolve()
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
