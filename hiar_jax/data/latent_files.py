"""Files of encoded videos, for a codec too slow to run in every update.

A set (see `shard_files`) has the files `latents-00000.npy` and so on, each
float16 [N, F, h, w, C]. Captions are not stored: they follow from (seed,
index).

N videos of a file, F latent frames, h w latent rows and columns, C channels.
"""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from hiar_jax.data import bouncing, shard_files
from hiar_jax.runtime import files


@dataclasses.dataclass(frozen=True)
class Manifest(shard_files.Manifest):
  """What a folder of latents holds and where they came from.

  Attributes:
    world: the WorldConfig.
    world_seed: of the scenes.
    codec_sha256: of the codec's arrays.

  The others are those of `shard_files.Manifest`.
  """

  elements = 'encoded videos'
  program = 'launch/encode_videos.py'
  file_name = 'latents-{:05d}.npy'

  world: dict[str, Any]
  world_seed: int
  codec_sha256: str


def make(
  directory: str | os.PathLike,
  manifest: Manifest,
  videos: bouncing.BouncingVideos,
  encode: Callable[[np.ndarray], Any],
  *,
  batch_size: int,
  progress: Callable[[int], None] = lambda count: None,
  should_stop: Callable[[], bool] = lambda: False,
) -> bool:
  """Encodes what is missing in a folder.

  Args:
    directory: of the set; created if needed.
    manifest: of the set.
    videos: of its world and seed.
    encode: uint8 [N, F, H, W, 3] to latents [N, F', h, w, C], see
      `codecs.pixels.encoder`; it may return before they are computed.
    batch_size: videos encoded at once.
    progress: is told of every batch how many videos it had.
    should_stop: asked before every batch; True drops the file under way.

  Returns:
    Whether all were made, and none was stopped.

  Raises:
    ValueError: if the folder has another manifest's videos, naming the fields
      that differ.
  """
  manifest.settle(directory)
  for shard in manifest.missing(directory):
    indices = manifest.indices(shard)
    latents, running = [], collections.deque()
    for start in range(0, len(indices), batch_size):
      if should_stop():
        return False
      batch = indices[start : start + batch_size]
      frames = np.stack([videos[index]['video'] for index in batch])
      # The next batch is drawn while the device encodes this one.
      running.append(encode(frames))
      if len(running) > 1:
        latents.append(np.asarray(running.popleft(), np.float16))
        progress(len(latents[-1]))
    while running:
      latents.append(np.asarray(running.popleft(), np.float16))
      progress(len(latents[-1]))
    path = manifest.path(directory, shard)
    with files.whole_file(path) as partial, partial.open('wb') as file:
      np.save(file, np.concatenate(latents))
  return True


class EncodedVideos:
  """Stored latents with their captions; a grain RandomAccessDataSource."""

  def __init__(
    self,
    directory: str | os.PathLike,
    manifest: Manifest,
    videos: bouncing.BouncingVideos,
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
    manifest.check_complete(directory)
    self._directory = directory
    self._manifest = manifest
    self._videos = videos
    self._shards = [
      _open(manifest.path(directory, shard), len(manifest.indices(shard)))
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
