"""Endless shuffled batches of a source, by grain.

A source gives element i for i, nothing else; grain adds the order. The
iterators are checkpointable (`get_state` / `set_state`, or
`grain.checkpoint`) and restore to the exact next batch, on any number of hosts
(see `batches`).
"""

from typing import Any

import grain
import numpy as np

_ENDLESS = 2**52


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
