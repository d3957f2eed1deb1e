"""What made a run: its config, the versions, the git commit if it is known."""

import dataclasses
import importlib
import importlib.metadata
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_PACKAGES = ('flax', 'grain', 'jax', 'jaxlib', 'numpy', 'optax')
_COMMIT = re.compile(r'[0-9a-f]{40,64}')


def code_version() -> dict[str, str]:
  """Versions by name: 'hiar_jax', 'commit' ('' if unknown), and packages."""
  own = importlib.import_module('hiar_jax').__version__
  versions = {'hiar_jax': own, 'commit': _commit()}
  for name in _PACKAGES:
    versions[name] = importlib.metadata.version(name)
  return versions


def _commit() -> str:
  """Of the checkout that the library lies in, or that it was installed from."""
  git = pathlib.Path(__file__).parents[2] / '.git'
  if git.exists():
    return commit_of(git)
  try:
    origin = importlib.metadata.distribution('hiar_jax').read_text(
      'direct_url.json'
    )
  except importlib.metadata.PackageNotFoundError:
    return ''
  return json.loads(origin or '{}').get('vcs_info', {}).get('commit_id', '')


def commit_of(git: pathlib.Path) -> str:
  """The commit that is checked out, read from git's own files; '' if unknown.

  Args:
    git: `.git` of a checkout; in a linked worktree it is a file.
  """
  try:
    if git.is_file():
      git = git.parent / git.read_text().removeprefix('gitdir:').strip()
    head = (git / 'HEAD').read_text().strip()
    if _COMMIT.fullmatch(head):
      return head
    name = head.removeprefix('ref:').strip()
    # Branches are kept once for all worktrees.
    common = git / 'commondir'
    shared = git / common.read_text().strip() if common.is_file() else git
    loose = shared / name
    if loose.is_file():
      return loose.read_text().strip()
    for line in (shared / 'packed-refs').read_text().splitlines():
      commit, _, packed = line.partition(' ')
      if packed == name:
        return commit
  except OSError:
    pass
  return ''


def config_differences(
  saved: Mapping[str, Any],
  current: Mapping[str, Any],
  *,
  ignore: Sequence[str] = (),
) -> list[str]:
  """Lists what changed between two configs.

  Args:
    saved: a restored config.
    current: this run's config as a dict.
    ignore: keys that may change from run to run; 'log' stands for everything
      below it, 'train.num_iterations' for one value.

  Returns:
    One 'train.learning_rate: 0.001 -> 0.002' a change, sorted by key.
  """
  absent = 'absent'
  before, after = (_flatten_config(jsonable(c)) for c in (saved, current))
  changes = []
  for key in sorted(before.keys() | after.keys()):
    if any(key == i or key.startswith(f'{i}.') for i in ignore):
      continue
    old, new = before.get(key, absent), after.get(key, absent)
    if type(old) is not type(new) or old != new:
      changes.append(f'{key}: {old} -> {new}')
  return changes


def _flatten_config(config: Any, prefix: str = '') -> dict[str, Any]:
  if not isinstance(config, Mapping) or (prefix and not config):
    return {prefix: config}
  flat: dict[str, Any] = {}
  for key, value in config.items():
    flat |= _flatten_config(value, f'{prefix}.{key}' if prefix else key)
  return flat


def jsonable(config: Any) -> Any:
  """What JSON makes of it: tuples become lists, keys become text."""

  def other(value):
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
      return dataclasses.asdict(value)
    if isinstance(value, np.generic):
      return value.item()
    if isinstance(value, Mapping):
      return dict(value)
    return str(value)

  return json.loads(json.dumps(config, default=other))
