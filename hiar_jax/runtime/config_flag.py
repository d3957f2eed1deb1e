"""The flag --config: a config of the package by its name, or a file's path."""

from __future__ import annotations

import importlib.util
import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from absl import flags

_PACKAGE = 'hiar_jax.configs'


def define(*, required: bool = False) -> flags.FlagHolder:
  """Defines --config, and with it --config.key=value for what is in it.

  `--config=bouncing:teacher` is phase 'teacher' of the packaged config; a value
  with a slash, or that ends in .py, is a path: `--config=mine.py:teacher`.
  """
  # Here: a page of help asks for `packaged` alone, and should cost no time.
  from absl import flags
  from ml_collections import config_flags

  holder = config_flags.DEFINE_config_file(
    'config',
    lock_config=True,
    help_string='NAME, of a config that comes with the package '
    f'({", ".join(packaged())}), or the path of a file; :PHASE may follow',
  )
  # Any: a parser's method is replaced, for this one flag.
  parser: Any = flags.FLAGS['config'].parser
  load = parser.parse
  parser.parse = lambda value: load(find(value))
  if required:
    flags.mark_flag_as_required('config')
  return holder


def find(value: str) -> str:
  """The path, with its phase, that a value of --config stands for.

  Raises:
    ValueError: if it is a name that the package has no config of.
  """
  name, colon, phase = value.partition(':')
  if '/' in name or name.endswith('.py'):
    return value
  paths = packaged()
  if not paths:
    # An editable installation knows the folders of the day it was made.
    raise ValueError(f'no {_PACKAGE} is installed; install the package again')
  if name not in paths:
    raise ValueError(
      f'no config {name!r} comes with the package, only {", ".join(paths)}; a '
      'path has a slash in it or ends in .py'
    )
  return f'{paths[name]}{colon}{phase}'


def overrides() -> dict[str, Any]:
  """'rollout.window' -> 3 for --config.rollout.window=3 and so on."""
  from absl import flags
  from ml_collections import config_flags

  if flags.FLAGS['config'].value is None:
    return {}
  return config_flags.get_override_values(flags.FLAGS['config'])


def refuse_overrides_but(*keys: str) -> None:
  """Refuses --config.key=value for what the program does not read.

  Args:
    *keys: what it reads: sections, or single values such as 'model.text_len'.

  Raises:
    ValueError: naming an override of something else.
  """
  for override in overrides():
    # Lists and dictionaries in a config: 'trajectories.points[0]'.
    name = override.partition('[')[0]
    if not any(f'{name}.'.startswith(f'{key}.') for key in keys):
      raise ValueError(
        f'--config.{override} would change nothing: of a config, this reads '
        + ', '.join(sorted(keys))
      )


def packaged() -> dict[str, pathlib.Path]:
  """Name -> file of the configs that come with the package."""
  try:
    spec = importlib.util.find_spec(_PACKAGE)
  except ModuleNotFoundError:
    spec = None
  folders = spec.submodule_search_locations if spec else None
  return {
    path.stem: path
    for folder in folders or ()
    for path in sorted(pathlib.Path(folder).glob('*.py'))
    if path.stem != '__init__'
  }
