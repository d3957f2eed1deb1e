"""Memory of converting and loading weights at full size.

  python benchmarks/convert_memory.py --dir /a/disk/with/room
  python benchmarks/convert_memory.py --num_layers 4   # smaller, faster
  python benchmarks/convert_memory.py --format orbax

Writes random bfloat16 weights of Wan2.1-T2V-1.3B under Wan2.1's names,
converts them, loads them, and prints the peak of this process's memory after
each, in GiB. Each part runs in a process of its own.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import jax
import ml_dtypes
import numpy as np

from hiar_jax.models.config import WanConfig
from hiar_jax.weights import (
  conversion,
  identity,
  layouts,
  networks,
  releases,
  safetensors_io,
)

_PARTS = ('nothing', 'create', 'convert', 'load', 'back', 'compare')
_FILE = layouts.FILES['wan']['transformer']


def main():
  """Converts a release and prints the most memory that took."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--dir', help='where to write; default: temporary')
  parser.add_argument('--num_layers', type=int, default=30)
  parser.add_argument(
    '--format', choices=conversion.FORMATS, default='safetensors'
  )
  parser.add_argument('--part', choices=_PARTS, help='one part only')
  args = parser.parse_args()
  config = WanConfig.wan_1_3b(num_layers=args.num_layers)
  if args.part:
    run(args.part, pathlib.Path(args.dir), config, args.format)
    return
  with tempfile.TemporaryDirectory(dir=args.dir) as folder:
    for part in _PARTS:
      subprocess.run(
        [
          *(sys.executable, __file__, '--part', part, '--dir', folder),
          *('--num_layers', str(args.num_layers), '--format', args.format),
        ],
        check=True,
      )


def run(
  part: str, folder: pathlib.Path, config: WanConfig, written: str
) -> None:
  started = time.monotonic()
  extra = (written,) if part == 'convert' else ()
  globals()[f'_{part}'](folder, config, *extra)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  size = sum(f.stat().st_size for f in folder.rglob('*') if f.is_file())
  print(
    f'{part:8} peak {peak:6.2f} GiB, {time.monotonic() - started:6.1f} s, '
    f'{size / 2**30:.2f} GiB on disk',
    flush=True,
  )


def _nothing(folder, config):
  """What Python and jax take by themselves."""
  del folder
  identity.abstract_params(config)


def _create(folder, config):
  slots = identity.expected_slots(config, 'wan')
  dtype = np.dtype(ml_dtypes.bfloat16)
  path = folder / 'in' / _FILE
  path.parent.mkdir()
  rng = np.random.default_rng(0)
  arrays = {name: (slot.shape, dtype) for name, slot in slots.items()}
  with safetensors_io.Writer(path, arrays) as writer:
    for name, slot in slots.items():
      array = rng.standard_normal(slot.shape, np.float32) * 0.02
      writer.write(name, array.astype(dtype))
  (path.parent / 'config.json').write_text(
    json.dumps(layouts.config_of(config, 'wan'))
  )


def _convert(folder, config, written):
  del config
  conversion.to_ours(
    releases.find(folder / 'in'),
    folder / 'ours',
    name='random',
    options=conversion.Options(format=written),
  )


def _load(folder, config):
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, 'bfloat16', sharding=device),
    identity.abstract_params(config),
  )
  file = folder / 'ours' / layouts.OWN_FILES['transformer']
  params = networks.load_weights(file, abstract)
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  print(f'{count:,} parameters', flush=True)


def _back(folder, config):
  del config
  conversion.to_foreign(folder / 'ours', folder / 'out', naming='wan')


def _compare(folder, config):
  del config
  before, after = (
    safetensors_io.Reader(folder / name / _FILE) for name in ('in', 'out')
  )
  assert before.entries.keys() == after.entries.keys()
  for name, entry in before.entries.items():
    assert entry.shape == after.entries[name].shape, name
    bits = [r.read(name).reshape(-1).view(np.uint8) for r in (before, after)]
    np.testing.assert_array_equal(*bits, err_msg=name)


if __name__ == '__main__':
  main()
