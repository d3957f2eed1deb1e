"""One network's arrays to a file and back.

Weights are shipped as safetensors, one file of nested names such as
'layers/q/kernel'; orbax folders and sharded files are read as well.
"""

import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from hiar_jax.runtime import files
from hiar_jax.weights import (
  finite,
  orbax_weights,
  placing,
  safetensors_io,
)


def save_weights(
  path: str | pathlib.Path,
  params: Any,
  *,
  dtype: jax.typing.DTypeLike | None = None,
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes parameters as one safetensors file, for shipping.

  Args:
    path: the file; replaced in one move.
    params: nested dict of arrays; keys become 'layer/attention/q'.
    dtype: of the stored floating-point arrays, such as bfloat16; None keeps
      each array's own.
    metadata: text stored in the file's header (config, provenance).

  Raises:
    ValueError: if a key has a '/' in it.
  """
  arrays = {}
  for name, value in _flatten_params(params).items():
    array = np.asarray(value)
    if dtype is not None and jnp.issubdtype(array.dtype, jnp.floating):
      array = array.astype(dtype)
    arrays[name] = np.ascontiguousarray(array)
  with files.whole_file(path) as partial:
    # Takes the mode that new files have here: `save_file` lets only their owner
    # read them, and weights are for others too.
    partial.touch()
    mode = partial.stat().st_mode & 0o777
    safetensors.numpy.save_file(arrays, partial, metadata=dict(metadata or {}))
    partial.chmod(mode)


def load_weights(
  path: str | os.PathLike,
  abstract_params: Any,
  *,
  change: placing.Change | None = None,
) -> Any:
  """Reads stored weights into the structure of `abstract_params`.

  Part by part, see `placing`: beside the result, memory is needed for the
  largest array at most.

  Args:
    path: see `open_weights`.
    abstract_params: nested dict of arrays or ShapeDtypeStructs; values are
      cast to its dtypes and, where it has shardings, put onto the devices. A
      matrix in 8 bits has its scales beside it, see `quantised.shapes`.
    change: what is done to some on the way.

  Returns:
    Nested dict of NumPy arrays, or jax.Arrays where there is a sharding.

  Raises:
    FileNotFoundError: if there is no such file, or a shard is missing.
    ValueError: if the file is damaged, or, all together, for every missing,
      unknown or misshapen array, or all with values that are not finite.
  """
  wanted = _flatten_params(abstract_params)
  reader = open_whole(path)
  check_structure(
    pathlib.Path(path),
    shapes(reader.entries),
    shapes(placing.stored_names(wanted)),
  )
  loaded, counts = placing.load(reader, wanted, change)
  finite.check(path, counts)
  return _unflatten(loaded)


def open_weights(
  path: str | os.PathLike,
) -> safetensors_io.Reader | orbax_weights.Reader:
  """Opens weights of either format.

  Args:
    path: a .safetensors file, written by `save_weights` or of shards with an
      index. Where there is none but a folder of that name and `.orbax`, that
      is opened.

  Raises:
    FileNotFoundError: if there is no such file, or a part of it is missing.
    ValueError: if a file is damaged.
  """
  path = pathlib.Path(path)
  folder = path.with_suffix(orbax_weights.SUFFIX)
  if not path.exists() and folder.is_dir():
    return orbax_weights.Reader(folder)
  return safetensors_io.Reader(path)


def open_whole(
  path: str | os.PathLike,
) -> safetensors_io.Reader | orbax_weights.Reader:
  """As `open_weights`; what it raises says that it is of weights."""
  try:
    return open_weights(path)
  except FileNotFoundError as error:
    # A missing shard has its own words.
    own = re.search('shard|incomplete', str(error))
    message = str(error) if own else f'no weights at {path}'
    raise FileNotFoundError(message) from None
  except ValueError as error:
    raise ValueError(f'weights {path} are damaged ({error})') from error


def read_metadata(path: str | pathlib.Path) -> dict[str, str]:
  """The text that `save_weights` put into the file's header.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if the file is damaged.
  """
  try:
    with safetensors.safe_open(path, framework='numpy') as weights:
      return weights.metadata() or {}
  except FileNotFoundError:
    raise FileNotFoundError(f'no weights at {path}') from None
  except safetensors.SafetensorError as error:
    raise ValueError(f'weights {path} are damaged ({error})') from error


def abstract(state: Any) -> Any:
  """Replaces arrays by their ShapeDtypeStructs, shardings included."""

  def leaf(x):
    if isinstance(x, jax.ShapeDtypeStruct | int | float):
      return x
    sharding = x.sharding if isinstance(x, jax.Array) else None
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(leaf, state)


def check_structure(
  path: pathlib.Path | str,
  stored: Mapping[str, tuple[int, ...]],
  wanted: Mapping[str, tuple[int, ...]],
) -> None:
  problems = [f'{k} is missing' for k in sorted(wanted.keys() - stored.keys())]
  problems += [f'{k} is unknown' for k in sorted(stored.keys() - wanted.keys())]
  problems += [
    f'{k} has shape {stored[k]}, not {wanted[k]}'
    for k in sorted(wanted.keys() & stored.keys())
    if stored[k] != wanted[k]
  ]
  if problems:
    raise ValueError(f'{path} does not fit the model: {"; ".join(problems)}')


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """Shapes by path; a struct's field and a dict's key are the same here."""

  def entry_name(entry: Any) -> str:
    for attribute in ('key', 'idx', 'name'):
      if hasattr(entry, attribute):
        return str(getattr(entry, attribute))
    raise TypeError(f'unknown pytree entry {entry!r}')

  def stored_shape(leaf: Any) -> tuple[int, ...]:
    if not hasattr(leaf, 'shape'):  # A Python number.
      return ()
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.eval_shape(jax.random.key_data, leaf)
    return tuple(leaf.shape)

  return {
    '/'.join(map(entry_name, path)): stored_shape(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _flatten_params(tree: Mapping[str, Any], prefix: str = '') -> dict:
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    if '/' in key:
      raise ValueError(f"parameter name {key!r} has a '/' in it")
    if isinstance(value, Mapping):
      flat |= _flatten_params(value, f'{prefix}{key}/')
    else:
      flat[f'{prefix}{key}'] = value
  return flat


def _unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for name, value in flat.items():
    *parents, last = name.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = value
  return tree
