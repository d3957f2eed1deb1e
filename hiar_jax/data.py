"""Grain pipelines over the bouncing world: captioned videos, and prompts alone.

A source makes element i from (seed, i), nothing else; grain adds the order.
The iterators are checkpointable (`get_state` / `set_state`, or
`grain.checkpoint`) and restore to the exact next batch.

B batch, F frames, H height, W width, L words, D text width.
"""

import dataclasses

import grain
import numpy as np

from hiar_jax import text, worlds

# Told apart from the Philox stream of the scene, which starts at counter 0.
_DROPOUT_STREAM = 1


@dataclasses.dataclass(frozen=True)
class BouncingPrompts:
  """Encoded captions of a world's scenes; a grain RandomAccessDataSource.

  Attributes:
    world: what the scenes are drawn from.
    encoder: encodes the captions.
    seed: of the scenes; another seed is another (held-out) set.
    length: number of elements.
  """

  world: worlds.WorldConfig
  encoder: text.WordHashEncoder
  seed: int
  length: int = 2**20

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Makes element `index`: {'text': float32 [L, D]}."""
    return {'text': self.encoder.encode([self.scene(index).caption])[0]}

  def scene(self, index: int) -> worlds.Scene:
    """The truth, caption included, of element `index`."""
    return worlds.sample_scene(self.world, self.seed, index)


@dataclasses.dataclass(frozen=True)
class BouncingVideos:
  """Captioned videos of a world; a grain RandomAccessDataSource.

  Attributes:
    world: what the scenes are drawn from.
    encoder: encodes the captions.
    seed: of the scenes; another seed is another (held-out) set.
    caption_dropout: share of the elements whose text is all zeros, which
      teaches the model the unconditional video (classifier-free guidance).
      Which ones depends on the seed and the index only.
    with_truth: also return the scene's numbers.
    length: number of elements.
  """

  world: worlds.WorldConfig
  encoder: text.WordHashEncoder
  seed: int
  caption_dropout: float = 0.0
  with_truth: bool = False
  length: int = 2**20

  def __post_init__(self):
    if not 0.0 <= self.caption_dropout <= 1.0:
      raise ValueError(
        f'caption_dropout={self.caption_dropout} must be in [0, 1]'
      )

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, index: int) -> dict[str, object]:
    """Makes element `index`.

    Returns:
      A dict of `video`, uint8 [F, H, W, 3], and `text`, float32 [L, D]. With
      truth also `truth`, a dict of float32 arrays: `positions` [F, 2] in px
      (y, x), `rgb` [3] and `background_rgb` [3] in [0, 255], `radius` [] in
      px, `speed` [] in px per frame.
    """
    scene = self.scene(index)
    caption = '' if self._drops_caption(index) else scene.caption
    element = {
      'video': worlds.render(scene, self.world),
      'text': self.encoder.encode([caption])[0],
    }
    if self.with_truth:
      names = ('positions', 'rgb', 'background_rgb', 'radius', 'speed')
      element['truth'] = {
        name: np.asarray(getattr(scene, name), np.float32) for name in names
      }
    return element

  def scene(self, index: int) -> worlds.Scene:
    """The truth, caption included, of element `index`."""
    return worlds.sample_scene(self.world, self.seed, index)

  def _drops_caption(self, index: int) -> bool:
    bits = np.random.Philox(
      key=np.array([self.seed, index], np.uint64),
      counter=np.array([0, 0, 0, _DROPOUT_STREAM], np.uint64),
    )
    return np.random.Generator(bits).random() < self.caption_dropout


def video_batches(
  source: BouncingVideos,
  *,
  batch_size: int,
  seed: int,
  shard_index: int = 0,
  num_shards: int = 1,
  num_threads: int = 1,
) -> grain.DatasetIterator:
  """Endless shuffled batches of videos.

  Args:
    source: the videos.
    batch_size: per shard.
    seed: of the order, in [0, 2**32); every epoch has another order.
    shard_index: this host, in [0, num_shards).
    num_shards: number of hosts; shards are disjoint and together the whole.
    num_threads: that render ahead; 0 renders in the caller's thread. Neither
      the batches nor the restored state depend on it.

  Returns:
    A checkpointable iterator over the elements of `source` with a leading
    axis B.

  Raises:
    ValueError: if the shard, the batch size or the seed is out of range.
  """
  return batches(
    source,
    batch_size=batch_size,
    seed=seed,
    shard_index=shard_index,
    num_shards=num_shards,
    num_threads=num_threads,
  )


def prompt_batches(
  source: BouncingPrompts,
  *,
  batch_size: int,
  seed: int,
  shard_index: int = 0,
  num_shards: int = 1,
  num_threads: int = 1,
) -> grain.DatasetIterator:
  """Endless shuffled batches of prompts; arguments as for `video_batches`."""
  return batches(
    source,
    batch_size=batch_size,
    seed=seed,
    shard_index=shard_index,
    num_shards=num_shards,
    num_threads=num_threads,
  )


def batches(
  source: grain.sources.RandomAccessDataSource,
  *,
  batch_size: int,
  seed: int,
  shard_index: int = 0,
  num_shards: int = 1,
  num_threads: int = 1,
) -> grain.DatasetIterator:
  """Endless shuffled batches of any source; see `video_batches`."""
  if not 0 <= shard_index < num_shards:
    raise ValueError(
      f'shard_index={shard_index} must be in [0, num_shards={num_shards})'
    )
  if not 1 <= batch_size <= len(source) // num_shards:
    raise ValueError(
      f'batch_size={batch_size} must be in [1, {len(source) // num_shards}], '
      'the number of elements of a shard'
    )
  if not 0 <= seed < 2**32:
    raise ValueError(f'seed={seed} must be in [0, 2**32)')
  # Sharded before the shuffle: hosts stay disjoint in every epoch. Repeated
  # before the batch: no batch is short, an epoch's end runs into the next.
  elements = grain.MapDataset.source(source)[shard_index::num_shards]
  in_order = elements.seed(seed).shuffle().repeat().batch(batch_size)
  # The buffer holds whole batches; a few are enough to hide the rendering.
  reading = grain.ReadOptions(
    num_threads=num_threads, prefetch_buffer_size=4 * num_threads
  )
  return iter(in_order.to_iter_dataset(reading))
