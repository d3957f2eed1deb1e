"""Stored arrays to where they lie: of each a device's own part.

Part by part: a device gets no more than it holds, and the host has one part at
a time, read from where it lies in the file. What is changed on the way (LoRA
files that are added, 8 bits that it is brought to) is read a layer at a time,
and then the host has its own parts of one array.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from hiar_jax.models import quantised
from hiar_jax.weights import finite, orbax_weights, safetensors_io

Reader = safetensors_io.Reader | orbax_weights.Reader
# Start and end of every axis.
_Bounds = tuple[tuple[int, int], ...]


class Change(Protocol):
  """What is done to arrays on the way, by their paths."""

  def __contains__(self, path: str) -> bool: ...

  def is_stacked(self, path: str) -> bool:
    """Whether it is done layer by layer."""

  def __call__(
    self, path: str, index: int | None, array: np.ndarray
  ) -> np.ndarray:
    """The array, or its layer `index`, changed."""


def stored_names(wanted: Mapping[str, Any]) -> dict[str, Any]:
  """What a file has of it: scales are made, not stored."""
  return {k: v for k, v in wanted.items() if quantised.matrix(k) is None}


def load(
  reader: Reader, wanted: Mapping[str, Any], change: Change | None
) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
  """Reads arrays as they are wanted.

  Args:
    reader: has them, and their shapes are as wanted.
    wanted: path -> array or ShapeDtypeStruct. Values are cast to its dtype; a
      matrix with scales beside it is brought to 8 bits.
    change: of some; None: of none.

  Returns:
    path -> NumPy array, or jax.Array where there is a sharding; and path ->
    (values read that are not finite, all that were read).
  """
  loaded: dict[str, Any] = {}
  counts: dict[str, tuple[int, int]] = {}
  names = stored_names(wanted)
  changed = {k for k in names if change is not None and k in change}
  in_8_bits = {k: s for k in names if (s := _scales_of(k, wanted))}
  plain = {k: v for k, v in names.items() if k not in changed | {*in_8_bits}}
  if isinstance(reader, orbax_weights.Reader):
    loaded |= reader.load(plain)
    counts |= {k: (finite.count(a), a.size) for k, a in loaded.items()}
    plain = {}
  for name, leaf in names.items():
    if name in plain:
      assert isinstance(reader, safetensors_io.Reader)
      loaded[name], counts[name] = _read_parts(reader, name, leaf)
    elif name not in loaded:
      leaves = [leaf]
      if name in in_8_bits:
        leaves.append(wanted[in_8_bits[name]])
      *made, counts[name] = _make(
        reader, name, leaves, change if name in changed else None
      )
      loaded[name] = made[0]
      if name in in_8_bits:
        loaded[in_8_bits[name]] = made[1]
  return loaded, counts


def _scales_of(name: str, wanted: Mapping[str, Any]) -> str | None:
  for in_8_bits in (False, True):
    path = quantised.scale_path(name, in_8_bits=in_8_bits)
    if path in wanted:
      return path
  return None


def _read_parts(
  reader: safetensors_io.Reader, name: str, leaf: Any
) -> tuple[Any, tuple[int, int]]:
  """An array as it is stored, each part read by itself."""
  bad = size = 0

  def parts() -> Iterator[tuple[_Bounds, np.ndarray]]:
    nonlocal bad, size
    for bounds in _places(leaf):
      part = reader.read_part(name, [slice(*ends) for ends in bounds])
      bad, size = bad + finite.count(part), size + part.size
      yield bounds, part.astype(leaf.dtype, copy=False)

  return _put(leaf, parts()), (bad, size)


def _make(
  reader: Reader, name: str, leaves: list[Any], change: Change | None
) -> tuple:
  """An array that is changed, with its scales if they are wanted.

  Returns:
    What is wanted by each of the leaves, and the counts.
  """
  bad = size = 0
  parts: list[dict[_Bounds, np.ndarray]] = [
    {
      bounds: np.empty([end - start for start, end in bounds], leaf.dtype)
      for bounds in _places(leaf)
    }
    for leaf in leaves
  ]
  stacked = len(leaves) > 1 or (change is not None and change.is_stacked(name))
  indices: list[int | None] = [None]
  if stacked:
    indices = list(range(leaves[0].shape[0]))
  for index in indices:
    if index is None:
      array = reader.read(name)
    else:
      array = reader.read(name, slice(index, index + 1))[0]
    bad, size = bad + finite.count(array), size + array.size
    if change is not None:
      array = change(name, index, array)
    made: list[Any] = [array]
    if len(leaves) > 1:
      kind = quantised.kind_of(leaves[0].dtype)
      assert kind is not None, f'{name} has scales and {leaves[0].dtype}'
      stored = quantised.store(array, kind, -2, np)
      made = [stored.numbers, stored.scale]
    for array, filled in zip(made, parts, strict=True):
      for bounds, part in filled.items():
        _fill(part, bounds, array, index)
  arrays = (_put(leaf, iter(own.items())) for leaf, own in zip(leaves, parts))
  return (*arrays, (bad, size))


def _fill(
  part: np.ndarray, bounds: _Bounds, array: np.ndarray, index: int | None
) -> None:
  """Sets a part of an array, or of its layer `index`, from the whole."""
  if index is None:
    part[...] = array[tuple(slice(*ends) for ends in bounds)]
    return
  (start, end), *rest = bounds
  if start <= index < end:
    part[index - start] = array[tuple(slice(*ends) for ends in rest)]


def _places(leaf: Any) -> dict[_Bounds, list[Any]]:
  """The parts that this process holds, and the devices of each."""
  sharding = getattr(leaf, 'sharding', None)
  if sharding is None:
    return {tuple((0, size) for size in leaf.shape): []}
  found: dict[_Bounds, list[Any]] = {}
  indices = sharding.addressable_devices_indices_map(tuple(leaf.shape))
  for device, index in indices.items():
    bounds = tuple(
      one.indices(size)[:2] for one, size in zip(index, leaf.shape)
    )
    found.setdefault(bounds, []).append(device)
  return found


def _put(leaf: Any, parts: Iterator[tuple[_Bounds, np.ndarray]]) -> Any:
  """The array of its parts, each of them let go of when it is in its place."""
  sharding, places = getattr(leaf, 'sharding', None), _places(leaf)
  if sharding is None:
    ((_, array),) = parts
    return array
  shards = []
  for bounds, part in parts:
    # Waited for: the next part would be read before this one is let go.
    shards += [
      jax.device_put(part, device).block_until_ready()
      for device in places[bounds]
    ]
  return jax.make_array_from_single_device_arrays(
    tuple(leaf.shape), sharding, shards
  )
