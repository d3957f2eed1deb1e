"""Files of text states: prompts that were encoded once, for all of training.

A set (see `shard_files`) has the files `states-00000.array_record` and so on. A
record is a safetensors buffer of `index` [] and `states` [n, D], bfloat16 as
uint16 (the bits). Rows that are zero at the end are padding and not stored:
512 rows of 4096 would be 4 MB a prompt, and few prompts have 100 tokens.

Beside them `captions/` has the states of texts that are no prompt of the set,
such as the negative prompt, each an embeddings file.

B batch, L tokens, n tokens of a prompt without padding, D width.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from hiar_jax.data import array_records, shard_files
from hiar_jax.data import prompts as data_prompts
from hiar_jax.text import embeddings, encoders
from hiar_jax.text import tokens as text_tokens

_CAPTIONS = 'captions'


@dataclasses.dataclass(frozen=True)
class Manifest(shard_files.Manifest):
  """What a folder of text states holds and where they came from.

  Attributes:
    prompts: identity of the prompts; state i is that of prompt i.
    encoder: identity of the encoder.
    length: L, rows of a prompt with its padding.
    dim: D.
    negative_prompt: the encoder's own.
    version: of this format.

  The others are those of `shard_files.Manifest`.
  """

  elements = 'text states'
  program = 'hiar-jax encode prompts'
  file_name = 'states-{:05d}.array_record'

  prompts: dict[str, Any]
  encoder: str
  length: int
  dim: int
  negative_prompt: str
  version: int = 1


def make_manifest(
  prompts: data_prompts.Prompts,
  encoder: encoders.Encoder,
  *,
  num: int,
  shard_size: int,
) -> Manifest:
  """The manifest of a set of states that is about to be made.

  Args:
    prompts: to encode.
    encoder: that encodes them.
    num: of them, from the first on; 0: all.
    shard_size: prompts in a file; a file is kept in memory until it is whole.

  Raises:
    ValueError: if there are fewer prompts, or a number is out of range.
    FileNotFoundError: if the encoder's weights are missing.
  """
  if num > len(prompts):
    raise ValueError(f'num={num} is more than the {len(prompts)} prompts')
  return Manifest(
    num=num or len(prompts),
    shard_size=shard_size,
    prompts=prompts.identity(),
    encoder=encoder.identity,
    length=encoder.length,
    dim=encoder.dim,
    negative_prompt=encoder.negative_prompt,
  )


def make(
  directory: str | os.PathLike,
  manifest: Manifest,
  prompts: data_prompts.Prompts,
  encoder: encoders.Encoder,
  *,
  batch_size: int,
  shard_index: int = 0,
  num_shards: int = 1,
  progress: Callable[[int], None] = lambda count: None,
  should_stop: Callable[[], bool] = lambda: False,
) -> bool:
  """Encodes what is missing in a folder.

  A resumed run writes the bytes that an uninterrupted one would have, given the
  same batch size and devices, on any number of processes.

  Args:
    directory: of the set; created if needed.
    manifest: from `make_manifest`, with the same prompts and encoder.
    prompts: as in the manifest.
    encoder: likewise.
    batch_size: prompts encoded at once.
    shard_index: this process, in [0, num_shards).
    num_shards: number of processes, which share the files among them and never
      speak with each other.
    progress: is told of every batch how many prompts it had.
    should_stop: asked before every batch; True drops the file under way.

  Returns:
    Whether all were made, and none was stopped.

  Raises:
    ValueError: if the folder has another manifest's states (naming the fields
      that differ), an argument is out of range, or the encoder gives values
      that are not finite.
  """
  if batch_size < 1:
    raise ValueError(f'batch_size={batch_size} is not at least 1')
  todo = manifest.missing(
    directory, shard_index=shard_index, num_shards=num_shards
  )
  manifest.settle(directory)
  for shard in todo:
    indices = manifest.indices(shard)
    captions = {index: prompts[index] for index in indices}
    # Like lengths together: a batch is padded to its longest.
    by_length = sorted(indices, key=lambda index: len(captions[index]))
    records = {}
    for start in range(0, len(by_length), batch_size):
      if should_stop():
        return False
      rows = by_length[start : start + batch_size]
      # One compiled program: a short batch repeats its last row.
      padded = [*rows, *rows[-1:] * (batch_size - len(rows))]
      states = encoder.encode([captions[index] for index in padded])
      for index, states_LD in zip(rows, states):
        records[index] = _pack(index, states_LD)
      progress(len(rows))
    path = manifest.path(directory, shard)
    array_records.write(path, (records[index] for index in indices))
  return True


def count_cut(
  prompts: data_prompts.Prompts,
  encoder: encoders.Encoder,
  indices: Iterable[int],
) -> tuple[int, int]:
  """How many of these prompts are too long, and by how many tokens in all."""
  # A token is a byte at least, so that few have to be looked at.
  cuts = [
    encoder.num_cut(caption)
    for caption in map(prompts.__getitem__, indices)
    if len(caption.encode()) >= encoder.length
  ]
  return sum(cut > 0 for cut in cuts), sum(cuts)


def add_captions(
  directory: str | os.PathLike,
  encoder: encoders.Encoder,
  captions: Sequence[str],
) -> int:
  """Encodes texts that are no prompts of the set, if they are not there yet.

  Args:
    directory: of the set.
    encoder: of the set.
    captions: such as the negative prompt, and the empty caption.

  Returns:
    How many were encoded.
  """
  folder = pathlib.Path(directory) / _CAPTIONS
  count = 0
  for caption in map(text_tokens.clean, captions):
    name = hashlib.sha256(caption.encode()).hexdigest()[:32]
    path = folder / f'{name}.safetensors'
    if path.exists():
      continue
    states_nD = _unpadded(encoder.encode([caption])[0])
    embeddings.write(
      path,
      embeddings.Embeddings(
        caption, encoder.length, encoder.identity, states_nD
      ),
    )
    count += 1
  return count


class StoredEncoder:
  """An encoder that knows texts of a folder and no others.

  See `encoders.Encoder`, which it stands in for while training runs: the
  weights of the one that made the states need not be there.
  """

  def __init__(self, directory: str | os.PathLike):
    """Reads the manifest and the headers of the texts beside the set.

    Raises:
      FileNotFoundError: if there are no states.
      ValueError: if a file is damaged or of another encoder.
    """
    manifest = Manifest.read(directory)
    self.dim, self.length = manifest.dim, manifest.length
    self.identity = manifest.encoder
    self.negative_prompt = manifest.negative_prompt
    self._directory = directory
    self._known = embeddings.EmbeddedPrompts(
      pathlib.Path(directory) / _CAPTIONS
    )
    if self._known.encoder != self.identity:
      raise ValueError(
        f'{directory}/{_CAPTIONS} has states of another encoder than the set: '
        f'{self._known.encoder}, not {self.identity}; delete the folder'
      )

  def encode(self, captions: Sequence[str]) -> np.ndarray:
    """States of captions: float32 [B, L, D].

    Raises:
      ValueError: naming a caption that is not in the folder.
    """
    try:
      return self._known.encode(captions)
    except ValueError as error:
      raise ValueError(f'{error}; {Manifest.program} adds it') from None

  def num_cut(self, caption: str) -> int:
    """Not known any more: 0."""
    del caption
    return 0

  def prepare(self, caption: str) -> dict[str, np.ndarray]:
    """{'text': float32 [L, D]} of a caption that is in the folder."""
    return {'text': self.encode([caption])[0]}

  def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
    return batch


class StoredStates:
  """States of prompts by number, read from files; `training.inputs.States`."""

  def __init__(
    self, directory: str | os.PathLike, prompts: data_prompts.Prompts
  ):
    """Opens a complete set.

    Args:
      directory: written by `make`.
      prompts: that training expects.

    Raises:
      FileNotFoundError: if there are no states, or some are missing.
      ValueError: if they are of other prompts (naming what differs), or
        damaged.
    """
    self._manifest = manifest = Manifest.read(directory)
    dataclasses.replace(manifest, prompts=prompts.identity()).check_complete(
      directory
    )
    self._directory = directory
    self._records = array_records.open_source(
      [manifest.path(directory, shard) for shard in range(manifest.num_files)]
    )
    if len(self._records) != len(self):
      raise ValueError(
        f'text states in {directory} are damaged: {len(self._records)} records '
        f'for {len(self)} prompts'
      )

  def __len__(self) -> int:
    return self._manifest.num

  def __repr__(self) -> str:
    return f'StoredStates({str(self._directory)!r}, {len(self)})'

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """{'text': float32 [L, D]}, zeros at padding."""
    try:
      found, states_nD = _unpack(self._records[index])
    except (RuntimeError, ValueError) as error:
      raise ValueError(
        f'text states {index} in {self._directory} are damaged: {error}'
      ) from error
    if found != index:
      raise ValueError(
        f'text states {index} in {self._directory} are those of prompt {found}'
      )
    missing = self._manifest.length - len(states_nD)
    return {'text': np.pad(states_nD, ((0, missing), (0, 0)))}

  def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
    return batch

  def identity(self) -> dict[str, Any]:
    return {
      'prompts': self._manifest.prompts,
      'encoder': self._manifest.encoder,
    }


def verify(directory: str | os.PathLike) -> list[str]:
  """Re-reads all states; returns one sentence for each problem.

  Raises:
    FileNotFoundError, ValueError: as `Manifest.read`.
  """
  manifest = Manifest.read(directory)
  problems = []
  for shard in range(manifest.num_files):
    path = manifest.path(directory, shard)
    if not path.exists():
      problems.append(f'{path.name} is missing')
      continue
    seen = []
    try:
      for index, states_nD in _read_shard(path):
        seen.append(index)
        rows, width = states_nD.shape
        if width != manifest.dim or rows > manifest.length:
          problems.append(
            f'{path.name}: states {index} are {rows}x{width}, not at most '
            f'{manifest.length}x{manifest.dim}'
          )
        if not np.isfinite(states_nD).all():
          problems.append(f'{path.name}: states {index} are not finite')
    except ValueError as error:
      problems.append(str(error))
      continue
    expected = list(manifest.indices(shard))
    if seen != expected:
      problems.append(
        f'{path.name} has not the states {expected[0]} to {expected[-1]} in '
        'their order'
      )
  return problems


def _read_shard(path: pathlib.Path) -> Iterator[tuple[int, np.ndarray]]:
  for record in array_records.read(path):
    try:
      yield _unpack(record)
    except ValueError as error:
      raise ValueError(f'{path.name} is damaged: {error}') from error


def _unpadded(states_LD: np.ndarray) -> np.ndarray:
  """Without the rows of zeros at the end."""
  used = np.flatnonzero(states_LD.any(axis=1))
  return states_LD[: used[-1] + 1 if len(used) else 0]


def _pack(index: int, states_LD: np.ndarray) -> bytes:
  if not np.isfinite(states_LD).all():
    raise ValueError(f'the states of prompt {index} are not finite')
  states_nD = _unpadded(states_LD).astype(ml_dtypes.bfloat16)
  return safetensors.numpy.save(
    {
      'index': np.asarray(index, np.int64),
      'states': np.ascontiguousarray(states_nD).view(np.uint16),
    }
  )


def _unpack(record: bytes) -> tuple[int, np.ndarray]:
  """Number and float32 states [n, D] of a record."""
  try:
    arrays = safetensors.numpy.load(record)
  except safetensors.SafetensorError as error:
    raise ValueError(str(error)) from error
  states_nD = arrays['states'].view(ml_dtypes.bfloat16)
  return int(arrays['index']), states_nD.astype(np.float32)
