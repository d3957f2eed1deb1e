"""Grain pipelines over the bouncing world: captioned videos, and prompts alone.

A source makes element i from (seed, i), nothing else; grain adds the order.
The iterators are checkpointable (`get_state` / `set_state`, or
`grain.checkpoint`) and restore to the exact next batch, on any number of hosts
(see `batches`).

B batch, F frames, H height, W width, L words, D text width.
"""

import dataclasses
from typing import Any

import grain
import numpy as np

from hiar_jax.data import bouncing
from hiar_jax.text import word_hash

# Told apart from the Philox stream of the scene, which starts at counter 0.
_DROPOUT_STREAM = 1
_ENDLESS = 2**52


@dataclasses.dataclass(frozen=True)
class BouncingPrompts:
  """Encoded captions of a world's scenes; a grain RandomAccessDataSource.

  Attributes:
    world: what the scenes are drawn from.
    encoder: encodes the captions.
    seed: of the scenes; another seed is another (held-out) set.
    length: number of elements.
  """

  world: bouncing.WorldConfig
  encoder: word_hash.WordHashEncoder
  seed: int
  length: int = 2**20

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Makes element `index`: {'text': float32 [L, D]}."""
    return {'text': self.encoder.encode([self.scene(index).caption])[0]}

  def scene(self, index: int) -> bouncing.Scene:
    """The truth, caption included, of element `index`."""
    return bouncing.sample_scene(self.world, self.seed, index)


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

  world: bouncing.WorldConfig
  encoder: word_hash.WordHashEncoder
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
    element = {
      'video': bouncing.render(scene, self.world),
      'text': self.text(index),
    }
    if self.with_truth:
      names = ('positions', 'rgb', 'background_rgb', 'radius', 'speed')
      element['truth'] = {
        name: np.asarray(getattr(scene, name), np.float32) for name in names
      }
    return element

  def scene(self, index: int) -> bouncing.Scene:
    """The truth, caption included, of element `index`."""
    return bouncing.sample_scene(self.world, self.seed, index)

  def text(self, index: int) -> np.ndarray:
    """The `text` of element `index`, without drawing its video."""
    caption = '' if self._drops_caption(index) else self.scene(index).caption
    return self.encoder.encode([caption])[0]

  def _drops_caption(self, index: int) -> bool:
    bits = np.random.Philox(
      key=np.array([self.seed, index], np.uint64),
      counter=np.array([0, 0, 0, _DROPOUT_STREAM], np.uint64),
    )
    return np.random.Generator(bits).random() < self.caption_dropout


def batches(
  source: grain.sources.RandomAccessDataSource,
  *,
  batch_size: int,
  seed: int,
  shard_index: int = 0,
  num_shards: int = 1,
  num_threads: int = 1,
) -> grain.DatasetIterator:
  """Endless shuffled batches; each host reads its rows of them.

  All elements are shuffled, cut into batches, and only then shared out: shard s
  has rows [s, s + 1) * batch_size / num_shards of every batch. So batch i is a
  function of (source, seed, batch_size, i), the number of hosts and of threads
  is not in it, and nor is it in the iterator's state, which is i. A state that
  was saved on 2 hosts goes on with the same batches on 1 or 4.

  The guarantee ends with another batch_size, seed or length of the source:
  there the same state names other elements.

  Args:
    source: the elements. Every host must be able to read all of them.
    batch_size: rows of the whole batch, over all hosts.
    seed: of the order, in [0, 2**32); every epoch has another order.
    shard_index: this host, in [0, num_shards), see `sharding.batch_share`.
    num_shards: among how many the rows are shared; divides batch_size.
    num_threads: that read ahead; 0 reads in the caller's thread.

  Returns:
    A checkpointable iterator over the elements of `source` with a leading axis
    of batch_size / num_shards rows. A dict has `index` besides, int64: the
    numbers of the elements.

  Raises:
    ValueError: if the shard, the batch size or the seed is out of range.
  """
  if not 0 <= shard_index < num_shards:
    raise ValueError(
      f'shard_index={shard_index} must be in [0, num_shards={num_shards})'
    )
  if not 1 <= batch_size <= len(source):
    raise ValueError(
      f'batch_size={batch_size} must be in [1, {len(source)}], the number of '
      'elements'
    )
  if batch_size % num_shards:
    raise ValueError(
      f'batch_size={batch_size} is not a multiple of num_shards={num_shards}'
    )
  if not 0 <= seed < 2**32:
    raise ValueError(f'seed={seed} must be in [0, 2**32)')
  # Repeated before the batch: no batch is short, an epoch's end runs into the
  # next. Of an endless row grain cannot take every n-th part.

  def number(index: int, element: Any) -> Any:
    if not isinstance(element, dict):
      return element
    # grain counts on from epoch to epoch.
    return element | {'index': np.int64(index % len(source))}

  numbered = grain.MapDataset.source(source).map_with_index(number)
  shuffled = numbered.seed(seed).shuffle()
  in_order = shuffled.repeat(_ENDLESS // len(source))
  # Hosts' parts one after another are the batch, so every num_shards-th part
  # is this host's, and the index of a part is that of its batch.
  own = in_order.batch(batch_size // num_shards)[shard_index::num_shards]
  # The buffer holds whole batches; a few are enough to hide the rendering.
  reading = grain.ReadOptions(
    num_threads=num_threads, prefetch_buffer_size=4 * num_threads
  )
  return iter(own.to_iter_dataset(reading))
