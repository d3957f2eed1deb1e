"""Files of encoded videos, for a codec too slow to run in every update.

A set is a folder of `manifest.json` beside `latents-00000.npy` and so on, each
float16 [N, F, h, w, C]. A file gets its name only when it is whole, so a run
that was killed leaves no torn file and the next one goes on with the files
that are missing. Captions are not stored: they follow from (seed, index).

N videos of a file, F latent frames, h w latent rows and columns, C channels.
"""

import collections
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from hiar_jax import codecs, data

_MANIFEST = 'manifest.json'


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a folder of latents holds and where they came from.

  Attributes:
    num: number of videos.
    shard_size: of them in a file; the last file may have fewer.
    world: the WorldConfig.
    world_seed: of the scenes.
    codec_sha256: of the codec's arrays.
  """

  num: int
  shard_size: int
  world: dict[str, Any]
  world_seed: int
  codec_sha256: str

  def __post_init__(self):
    for name in ('num', 'shard_size'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} is not at least 1')

  @property
  def num_files(self) -> int:
    return -(-self.num // self.shard_size)

  def indices(self, shard: int) -> range:
    """The videos of a file."""
    start = shard * self.shard_size
    return range(start, min(start + self.shard_size, self.num))

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self), indent=2) + '\n'


def missing_shards(
  directory: str | os.PathLike, manifest: Manifest
) -> list[int]:
  """The files still to make; starts the folder if there is none.

  Raises:
    ValueError: if the folder holds latents of another manifest.
  """
  directory = pathlib.Path(directory)
  path = directory / _MANIFEST
  if not path.exists():
    directory.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + '.part')
    partial.write_text(manifest.to_json())
    partial.replace(path)
  _check_manifest(path, manifest)
  return [
    shard
    for shard in range(manifest.num_files)
    if not _shard_path(directory, shard).exists()
  ]


def make(
  directory: str | os.PathLike,
  manifest: Manifest,
  videos: data.BouncingVideos,
  codec: Any,
  *,
  batch_size: int,
  progress: Callable[[int], None] = lambda count: None,
) -> None:
  """Encodes what is missing in a folder.

  Args:
    directory: of the set.
    manifest: of the set.
    videos: of its world and seed.
    codec: see `codecs`.
    batch_size: videos encoded at once.
    progress: is told of every batch how many videos it had.

  Raises:
    ValueError: if the folder holds latents of another manifest.
  """
  encode = jax.jit(
    lambda codec, video: codec.encode(codecs.pixels_to_float(video))
  )
  for shard in missing_shards(directory, manifest):
    indices = manifest.indices(shard)
    latents, running = [], collections.deque()
    for start in range(0, len(indices), batch_size):
      batch = indices[start : start + batch_size]
      frames = np.stack([videos[index]['video'] for index in batch])
      # The next batch is drawn while the device encodes this one.
      running.append(encode(codec, frames))
      if len(running) > 1:
        latents.append(np.asarray(running.popleft(), np.float16))
        progress(len(latents[-1]))
    while running:
      latents.append(np.asarray(running.popleft(), np.float16))
      progress(len(latents[-1]))
    path = _shard_path(directory, shard)
    partial = path.with_name(path.name + '.part')
    with partial.open('wb') as file:
      np.save(file, np.concatenate(latents))
    partial.replace(path)


class EncodedVideos:
  """Stored latents with their captions; a grain RandomAccessDataSource."""

  def __init__(
    self,
    directory: str | os.PathLike,
    manifest: Manifest,
    videos: data.BouncingVideos,
  ) -> None:
    """Opens a complete set.

    Args:
      directory: written by `make`.
      manifest: that training expects.
      videos: that were encoded; gives the captions and their dropout.

    Raises:
      FileNotFoundError: if there are no latents, or some are missing.
      ValueError: if they are of another world or codec, or damaged.
    """
    path = pathlib.Path(directory) / _MANIFEST
    if not path.exists():
      raise FileNotFoundError(
        f'no encoded videos in {directory}; launch/encode_videos.py makes them'
      )
    missing = missing_shards(directory, manifest)
    if missing:
      raise FileNotFoundError(
        f'{len(missing)} of {manifest.num_files} latent files are missing in '
        f'{directory}, the first is {_shard_path(directory, missing[0]).name}'
      )
    self._directory = directory
    self._manifest = manifest
    self._videos = videos
    self._shards = [
      _open(_shard_path(directory, shard), len(manifest.indices(shard)))
      for shard in range(manifest.num_files)
    ]

  def __len__(self) -> int:
    return self._manifest.num

  def __repr__(self) -> str:
    return f'EncodedVideos({str(self._directory)!r}, {len(self)})'

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Reads one: `latents` [F, h, w, C] and `text` [L, D], float32."""
    shard, row = divmod(index, self._manifest.shard_size)
    return {
      'latents': self._shards[shard][row].astype(np.float32),
      'text': self._videos.text(index),
    }


def _open(path: pathlib.Path, rows: int) -> np.ndarray:
  try:
    latents = np.load(path, mmap_mode='r', allow_pickle=False)
  except (ValueError, EOFError) as error:
    raise ValueError(f'{path} is damaged ({error})') from error
  if len(latents) != rows:
    raise ValueError(f'{path} is damaged: {len(latents)} videos, not {rows}')
  return latents


def _check_manifest(path: pathlib.Path, manifest: Manifest) -> None:
  try:
    stored = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f'{path} is damaged ({error})') from error
  # Through JSON, which has lists for tuples.
  wanted = json.loads(manifest.to_json())
  changed = [
    f'{name} is {stored.get(name)}, not {value}'
    for name, value in wanted.items()
    if stored.get(name) != value
  ]
  if changed:
    raise ValueError(
      f'{path.parent} holds other latents: ' + '; '.join(changed)
    )


def _shard_path(directory: str | os.PathLike, shard: int) -> pathlib.Path:
  return pathlib.Path(directory) / f'latents-{shard:05d}.npy'
