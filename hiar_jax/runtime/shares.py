"""Shares of work among processes that never speak with each other.

The files of a set are shared out: by hand, with --shard_index and --num_shards,
or by a process's place among those that the flags of `distributed` find.
"""

from typing import NamedTuple

from absl import flags

from hiar_jax.runtime import distributed


class Share(NamedTuple):
  """Process `shard_index`, from 0, of `num_shards`."""

  shard_index: int
  num_shards: int

  def __str__(self) -> str:
    return f'share {self.shard_index} of {self.num_shards}'


def define_flags() -> None:
  """Defines the two flags, and those of `distributed`."""
  flags.DEFINE_integer(
    'shard_index',
    None,
    "This process's share, from 0; default: by its place among the processes.",
    lower_bound=0,
  )
  flags.DEFINE_integer(
    'num_shards',
    None,
    'Number of shares; default: of processes.',
    lower_bound=1,
  )
  distributed.define_flags()


def all_together() -> Share:
  """The one share of processes that do everything together, after joining.

  Raises:
    ValueError: if the flags ask for another share.
    OSError: see `distributed.start`.
  """
  values = flags.FLAGS
  if (values.shard_index or 0, values.num_shards or 1) != (0, 1):
    raise ValueError(
      f'--shard_index={values.shard_index} --num_shards={values.num_shards}: '
      'processes that work together have no shares'
    )
  distributed.start_by_flags()
  return Share(0, 1)


def by_flags() -> Share:
  """This process's share; before jax looks for devices.

  Raises:
    ValueError: if the share is not among the shares.
  """
  values = flags.FLAGS
  index, number = values.shard_index, values.num_shards
  if index is None and number is None:
    processes = distributed.find_by_flags()
    if processes is not None:
      # Each works on its own devices.
      distributed.show_own_devices(processes)
      index, number = processes.process_id, processes.num_processes
  share = Share(index or 0, number or 1)
  if share.shard_index >= share.num_shards:
    raise ValueError(
      f'shard_index={share.shard_index} must be in '
      f'[0, num_shards={share.num_shards})'
    )
  return share
