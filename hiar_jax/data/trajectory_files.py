"""Files of teacher trajectories: what they hold and whether they are whole.

A set (see `shard_files`) has the files `shard-00000.array_record` and so on. A
record is a safetensors buffer of `index` [], `latents` float16
[S + 1, F, h, w, C], `text` float32 [n, D] without padding and `caption`, UTF-8
bytes.

S student steps, F frames, h w latent rows and columns, C channels, L text
tokens, n of them without padding, D text width.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from array_record.python import array_record_module

from hiar_jax.data import shard_files
from hiar_jax.runtime import files


@dataclasses.dataclass(frozen=True)
class Manifest(shard_files.Manifest):
  """What a folder of trajectories holds and where they came from.

  Attributes:
    seed: of the noise.
    sampler: the TrajectoryConfig.
    levels: that the ODE was stepped through.
    point_levels: of the stored points.
    latents_shape: [S + 1, F, h, w, C] of a trajectory, stored as float16.
    prompts: the source of the prompts and its settings.
    model: the teacher's WanConfig.
    weights_sha256: of the teacher's parameters.
    negative_prompt: what guidance led away from.
    text: identity of the text encoder; '' if not known.
    teacher: digest of the teacher's file; '' if not known.
    version: of this format.

  The others are those of `shard_files.Manifest`.
  """

  elements = 'trajectories'
  program = 'hiar-jax trajectories'
  file_name = 'shard-{:05d}.array_record'

  seed: int
  sampler: dict[str, Any]
  levels: tuple[float, ...]
  point_levels: tuple[float, ...]
  latents_shape: tuple[int, ...]
  prompts: dict[str, Any]
  model: dict[str, Any]
  weights_sha256: str
  negative_prompt: str = ''
  text: str = ''
  teacher: str = ''
  version: int = 1

  def __post_init__(self):
    super().__post_init__()
    # All were Euler's before there was a choice.
    object.__setattr__(self, 'sampler', {'solver': 'euler'} | self.sampler)
    for name in ('levels', 'point_levels', 'latents_shape'):  # JSON has lists.
      object.__setattr__(self, name, tuple(getattr(self, name)))


def pack(
  index: int, latents: np.ndarray, text_LD: np.ndarray, caption: str
) -> bytes:
  """One record.

  Args:
    index: of the trajectory.
    latents: [S + 1, F, h, w, C].
    text_LD: states of its prompt; rows of zeros at the end are left out.
    caption: the prompt.

  Raises:
    ValueError: if the latents are not finite.
  """
  if not np.isfinite(latents).all():
    raise ValueError(f'trajectory {index} is not finite in float16')
  used = np.flatnonzero(text_LD.any(axis=1))
  text_nD = text_LD[: used[-1] + 1 if len(used) else 0]
  return safetensors.numpy.save(
    {
      'index': np.asarray(index, np.int64),
      'latents': np.ascontiguousarray(latents),
      'text': np.ascontiguousarray(text_nD, np.float32),
      'caption': np.array(list(caption.encode()), np.uint8),
    }
  )


def write_shard(path: pathlib.Path, records: Sequence[bytes]) -> None:
  """Writes a file in one move: it is whole or it is not there."""
  with files.whole_file(path) as partial:
    # One record a chunk, so that reading one does not decode its neighbours;
    # noise does not compress.
    writer = array_record_module.ArrayRecordWriter(
      str(partial), 'group_size:1,uncompressed'
    )
    for record in records:
      writer.write(record)
    writer.close()


def verify(directory: str | os.PathLike) -> list[str]:
  """Re-reads every trajectory; returns one sentence for each problem.

  Raises:
    FileNotFoundError, ValueError: as `Manifest.read`.
  """
  directory = pathlib.Path(directory)
  manifest = Manifest.read(directory)
  problems: list[str] = []
  seen: dict[Any, Any] = {}
  for shard in range(manifest.num_files):
    path = manifest.path(directory, shard)
    expected = manifest.indices(shard)
    if not path.exists():
      problems.append(f'{path.name} is missing')
      continue
    try:
      for record in _read_shard(path):
        index, found = _record_problems(record, manifest)
        problems += [f'{path.name}: {problem}' for problem in found]
        if index in seen:
          problems.append(
            f'{path.name}: trajectory {index} is in {seen[index]} as well'
          )
        elif index not in expected:
          problems.append(f'{path.name}: trajectory {index} belongs elsewhere')
        seen[index] = path.name
    except ValueError as error:
      problems.append(str(error))
      continue
    holes = [index for index in expected if seen.get(index) != path.name]
    if holes:
      problems.append(f'{path.name} has no trajectory {holes}')
  known = {manifest.path(directory, i).name for i in range(manifest.num_files)}
  problems += [
    f'{path.name} is not part of the set'
    for path in sorted(directory.glob('shard-*'))
    if path.name not in known
  ]
  return problems


def _read_shard(path: pathlib.Path) -> Iterator[dict[str, np.ndarray]]:
  reader = array_record_module.ArrayRecordReader(str(path))
  try:
    for i in range(reader.num_records()):
      yield safetensors.numpy.load(reader.read([i])[0])
    if not reader.ok():
      raise ValueError(f'{path.name} is torn')
  except (RuntimeError, safetensors.SafetensorError) as error:
    raise ValueError(f'{path.name} is damaged: {error}') from error
  finally:
    if reader.ok():
      reader.close()


def _record_problems(
  record: dict[str, np.ndarray], manifest: Manifest
) -> tuple[int, list[str]]:
  """The index of a record, and what is wrong with its arrays."""
  index, problems = int(record['index']), []
  latents, text = record['latents'], record['text']
  if latents.shape != manifest.latents_shape:
    problems.append(
      f'trajectory {index} has shape {latents.shape}, '
      f'not {manifest.latents_shape}'
    )
  if not (np.isfinite(latents).all() and np.isfinite(text).all()):
    problems.append(f'trajectory {index} is not finite')
  return index, problems
