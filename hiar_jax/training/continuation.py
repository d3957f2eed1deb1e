"""With what a run may go on: its config then, and its config now.

What a config names by path is compared by what lies there: a run whose folders
were moved is the same run. A checkpoint keeps, beside the config of its run,

  _inputs    key of a path -> hash of what lay there
  _changes   configs that the run went on with although they were others
"""

import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from hiar_jax.runtime import provenance
from hiar_jax.weights import layouts, networks

# What may differ between a run and its continuation.
_FREE = ('workdir', 'log_every', 'checkpoint_every', 'loop', 'mesh', 'measures')
# Keys of paths, in any section; weights are named *_weights.
_PATHS = ('path', 'folder', 'dir')
_INPUTS, _CHANGES = '_inputs', '_changes'
_MANIFEST = 'manifest.json'  # Of a set of files, see `data.shard_files`.
_DIGEST_BYTES = 2**20


def record(
  config: Mapping[str, Any], saved: Mapping[str, Any] | None = None
) -> dict[str, Any]:
  """What checkpoints keep of a run that has this config.

  Args:
    config: as a dict, its inputs in place.
    saved: what the checkpoint that it goes on from kept.
  """
  flat = _flat(config)
  found = {key: _digest(flat[key]) for key in sorted(flat) if _is_path(key)}
  kept = {
    _INPUTS: {key: digest for key, digest in found.items() if digest},
    _CHANGES: list((saved or {}).get(_CHANGES, [])),
  }
  return provenance.jsonable(config) | kept


def differences(
  saved: Mapping[str, Any], current: Mapping[str, Any]
) -> list[str]:
  """What a run would go on with that it did not begin with.

  Args:
    saved: `record` of the run; of earlier versions the config alone.
    current: `record` of the run that is to go on.

  Returns:
    One 'optimiser.learning_rate: 0.001 -> 0.002' each. More iterations than
    before are no difference.
  """
  before, now = saved.get(_INPUTS, {}), current[_INPUTS]
  flat = {'saved': _flat(saved), 'current': _flat(current)}
  same, changed = [], []
  for key in flat['saved'].keys() & flat['current'].keys():
    if not _is_path(key):
      continue
    moved = flat['saved'][key] != flat['current'][key]
    if key in before and key in now and before[key] == now[key]:
      same.append(key)
    elif not moved and key in before and key in now and not _is_set(key):
      changed.append(f'{key}: {flat["current"][key]} is not what it was')
  if current.get('iterations', 0) >= saved.get('iterations', 0):
    same.append('iterations')
  return sorted(
    changed
    + provenance.config_differences(
      saved, current, ignore=(*_FREE, _INPUTS, _CHANGES, *same)
    )
  )


def note_change(
  kept: Mapping[str, Any], iteration: int, changed: list[str]
) -> dict[str, Any]:
  """`record` with a change of the config that was asked for."""
  change = {'after_iteration': iteration, 'changed': changed}
  return dict(kept) | {_CHANGES: [*kept[_CHANGES], change]}


def _flat(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for key, value in config.items():
    if isinstance(value, Mapping):
      flat |= _flat(value, f'{prefix}{key}.')
    else:
      flat[f'{prefix}{key}'] = value
  return flat


def _is_path(key: str) -> bool:
  name = key.rpartition('.')[2]
  if key.split('.')[0] in (*_FREE, _INPUTS):
    return False
  return name in _PATHS or name.endswith('_weights')


def _is_set(key: str) -> bool:
  """Whether it is a set of files, which may grow and checks itself."""
  return key.rpartition('.')[2] == 'dir'


def _digest(value: Any) -> str:
  """Of what lies at a path, by a part of it; '' if nothing does."""
  if not isinstance(value, str | os.PathLike) or not str(value):
    return ''
  path = pathlib.Path(value).expanduser()
  try:
    return _digest_of(path)
  except (OSError, ValueError):  # Others say what is wrong with it.
    return ''


def _digest_of(path: pathlib.Path) -> str:
  if path.is_dir():
    if (path / _MANIFEST).is_file():
      return _bytes_digest(path / _MANIFEST)
    if (path / layouts.CONFIG_FILE).is_file():
      return networks.open_weights(path / layouts.STUDENT_FILE).digest()
    sizes = sorted(
      (str(file.relative_to(path)), file.stat().st_size)
      for file in path.rglob('*')
      if file.is_file()
    )
    return hashlib.sha256(repr(sizes).encode()).hexdigest()
  if path.suffix == '.safetensors':
    return networks.open_weights(path).digest()
  return _bytes_digest(path)


def _bytes_digest(path: pathlib.Path) -> str:
  digest = hashlib.sha256(str(path.stat().st_size).encode())
  with path.open('rb') as file:
    digest.update(file.read(_DIGEST_BYTES))
  return digest.hexdigest()
