"""Files of encoded videos, for codecs too slow to run in every update.

A set (see `shard_files`) has the files `latents-00000.array_record` and so on.
A record is a safetensors buffer of `index` [] and `latents` float16
[F, h, w, C]. Beside each file lies `captions-00000.jsonl`: a line for each of
its videos with the caption, or with what is wrong with a video that could not
be read and has no record.

F latent frames, h w latent rows and columns, C channels.
"""

import array
import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from hiar_jax.data import array_records, shard_files
from hiar_jax.data import videos as data_videos
from hiar_jax.runtime import files


@dataclasses.dataclass(frozen=True)
class Manifest(shard_files.Manifest):
  """What a folder of latents holds and where they came from.

  Attributes:
    videos: identity of the videos; of each, latents or what is wrong with it.
    codec_sha256: of the codec's arrays.
    shape: [F, h, w, C] of a video's latents, stored as float16.
    version: of this format.

  The others are those of `shard_files.Manifest`.
  """

  elements = 'encoded videos'
  program = 'hiar-jax encode videos'
  file_name = 'latents-{:05d}.array_record'

  videos: dict[str, Any]
  codec_sha256: str
  shape: tuple[int, ...]
  version: int = 1

  def __post_init__(self):
    super().__post_init__()
    object.__setattr__(self, 'shape', tuple(self.shape))  # JSON has lists.


def make(
  directory: str | os.PathLike,
  manifest: Manifest,
  videos: data_videos.Videos,
  encode: Callable[[np.ndarray], Any],
  *,
  batch_size: int,
  num_threads: int = 1,
  shard_index: int = 0,
  num_shards: int = 1,
  progress: Callable[[int], None] = lambda count: None,
  report: Callable[[str], None] = lambda problem: None,
  should_stop: Callable[[], bool] = lambda: False,
) -> bool:
  """Encodes what is missing in a folder.

  A resumed run writes the bytes that an uninterrupted one would have, given the
  same batch size and devices, on any number of processes.

  Args:
    directory: of the set; created if needed.
    manifest: of the set.
    videos: of the manifest.
    encode: uint8 [N, F', H, W, 3] to latents [N, F, h, w, C], see
      `codecs.pixels.encoder`; it may return before they are computed.
    batch_size: videos encoded at once; of a short batch the last is repeated.
    num_threads: that read videos ahead.
    shard_index: this process, in [0, num_shards).
    num_shards: number of processes, which share the files among them and never
      speak with each other.
    progress: is told how many videos were just dealt with.
    report: is told what is wrong with a video that cannot be read; the others
      go on.
    should_stop: asked before every batch; True drops the file under way.

  Returns:
    Whether all were made, and none was stopped.

  Raises:
    ValueError: if the folder has another manifest's videos (naming the fields
      that differ), an argument is out of range, or the codec gives values that
      are not finite in float16.
  """
  for name, value in (('batch_size', batch_size), ('num_threads', num_threads)):
    if value < 1:
      raise ValueError(f'{name}={value} is not at least 1')
  todo = manifest.missing(
    directory, shard_index=shard_index, num_shards=num_shards
  )
  manifest.settle(directory)
  with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
    for shard in todo:
      lines: list[dict[str, Any]] = []
      records: list[bytes] = []
      running: collections.deque[tuple[list[int], Any]] = collections.deque()
      waiting: list[tuple[int, np.ndarray]] = []
      indices = manifest.indices(shard)
      for index, frames in _read_ahead(pool, videos, indices, num_threads):
        line = {'index': index}
        if isinstance(frames, str):
          report(frames)
          lines.append(line | {'problem': frames})
          progress(1)
        else:
          lines.append(line | {'caption': videos.captions[index]})
          waiting.append((index, frames))
        if len(waiting) == batch_size or (waiting and index == indices[-1]):
          if should_stop():
            return False
          running.append(_start(encode, waiting, batch_size))
          waiting = []
          # The next videos are read while the device encodes these.
          if len(running) > 1:
            records += _finish(running.popleft(), progress)
      while running:
        records += _finish(running.popleft(), progress)
      _write(directory, manifest, shard, lines, records)
  return True


class EncodedVideos:
  """Latents of a folder by number: float32 [F, h, w, C].

  Videos that could not be read are not among them.

  Attributes:
    captions: caption i is that of element i.
    manifest: of the folder.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    expected: dict[str, Any] | None = None,
  ) -> None:
    """Opens a complete set.

    Args:
      directory: written by `make`.
      expected: fields of the manifest as training expects them.

    Raises:
      FileNotFoundError: if there are no latents, or some are missing.
      ValueError: if they are of other videos or another codec (naming what
        differs), or damaged, or no video could be read.
    """
    self.manifest = Manifest.read(directory)
    dataclasses.replace(self.manifest, **(expected or {})).check_complete(
      directory
    )
    self._directory = directory
    shards = range(self.manifest.num_files)
    self._records = array_records.open_source(
      [self.manifest.path(directory, shard) for shard in shards]
    )
    self.captions = _StoredCaptions(
      [_captions_path(directory, shard) for shard in shards]
    )
    if len(self._records) != len(self.captions):
      raise ValueError(
        f'latents in {directory} are damaged: {len(self._records)} records for '
        f'{len(self.captions)} captions'
      )
    if not len(self):
      raise ValueError(f'{directory} has no latents: no video could be read')

  def __len__(self) -> int:
    return len(self._records)

  def __repr__(self) -> str:
    return f'EncodedVideos({str(self._directory)!r}, {len(self)})'

  def __getitem__(self, index: int) -> np.ndarray:
    try:
      latents = safetensors.numpy.load(self._records[index])['latents']
    except (RuntimeError, safetensors.SafetensorError) as error:
      raise ValueError(
        f'latents {index} in {self._directory} are damaged: {error}'
      ) from error
    return latents.astype(np.float32)

  def identity(self) -> dict[str, Any]:
    return {
      'videos': self.manifest.videos,
      'codec_sha256': self.manifest.codec_sha256,
      'num': len(self),
    }


class _StoredCaptions:
  """Captions beside latents; see `prompts.Prompts`. 24 bytes each in memory."""

  def __init__(self, paths: list[pathlib.Path]):
    self._paths = paths
    self._places = [array.array('q') for _ in range(3)]
    digest = hashlib.sha256()
    for number, path in enumerate(paths):
      start = 0
      for line in _lines(path):
        caption = _parse(path, line).get('caption')
        if caption is not None:
          told = caption.encode()
          digest.update(b'%d\n%s' % (len(told), told))
          for place, value in zip(self._places, (number, start, len(line))):
            place.append(value)
        start += len(line)
    self._sha256 = digest.hexdigest()

  def __len__(self) -> int:
    return len(self._places[0])

  def __getitem__(self, index: int) -> str:
    number, start, size = (place[index] for place in self._places)
    path = self._paths[number]
    with path.open('rb') as file:
      file.seek(start)
      return _parse(path, file.read(size))['caption']

  def identity(self) -> dict[str, Any]:
    return {'source': 'latents', 'num': len(self), 'sha256': self._sha256}


def problems(directory: str | os.PathLike) -> list[str]:
  """What is wrong with the videos that have no latents, a sentence each."""
  manifest = Manifest.read(directory)
  return [
    line['problem']
    for shard in range(manifest.num_files)
    if (path := _captions_path(directory, shard)).exists()
    for line in (_parse(path, line) for line in _lines(path))
    if 'problem' in line
  ]


def verify(directory: str | os.PathLike) -> list[str]:
  """Re-reads all latents; returns one sentence for each problem.

  Videos that could not be read are none: see `problems`.

  Raises:
    FileNotFoundError, ValueError: as `Manifest.read`.
  """
  manifest = Manifest.read(directory)
  found = []
  for shard in range(manifest.num_files):
    path = manifest.path(directory, shard)
    if not path.exists():
      found.append(f'{path.name} is missing')
      continue
    try:
      listed = [
        (line['index'], 'caption' in line)
        for line in (
          _parse(_captions_path(directory, shard), line)
          for line in _lines(_captions_path(directory, shard))
        )
      ]
      if [index for index, _ in listed] != list(manifest.indices(shard)):
        found.append(
          f'{_captions_path(directory, shard).name} has not the captions of '
          f'{path.name}'
        )
      seen = []
      for index, latents in _read_shard(path):
        seen.append(index)
        if latents.shape != manifest.shape:
          found.append(
            f'{path.name}: latents {index} have shape {latents.shape}, not '
            f'{manifest.shape}'
          )
        if not np.isfinite(latents).all():
          found.append(f'{path.name}: latents {index} are not finite')
      if seen != [index for index, good in listed if good]:
        found.append(f'{path.name} has not the latents of its captions')
    except (OSError, ValueError) as error:
      found.append(str(error))
  return found


def _read_ahead(
  pool: concurrent.futures.Executor,
  videos: data_videos.Videos,
  indices: range,
  ahead: int,
) -> Iterator[tuple[int, np.ndarray | str]]:
  """Each video's number and frames, in order, or what is wrong with it."""

  def read(index):
    try:
      return videos[index]
    except (OSError, ValueError) as error:
      return str(error)

  running: collections.deque[
    tuple[int, concurrent.futures.Future[np.ndarray | str]]
  ] = collections.deque()
  for index in indices:
    running.append((index, pool.submit(read, index)))
    if len(running) > ahead:
      first, future = running.popleft()
      yield first, future.result()
  for index, future in running:
    yield index, future.result()


def _start(encode, waiting, batch_size):
  indices = [index for index, _ in waiting]
  frames = [frames for _, frames in waiting]
  # One compiled program.
  frames += frames[-1:] * (batch_size - len(frames))
  return indices, encode(np.stack(frames))


def _finish(
  batch: tuple[list[int], Any], progress: Callable[[int], Any]
) -> list[bytes]:
  indices, latents = batch
  # What is beyond float16 becomes infinite, and is refused.
  with np.errstate(over='ignore'):
    latents = np.asarray(latents)[: len(indices)].astype(np.float16)
  records = []
  for index, one in zip(indices, latents):
    if not np.isfinite(one).all():
      raise ValueError(f'the latents of video {index} are not finite')
    record = {
      'index': np.asarray(index, np.int64),
      'latents': np.ascontiguousarray(one),
    }
    records.append(safetensors.numpy.save(record))
  progress(len(indices))
  return records


def _write(
  directory: str | os.PathLike,
  manifest: Manifest,
  shard: int,
  lines: list[dict[str, Any]],
  records: list[bytes],
) -> None:
  # First: the file of latents is what says that a shard is whole.
  with files.whole_file(_captions_path(directory, shard)) as partial:
    partial.write_text(
      ''.join(json.dumps(line, ensure_ascii=False) + '\n' for line in lines),
      encoding='utf-8',
    )
  array_records.write(manifest.path(directory, shard), records)


def _captions_path(directory: str | os.PathLike, shard: int) -> pathlib.Path:
  return pathlib.Path(directory) / f'captions-{shard:05d}.jsonl'


def _lines(path: pathlib.Path) -> list[bytes]:
  return path.read_bytes().splitlines(keepends=True)


def _parse(path: pathlib.Path, line: bytes) -> dict[str, Any]:
  try:
    value = json.loads(line)
  except ValueError as error:
    raise ValueError(f'{path} is damaged: {error}') from error
  if not isinstance(value, dict) or 'index' not in value:
    raise ValueError(f'{path} is damaged: {line[:40]!r}')
  return value


def _read_shard(path: pathlib.Path) -> Iterator[tuple[int, np.ndarray]]:
  for buffer in array_records.read(path):
    try:
      record = safetensors.numpy.load(buffer)
    except safetensors.SafetensorError as error:
      raise ValueError(f'{path.name} is damaged: {error}') from error
    yield int(record['index']), record['latents']
