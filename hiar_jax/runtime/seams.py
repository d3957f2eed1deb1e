"""Modules that a config names, such as where prompts or text states come from.

A name is a module of a room of this package, or with dots in it any module
that can be imported: one's own data is one file with one function in it.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any


def function(
  room: str,
  name: str,
  verb: str,
  *,
  key: str,
  aliases: Mapping[str, str] = {},
) -> Callable[..., Any]:
  """The function `verb` of the module that a config names.

  Args:
    room: of this package, where names without a dot are looked for.
    name: of the module.
    verb: the function that the module must have.
    key: of the config, for the message.
    aliases: name -> module of the room, where the two differ.

  Raises:
    ValueError: if there is no such module, or it has no such function.
  """
  # A source has one name, not that of its module besides.
  known = '' if name in aliases.values() else aliases.get(name, name)
  found = optional_function(room, known, verb)
  if found is None:
    raise ValueError(
      f'{key}={name!r} is not one of {_names(room, verb, aliases)}, nor a '
      f'module with a function {verb}'
    )
  return found


def optional_function(
  room: str, name: str, verb: str
) -> Callable[..., Any] | None:
  """The function `verb` of a module, see `function`; None if it has none."""
  path = name if '.' in name else f'hiar_jax.{room}.{name}'
  return getattr(_import(path), verb, None)


def reads(
  room: str, name: str, *, aliases: Mapping[str, str] = {}
) -> tuple[str, ...]:
  """Sections of a config that a module says it reads beside its own: `READS`.

  Args:
    room: see `function`.
    name: likewise.
    aliases: likewise.
  """
  found: Any = optional_function(room, aliases.get(name, name), 'READS')
  return tuple(found or ())


def _import(path: str) -> Any:
  if not all(part.isidentifier() for part in path.split('.')):
    return None
  try:
    if importlib.util.find_spec(path) is None:
      return None
  except ModuleNotFoundError:  # Of a package on the way.
    return None
  return importlib.import_module(path)


def _names(room: str, verb: str, aliases: Mapping[str, str]) -> list[str]:
  """What a config could have said."""
  names = {module: name for name, module in aliases.items()}
  path = f'hiar_jax.{room}'
  return sorted(
    names.get(module.name, module.name)
    for module in pkgutil.iter_modules(importlib.import_module(path).__path__)
    if hasattr(importlib.import_module(f'{path}.{module.name}'), verb)
  )
