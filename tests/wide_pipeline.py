"""A pipeline that divides as Wan2.1-T2V-14B does, and one process that runs it.

40 layers of 40 heads, and a feed-forward width with the factors of 13,824; all
else is tiny. Run as a program it makes two blocks on all devices, alone or as
one process of several, keeps the frames and prints what was read:

  python -m tests.wide_pipeline FOLDER FRAMES MESH DEVICES \\
    [HOST:PORT PROCESSES ID]
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.codecs import linear
from hiar_jax.denoiser import Denoiser
from hiar_jax.models.config import WanConfig
from hiar_jax.runtime import distributed
from hiar_jax.sampling import loading
from hiar_jax.weights import safetensors_io
from tests import toy_network

CONFIG = {
  'name': 'wide',
  'model': {
    'dim': 240,
    'ffn_dim': 216,
    'num_heads': 40,
    'num_layers': 40,
    'latent_height': 4,
    'latent_width': 4,
    'channels': 4,
    'freq_dim': 16,
    'text_dim': 16,
    'text_len': 6,
  },
  'text': {'dim': 16, 'length': 6},
  'schedule': {'shift': 5.0, 'indices': (1000, 500)},
  'rollout': {'frames_per_block': 2, 'window': 6, 'sink': 1},
  'generate': {'order': 'step_first', 'fps': 12.0},
  # float32: frames of other meshes differ by the order of sums alone.
  'weights_dtype': 'float32',
}


def write(folder: pathlib.Path) -> None:
  """The pipeline, with random weights none of which is zero, in bfloat16."""
  denoiser = Denoiser(WanConfig(**CONFIG['model']))
  rng = np.random.default_rng(0)
  basis = np.linalg.qr(rng.standard_normal((48, 48)))[0][:, :4]
  codec = linear.LinearCodec(
    mean_P=jnp.zeros(48),
    encoder_PC=jnp.asarray(4 * basis, jnp.float32),
    decoder_CP=jnp.asarray(basis.T / 4, jnp.float32),
    spatial_stride=4,
  )
  loading.export(
    folder,
    config=CONFIG,
    params=toy_network.draw_params(denoiser, 0.05),
    codec=codec,
    dtype='bfloat16',
  )


class Reads:
  """Counts what `safetensors_io.Reader` reads, from when it is made."""

  def __init__(self):
    self.total = self.largest = 0
    depth: list[None] = []  # One of them may call the other.
    for name in ('read', 'read_part'):
      self._count(name, depth)

  def _count(self, name, depth):
    plain = getattr(safetensors_io.Reader, name)

    def counted(reader, *args):
      depth.append(None)
      array = plain(reader, *args)
      depth.pop()
      if not depth:
        self.total += array.nbytes
        self.largest = max(self.largest, array.nbytes)
      return array

    setattr(safetensors_io.Reader, name, counted)


def device_bytes(params) -> int:
  """Of the device of this process that has most."""
  held: dict = {}
  for leaf in jax.tree.leaves(params):
    for shard in leaf.addressable_shards:
      held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
  return max(held.values())


def main(
  folder: str, frames: str, mesh: str, devices: str, *cluster: str
) -> None:
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', int(devices))
  jax.config.update('jax_default_matmul_precision', 'highest')
  if cluster:
    address, processes, process = cluster
    distributed.start(
      distributed.Processes(address, int(processes), int(process)), timeout=300
    )
  reads = Reads()
  pipe = loading.load(folder, mesh=mesh)
  told = {
    'read': reads.total,
    'largest': reads.largest,
    'device': device_bytes(pipe.params),
  }
  with pipe.stream('a red disc over black', seed=3) as stream:
    made = np.concatenate([next(stream) for _ in range(2)], 1)
  np.save(frames, made)
  print(json.dumps(told))


if __name__ == '__main__':
  main(*sys.argv[1:])
