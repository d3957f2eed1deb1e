"""Files of teacher trajectories: what they hold and whether they are whole.

A set is a folder of `manifest.json` beside `shard-00000.array_record` and so
on. A shard gets its name only when it is whole, so a killed run leaves no torn
file and the next one goes on with the shards that are missing. A record is a
safetensors buffer of `index` [], `latents` float16 [S + 1, F, h, w, C], `text`
float32 [L, D] and `caption`, UTF-8 bytes.

S student steps, F frames, h w latent rows and columns, C channels, L text
tokens, D text width.
"""

import dataclasses
import json
import os
import pathlib
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from array_record.python import array_record_module

from hiar_jax import provenance

_MANIFEST = 'manifest.json'


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a folder of trajectories holds and where they came from.

  Attributes:
    num: number of trajectories.
    shard_size: of them in a file; the last file may have fewer.
    seed: of the noise.
    sampler: the TrajectoryConfig.
    levels: that the ODE was stepped through.
    point_levels: of the stored points.
    latents_shape: [S + 1, F, h, w, C] of a trajectory, stored as float16.
    prompts: the source of the prompts and its settings.
    model: the teacher's WanConfig.
    weights_sha256: of the teacher's parameters.
    version: of this format.
  """

  num: int
  shard_size: int
  seed: int
  sampler: dict[str, Any]
  levels: tuple[float, ...]
  point_levels: tuple[float, ...]
  latents_shape: tuple[int, ...]
  prompts: dict[str, Any]
  model: dict[str, Any]
  weights_sha256: str
  version: int = 1

  def __post_init__(self):
    for name in ('num', 'shard_size'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} is not at least 1')

  @property
  def num_files(self) -> int:
    return -(-self.num // self.shard_size)

  def indices(self, shard: int) -> range:
    """The trajectories of a shard."""
    start = shard * self.shard_size
    return range(start, min(start + self.shard_size, self.num))


def read_manifest(directory: str | os.PathLike) -> Manifest:
  """Reads `manifest.json`.

  Raises:
    FileNotFoundError: if there is none.
    ValueError: if it is damaged or of another version.
  """
  path = pathlib.Path(directory) / _MANIFEST
  try:
    fields = json.loads(path.read_bytes())
  except FileNotFoundError:
    raise FileNotFoundError(f'no trajectories in {directory}') from None
  except ValueError as error:
    raise ValueError(f'{path} is damaged: {error}') from error
  names = [field.name for field in dataclasses.fields(Manifest)]
  if not isinstance(fields, dict) or fields.keys() != set(names):
    raise ValueError(f'{path} is not a manifest with the fields {names}')
  for name in ('levels', 'point_levels', 'latents_shape'):
    fields[name] = tuple(fields[name])
  return Manifest(**fields)


def settle_manifest(directory: str | os.PathLike, manifest: Manifest) -> None:
  """Writes the manifest, or checks that the folder's own is the same.

  Raises:
    ValueError: naming the fields that differ.
  """
  directory = pathlib.Path(directory)
  path = directory / _MANIFEST
  directory.mkdir(parents=True, exist_ok=True)
  if path.exists():
    stored = read_manifest(directory)
    # A set of whole files may grow: what it has stays as it is.
    grows = manifest.num > stored.num and stored.num % stored.shard_size == 0
    changed = provenance.config_differences(
      dataclasses.asdict(stored),
      dataclasses.asdict(manifest),
      ignore=('num',) if grows else (),
    )
    if changed:
      raise ValueError(
        f'{directory} has other trajectories: {"; ".join(changed)}'
      )
    if not grows:
      return
  partial = _partial(path)
  partial.write_text(json.dumps(dataclasses.asdict(manifest), indent=1))
  partial.replace(path)


def missing_shards(
  directory: str | os.PathLike,
  manifest: Manifest,
  *,
  shard_index: int = 0,
  num_shards: int = 1,
) -> list[int]:
  """The files that process `shard_index` of `num_shards` has yet to write.

  Raises:
    ValueError: if shard_index is not in [0, num_shards).
  """
  if not 0 <= shard_index < num_shards:
    raise ValueError(
      f'shard_index={shard_index} must be in [0, num_shards={num_shards})'
    )
  return [
    shard
    for shard in range(shard_index, manifest.num_files, num_shards)
    if not shard_path(directory, shard).exists()
  ]


def shard_path(directory: str | os.PathLike, shard: int) -> pathlib.Path:
  return pathlib.Path(directory) / f'shard-{shard:05d}.array_record'


def pack(
  index: int, latents: np.ndarray, text_LD: np.ndarray, caption: str
) -> bytes:
  """One record.

  Raises:
    ValueError: if the latents are not finite.
  """
  if not np.isfinite(latents).all():
    raise ValueError(f'trajectory {index} is not finite in float16')
  return safetensors.numpy.save(
    {
      'index': np.asarray(index, np.int64),
      'latents': np.ascontiguousarray(latents),
      'text': np.ascontiguousarray(text_LD, np.float32),
      'caption': np.array(list(caption.encode()), np.uint8),
    }
  )


def _partial(path: pathlib.Path) -> pathlib.Path:
  """The name of a file until it is whole, another one for every process.

  By host as well: in containers on one shared disk all have the same number.
  """
  return path.with_name(
    f'{path.name}.{socket.gethostname()}-{os.getpid()}.part'
  )


def write_shard(path: pathlib.Path, records: Sequence[bytes]) -> None:
  """Writes a file in one move: it is whole or it is not there."""
  partial = _partial(path)
  try:
    # One record a chunk, so that reading one does not decode its neighbours;
    # noise does not compress.
    writer = array_record_module.ArrayRecordWriter(
      str(partial), 'group_size:1,uncompressed'
    )
    for record in records:
      writer.write(record)
    writer.close()
    with partial.open('rb') as file:
      os.fsync(file.fileno())
    partial.replace(path)
  except FileNotFoundError:
    # Another process with the same share was first, and cleaned up below.
    if not path.exists():
      raise
  finally:
    # Those of killed processes as well.
    for leftover in path.parent.glob(f'{path.name}.*.part'):
      leftover.unlink(missing_ok=True)


def verify(directory: str | os.PathLike) -> list[str]:
  """Re-reads every trajectory; returns one sentence for each problem.

  Raises:
    FileNotFoundError, ValueError: as `read_manifest`.
  """
  directory = pathlib.Path(directory)
  manifest = read_manifest(directory)
  problems, seen = [], {}
  for shard in range(manifest.num_files):
    path = shard_path(directory, shard)
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
  known = {shard_path(directory, i).name for i in range(manifest.num_files)}
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
