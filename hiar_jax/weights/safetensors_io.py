"""Safetensors files read and written one array at a time.

The `safetensors` package writes a file from arrays that are all in memory; here
a file is laid out first and filled piece by piece, in any order, so that
turning one set of weights into another needs memory for one array. Larger sets
are split into shards with an index, as Hugging Face libraries do:

  model-00001-of-00002.safetensors  model-00002-of-00002.safetensors
  model.safetensors.index.json      {"weight_map": {name: file}}

It is read here as well: its `safe_open(...).get_slice` maps the file, whose
pages count as this process's memory as long as it is open. 24 arrays of 64 MiB
took 1.1 s and 0.13 GiB when it was opened for each, 1.2 s and 1.56 GiB when it
stayed open, and take 0.3 s and 0.06 GiB here (safetensors 0.8.0, two CPU cores,
the file in the page cache); `benchmarks/convert_memory.py --num_layers 4`
converts in 0.30, 0.67 and 0.28 GiB. It has no float8 for NumPy either.

Format: 8 bytes of header length (little endian), the header as JSON (name ->
dtype, shape, [begin, end) in the data), the data.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Self

import ml_dtypes
import numpy as np

from hiar_jax.runtime import files
from hiar_jax.weights import wrong_files

SHARD_BYTES = 5 * 10**9
INDEX_SUFFIX = '.index.json'

_DTYPES = {
  'F64': np.dtype(np.float64),
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
  'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
  'I64': np.dtype(np.int64),
  'I32': np.dtype(np.int32),
  'I16': np.dtype(np.int16),
  'I8': np.dtype(np.int8),
  'U8': np.dtype(np.uint8),
  'BOOL': np.dtype(bool),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_SHARD = re.compile(r'(.*)-(\d{5})-of-(\d{5})\.safetensors')
# More would not be a header but a damaged length.
_MAX_HEADER = 100 * 2**20
_DIGEST_BYTES = 4096  # Of each array.


@dataclasses.dataclass(frozen=True)
class Entry:
  """Where one array lies.

  Attributes:
    file: that holds it.
    offset: of its first byte in the file.
    dtype: of its numbers.
    shape: of the array.
  """

  file: pathlib.Path
  offset: int
  dtype: np.dtype
  shape: tuple[int, ...]

  @property
  def num_bytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


class Reader:
  """Arrays of one file, or of all shards of an index, read when asked for.

  Attributes:
    entries: name -> Entry, in the order of the files.
    metadata: text of the first file's header.
  """

  def __init__(self, path: str | os.PathLike):
    """Reads the headers.

    Args:
      path: a .safetensors file, one shard of several, or an index. If there
        is no such file but an index beside it, the index is read.

    Raises:
      FileNotFoundError: if the file, or a shard, does not exist.
      ValueError: if a file is damaged, or the index is of other files.
    """
    path = pathlib.Path(path)
    index: pathlib.Path | None = path.with_name(path.name + INDEX_SUFFIX)
    if path.name.endswith(INDEX_SUFFIX):
      index = path
    elif path.exists() or not (index and index.exists()):
      index = None
    files = indexed(index) if index else _siblings(path)
    self.entries: dict[str, Entry] = {}
    self.metadata: dict[str, str] = {}
    for file, wanted in files.items():
      entries, metadata = _read_header(file)
      absent = sorted(wanted - entries.keys())
      if absent:
        raise ValueError(
          f'{file} has no {absent[0]!r}, which {index} expects in it'
        )
      twice = sorted(entries.keys() & self.entries.keys())
      if twice:
        raise ValueError(
          f'{twice[0]!r} is in {file} and in {self.entries[twice[0]].file}'
        )
      self.metadata = self.metadata or metadata
      self.entries |= entries

  def read(self, name: str, part: slice = slice(None)) -> np.ndarray:
    """Reads an array, or a slice of its first axis."""
    entry = self.entries[name]
    if not entry.shape:
      return self._read(entry, 0, ())
    start, stop, _ = part.indices(entry.shape[0])
    row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
    return self._read(entry, start * row, (stop - start, *entry.shape[1:]))

  def read_part(self, name: str, part: Sequence[slice]) -> np.ndarray:
    """Reads a part of an array, and of the file little else.

    Args:
      name: of the array.
      part: a slice of every axis, without steps.
    """
    shape = self.entries[name].shape
    whole = [s.indices(n) == (0, n, 1) for s, n in zip(part, shape)]
    if all(whole[1:]):
      return self.read(name, *part[:1])
    if len(shape) < 3:
      return self._cut(name, 0, shape, part)
    start, stop, _ = part[0].indices(shape[0])
    size = math.prod(shape[1:])
    # Of a stack one layer is mapped at a time.
    return np.stack(
      [
        self._cut(name, i * size, shape[1:], part[1:])
        for i in range(start, stop)
      ]
    )

  def digest(self) -> str:
    """Differs between weights: a hash of names, shapes and some numbers.

    Of each array the first numbers are taken: all of a large network would
    take a minute, and other weights of the same sizes differ there too.
    """
    digest = hashlib.sha256()
    for name, entry in sorted(self.entries.items()):
      digest.update(f'{name} {entry.dtype} {entry.shape}'.encode())
      with entry.file.open('rb') as file:
        file.seek(entry.offset)
        digest.update(file.read(min(entry.num_bytes, _DIGEST_BYTES)))
    return digest.hexdigest()

  def _cut(
    self, name: str, first: int, shape: tuple, part: Sequence[slice]
  ) -> np.ndarray:
    """A part of an array that begins at a number of the entry's."""
    entry = self.entries[name]
    offset = entry.offset + first * entry.dtype.itemsize
    try:
      mapped = np.memmap(entry.file, entry.dtype, 'r', offset, shape)
    except ValueError as error:
      raise ValueError(
        f'{entry.file} was cut while it was being read'
      ) from error
    # A copy: as long as it is mapped, what was read counts as memory.
    return np.array(mapped[tuple(part)])

  def _read(self, entry: Entry, skip: int, shape: tuple) -> np.ndarray:
    # Read, not mapped: mapped pages would count as this process's memory.
    array = np.fromfile(
      entry.file, entry.dtype, math.prod(shape), offset=entry.offset + skip
    )
    if array.size != math.prod(shape):
      raise ValueError(f'{entry.file} was cut while it was being read')
    return array.reshape(shape)


class Writer:
  """Files that are laid out at once and filled in any order.

  A context manager: the files take their names when the block ends without an
  error, and are removed otherwise.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    *,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
  ):
    """Lays out the files.

    Args:
      path: the .safetensors file; shards are numbered before the suffix.
      arrays: name -> (shape, dtype).
      metadata: text for the header of each file.
      shard_bytes: a file is ended before it gets larger, unless one array is.

    Raises:
      ValueError: if a dtype cannot be stored.
    """
    self._path = pathlib.Path(path)
    shards = _shards(arrays, shard_bytes)
    self.files = [self._path]
    if len(shards) > 1:
      self.files = [
        self._path.with_stem(f'{self._path.stem}-{i:05}-of-{len(shards):05}')
        for i in range(1, len(shards) + 1)
      ]
    headers = [_header(shard, arrays, metadata or {}) for shard in shards]
    self._entries: dict[str, Entry] = {}
    self._handles = {}
    for file, (header, data_bytes), shard in zip(self.files, headers, shards):
      partial = file.with_name(file.name + '.part')
      handle = partial.open('wb')
      handle.write(header)
      handle.truncate(len(header) + data_bytes)
      self._handles[file] = handle
      offset = len(header)
      for name in shard:
        shape, dtype = arrays[name]
        entry = Entry(file, offset, np.dtype(dtype), tuple(shape))
        self._entries[name] = entry
        offset += entry.num_bytes
    self._total = sum(e.num_bytes for e in self._entries.values())

  def write(
    self, name: str, array: np.ndarray, index: int | None = None
  ) -> None:
    """Writes an array, or one entry of its first axis."""
    entry = self._entries[name]
    shape = entry.shape if index is None else entry.shape[1:]
    assert array.shape == shape, (name, array.shape, shape)
    array = np.ascontiguousarray(array, entry.dtype)
    handle = self._handles[entry.file]
    handle.seek(entry.offset + (index or 0) * array.nbytes)
    # As bytes: NumPy lends no buffer of a dtype of ml_dtypes.
    handle.write(array.reshape(-1).view(np.uint8).data)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: object, error: object, trace: object) -> None:
    for file, handle in self._handles.items():
      handle.close()
      partial = pathlib.Path(handle.name)
      if kind is None:
        partial.replace(file)
      else:
        partial.unlink()
    if kind is None and len(self.files) > 1:
      index = {
        'metadata': {'total_size': self._total},
        'weight_map': {n: e.file.name for n, e in self._entries.items()},
      }
      self._path.with_name(self._path.name + INDEX_SUFFIX).write_text(
        json.dumps(index, indent=1) + '\n'
      )


def indexed(index: pathlib.Path) -> dict[pathlib.Path, set[str]]:
  """File -> the names that the index expects in it."""
  weight_map = read_json(index).get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map:
    raise ValueError(f'{index} is damaged: it has no weight_map')
  files: dict[pathlib.Path, set[str]] = {}
  for name, file in weight_map.items():
    # An index names files of its own folder; another path is none of ours.
    if pathlib.PurePath(str(file)).name != file:
      raise ValueError(f'{index} names a file outside its folder: {file!r}')
    files.setdefault(index.with_name(file), set()).add(name)
  missing = sorted(str(file) for file in files if not file.exists())
  if missing:
    raise FileNotFoundError(
      f'{len(missing)} of {len(files)} shards that {index} names are missing: '
      + ', '.join(missing)
    )
  return files


def _siblings(path: pathlib.Path) -> dict[pathlib.Path, set[str]]:
  """The file itself, or every shard if its name says that it is one."""
  shard = _SHARD.fullmatch(path.name)
  if not shard:
    return {path: set()}
  stem, count = shard[1], int(shard[3])
  files = [
    path.with_name(f'{stem}-{i:05}-of-{count:05}.safetensors')
    for i in range(1, count + 1)
  ]
  missing = [str(file) for file in files if not file.exists()]
  if missing:
    raise FileNotFoundError(
      f'{len(missing)} of {count} shards are missing: ' + ', '.join(missing)
    )
  return {file: set() for file in files}


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: naming the file, if it holds something else.
  """
  wrong_files.check(path)
  try:
    value = files.parse_json(path.read_bytes())
  except ValueError as error:
    raise ValueError(f'{path} is not JSON: {error}') from error
  if not isinstance(value, dict):
    raise ValueError(f'{path} is damaged: it is no JSON object')
  return value


def _read_header(
  path: pathlib.Path,
) -> tuple[dict[str, Entry], dict[str, str]]:
  wrong_files.check(path)
  size = path.stat().st_size
  with path.open('rb') as file:
    (length,) = struct.unpack('<Q', file.read(8).ljust(8, b'\xff'))
    if length > min(size - 8, _MAX_HEADER):
      raise ValueError(f'{path} is damaged: it has no safetensors header')
    try:
      header = files.parse_json(file.read(length))
      metadata = header.pop('__metadata__', {})
      entries = {
        name: _entry(path, 8 + length, **fields)
        for name, fields in header.items()
      }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
      raise ValueError(
        f'{path} is damaged: its header is no safetensors header ({error})'
      ) from error
  for name, entry in entries.items():
    if entry.offset + entry.num_bytes > size:
      raise ValueError(f'{path} is damaged: it ends within {name!r}')
  return entries, metadata


def _entry(
  path: pathlib.Path,
  start: int,
  dtype: str,
  shape: Sequence[int],
  data_offsets: Sequence[int],
) -> Entry:
  begin, end = data_offsets
  if dtype not in _DTYPES:
    raise ValueError(f'dtype {dtype} is not one of {sorted(_DTYPES)}')
  entry = Entry(path, start + begin, _DTYPES[dtype], tuple(shape))
  if min((begin, *shape), default=0) < 0 or end - begin != entry.num_bytes:
    raise ValueError(f'{begin}..{end} are not the bytes of {dtype} {shape}')
  return entry


def _shards(arrays: Mapping[str, tuple], shard_bytes: int) -> list[list[str]]:
  shards: list[list[str]] = [[]]
  filled = 0
  for name, (shape, dtype) in arrays.items():
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if shards[-1] and filled + num_bytes > shard_bytes:
      shards.append([])
      filled = 0
    shards[-1].append(name)
    filled += num_bytes
  return shards


def _header(
  names: list[str], arrays: Mapping[str, tuple], metadata: Mapping[str, str]
) -> tuple[bytes, int]:
  """The first bytes of a file, and how many bytes of data follow."""
  # Hugging Face libraries refuse a file that does not say 'pt'; the arrays are
  # the same for all.
  fields: dict[str, Any] = {'__metadata__': {'format': 'pt', **metadata}}
  begin = 0
  for name in names:
    shape, dtype = arrays[name]
    if np.dtype(dtype) not in _CODES:
      raise ValueError(f'{name!r}: safetensors has no {np.dtype(dtype)}')
    end = begin + math.prod(shape) * np.dtype(dtype).itemsize
    fields[name] = {
      'dtype': _CODES[np.dtype(dtype)],
      'shape': list(shape),
      'data_offsets': [begin, end],
    }
    begin = end
  header = json.dumps(fields, separators=(',', ':')).encode()
  # The data starts at a multiple of 8, as every dtype needs.
  header += b' ' * (-len(header) % 8)
  return struct.pack('<Q', len(header)) + header, begin
