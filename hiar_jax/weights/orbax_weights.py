"""Weights of one network as an orbax checkpoint, array by array.

Orbax saves a tree that is in memory; its partial saves add to a checkpoint that
is not finished yet, so that here memory is needed for the arrays of one save.
Arrays are stored in chunks, of which a host reads those of its own shards.

The folder is what `orbax.checkpoint.v1` reads, and `files.json`: orbax does not
name a file that is missing or was cut.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import shutil
import types
from collections.abc import Mapping
from typing import Any, Self

import jax
import numpy as np

from hiar_jax.runtime import files

SUFFIX = '.orbax'

_FILE_LIST = 'files.json'
# Arrays wait for each other up to this: every save costs some files.
_SAVE_BYTES = 256 * 2**20
_CHUNK_BYTES = 64 * 2**20
_FILE_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Entry:
  """What is known of an array without reading it.

  Attributes:
    shape: of the array.
    dtype: of its numbers.
  """

  shape: tuple[int, ...]
  dtype: np.dtype


class Writer:
  """A checkpoint that is written array by array.

  A context manager: the folder takes its name when the block ends without an
  error, and is removed otherwise.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    *,
    shard_bytes: int = _FILE_BYTES,
    save_bytes: int = _SAVE_BYTES,
  ):
    """Prepares it; nothing is written.

    Args:
      path: the folder to make.
      arrays: name -> (shape, dtype); a name is 'layers/ffn_in/kernel'.
      shard_bytes: files are ended at about this size.
      save_bytes: of the arrays that are held until they are written together.
    """
    self._path = pathlib.Path(path).absolute()
    self._arrays = arrays
    self._shard_bytes, self._save_bytes = shard_bytes, save_bytes
    # Whole arrays, and those of which entries are missing with their number.
    self._held: dict[str, np.ndarray] = {}
    self._begun: dict[str, tuple[np.ndarray, int]] = {}

  def write(
    self, name: str, array: np.ndarray, index: int | None = None
  ) -> None:
    """Adds an array, or one entry of its first axis, each of them once."""
    if index is not None:
      shape, dtype = self._arrays[name]
      whole, missing = self._begun.pop(name, (None, shape[0]))
      if whole is None:
        whole = np.empty(shape, dtype)
      whole[index] = array
      if missing > 1:
        self._begun[name] = whole, missing - 1
        return
      array = whole
    self._held[name] = array
    if sum(a.nbytes for a in self._held.values()) >= self._save_bytes:
      self._save()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: object, error: object, trace: object) -> None:
    if kind is not None:
      for path in self._path.parent.glob(f'{self._path.name}*'):
        shutil.rmtree(path, ignore_errors=True)
      return
    assert not self._begun, sorted(self._begun)
    self._save()
    ocp = _orbax()
    ocp.partial.finalize(self._path)
    files = {
      str(file.relative_to(self._path)): file.stat().st_size
      for file in sorted(self._path.rglob('*'))
      if file.is_file()
    }
    # Last: a folder that has it is whole.
    (self._path / _FILE_LIST).write_text(json.dumps(files, indent=1) + '\n')

  def _save(self) -> None:
    if not self._held:
      return
    ocp = _orbax()
    context = ocp.Context()
    saving = context.array.saving
    saving.ocdbt_target_data_file_size = self._shard_bytes
    saving.storage_options.chunk_byte_size = min(
      _CHUNK_BYTES, self._shard_bytes
    )
    with context:
      ocp.partial.save(self._path, _nested(self._held))
    self._held = {}


class Reader:
  """Arrays of a checkpoint, read when asked for.

  Attributes:
    entries: name -> Entry.
  """

  def __init__(self, path: str | os.PathLike):
    """Reads what there is, and checks that all files are there.

    Raises:
      FileNotFoundError: if there is no checkpoint, or a file of it is gone.
      ValueError: if it is damaged.
    """
    self._path = pathlib.Path(path).absolute()
    listing = self._path / _FILE_LIST
    if not listing.is_file():
      raise FileNotFoundError(f'weights {path} are incomplete: no {listing}')
    try:
      self._files = files.parse_json(listing.read_bytes())
    except ValueError as error:
      raise ValueError(f'{listing} is not JSON: {error}') from error
    for name, size in self._files.items():
      file = self._path / name
      if not file.is_file():
        raise FileNotFoundError(f'weights {path} are incomplete: no {file}')
      if file.stat().st_size != size:
        raise ValueError(
          f'{file} is damaged: it has {file.stat().st_size} bytes, not {size}'
        )
    self._metadata = _flat(_orbax().metadata(self._path).metadata)
    self.entries = {
      name: Entry(tuple(leaf.shape), np.dtype(leaf.dtype))
      for name, leaf in self._metadata.items()
    }
    self._last: tuple[str, np.ndarray] | None = None

  def read(self, name: str, part: slice = slice(None)) -> np.ndarray:
    """Reads an array, or a slice of its first axis.

    The last array stays, whole: slices are best read one after the other.
    """
    if self._last is None or self._last[0] != name:
      self._last = None
      self._last = name, self._load({name: self._metadata[name]})[name]
    array = self._last[1]
    return array[part] if array.ndim else array

  def load(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Reads arrays as they are wanted, a few of them at a time.

    Args:
      wanted: name -> ShapeDtypeStruct of the stored shape; the dtype may be
        another.

    Returns:
      name -> jax.Array where there is a sharding, else NumPy array.
    """
    loaded: dict[str, Any] = {}
    group: dict[str, Any] = {}
    num_bytes = 0
    for name, like in wanted.items():
      entry = self.entries[name]
      num_bytes += math.prod(entry.shape) * entry.dtype.itemsize
      is_placed = getattr(like, 'sharding', None) is not None
      group[name] = like if is_placed else self._metadata[name]
      if num_bytes >= _SAVE_BYTES:
        loaded |= self._load(group)
        group, num_bytes = {}, 0
    loaded |= self._load(group)
    return {
      name: loaded[name].astype(like.dtype, copy=False)
      if isinstance(loaded[name], np.ndarray)
      else loaded[name]
      for name, like in wanted.items()
    }

  def digest(self) -> str:
    """Differs between checkpoints: orbax draws its files' names at random."""
    return hashlib.sha256(json.dumps(self._files).encode()).hexdigest()

  def _load(self, likes: dict[str, Any]) -> dict[str, Any]:
    if not likes:
      return {}
    ocp = _orbax()
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
      # Waited for: the next arrays would be read before these are let go.
      tree = jax.block_until_ready(ocp.load(self._path, _nested(likes)))
    return _flat(tree)


def _orbax() -> types.ModuleType:
  """Orbax, imported for those who use it: it takes a quarter of a second."""
  from orbax.checkpoint.experimental import v1

  return v1


def _flat(tree: Any) -> dict[str, Any]:
  return {
    '/'.join(entry.key for entry in keys): leaf
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for name, value in flat.items():
    *parents, last = name.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = value
  return tree
