"""Streams very many blocks of a tiny network and watches the memory.

  python tests/sampling/endless_stream.py --num_blocks 10000

Prints the resident memory every thousand blocks. Ends with status 1 if it grows
by more than the bound after the first thousand, in which XLA and the allocator
settle. Linux only: the numbers are those of /proc/self/status.
"""

import argparse
import pathlib
import re
import sys
import time

import jax
import numpy as np

from hiar_jax import noise_schedule, rollout
from hiar_jax.denoiser import Denoiser
from hiar_jax.models.config import WanConfig
from hiar_jax.sampling import streaming


class _PlainCodec:
  """Hands latents out as they are; decoding is not what is looked at."""

  def init_decode_state(self, batch_size):
    return ()

  def decode_stream(self, state, latents):
    return latents, state


jax.tree_util.register_static(_PlainCodec)


def make_stream(mode: str) -> streaming.Stream:
  """A stream of one prompt from a network that was never trained."""
  denoiser = Denoiser(
    WanConfig(
      dim=16,
      ffn_dim=16,
      num_heads=1,
      num_layers=1,
      latent_height=2,
      latent_width=2,
      channels=4,
      freq_dim=16,
      text_dim=8,
      text_len=4,
    )
  )
  config = rollout.RolloutConfig(
    levels=noise_schedule.warped_levels((1000, 500), 5.0),
    window=6,
    sink=1,
    context='shared' if mode == 'shared' else 'matched',
  )
  return streaming.Stream(
    streaming.Engine(denoiser, config, mode),
    denoiser.init(jax.random.key(0)),
    _PlainCodec(),
    lambda prompts: np.full((len(prompts), 4, 8), 0.1, np.float32),
    ['a'],
    jax.random.split(jax.random.key(1), 1),
  )


def resident_mib() -> float:
  """Resident memory of this process, MiB."""
  status = pathlib.Path('/proc/self/status').read_text()
  return int(re.search(r'VmRSS:\s+(\d+) kB', status)[1]) / 1024


def watch(
  stream, *, num_blocks: int, every: int, bound_mib: float, clock=time.monotonic
) -> float:
  """Takes the blocks and prints a table of the memory.

  Args:
    stream: an iterator of blocks.
    num_blocks: blocks to take, a multiple of `every`.
    every: blocks between two lines; the first of them are the warm-up.
    bound_mib: growth that is printed as too much.
    clock: seconds.

  Returns:
    How much the memory has grown at most since the first line, MiB.
  """
  print('blocks  RSS MiB  since first  blocks/s')
  first, growth, started = None, 0.0, clock()
  for block in range(1, num_blocks + 1):
    next(stream)
    if block % every:
      continue
    now = resident_mib()
    first = now if first is None else first
    growth = max(growth, now - first)
    rate = block / (clock() - started)
    print(f'{block:6} {now:8.1f} {now - first:12.1f} {rate:9.1f}', flush=True)
  print(f'grew by {growth:.1f} MiB at most; the bound is {bound_mib:g} MiB')
  return growth


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--num_blocks', type=int, default=10_000)
  parser.add_argument('--every', type=int, default=1_000)
  parser.add_argument('--bound_mib', type=float, default=8.0)
  parser.add_argument('--mode', choices=streaming.MODES, default='batched')
  options = parser.parse_args()
  if options.every < 1 or options.num_blocks < 2 * options.every:
    parser.error('--num_blocks must be at least twice --every, from 1 on')
  jax.config.update('jax_platforms', 'cpu')
  growth = watch(
    make_stream(options.mode),
    num_blocks=options.num_blocks,
    every=options.every,
    bound_mib=options.bound_mib,
  )
  return int(growth > options.bound_mib)


if __name__ == '__main__':
  sys.exit(main())
