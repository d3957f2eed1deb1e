"""How fast Wan2.1-1.3B makes 480x832 video here, and where the time goes.

  python benchmarks/gpu.py                       # full size, random weights
  python benchmarks/gpu.py --minutes=8 --json=gpu.json     # as far as that goes
  python benchmarks/gpu.py --cases=step_first:wan,stream_serial:none
  python benchmarks/gpu.py --size=tiny --repetitions=2      # seconds, on a CPU

Every case is a process of its own, so that its peak memory is its own, with
random bfloat16 weights: what is measured does not depend on their values.
Each compiles in a first run that is not counted; times are medians of the
repetitions after it. The processes share a compilation cache, the most wanted
case comes first, every line is out as soon as it is known, and what does not
fit into `--minutes` is skipped. jax, numpy, flax, absl and safetensors are all
that it needs, and optax for training: no video or data library is imported.

  numerics            the largest difference of this machine's attention kernel
                      from all scores held, short lengths, alone and mapped
  protocol:CODEC      the S passes of a block, block after block with clean
                      context, and its decoding: the median of blocks 2 to 6;
                      text and commit are not counted. With the tiny VAE that
                      is how public codes state 12 frames of Self-Forcing 1.3B
                      at 480x832
  text                a prompt of 512 tokens through umT5-xxl
  vae_first, vae      decoding the first block, and any later one
  tiny_vae            decoding a later block by the tiny VAE
  pass:BACK-END       one pass of the transformer over a block, the window full
  attention:BACK-END  its attention alone, one layer's
  generator, critic   an update of one video by adapters, as configs/
                      hiar_1_3b_lora.py has them
  block_first:CODEC   a video: passes, noise and writing of the past, decoding;
                      step_first and stream_MODE likewise

CODEC is wan, tiny, or none: no decoding. `block s` is the time of a block, 12
frames, in a stream after the first one; `plan` the GiB that the compiler or the
estimate of a stream says it takes, to hold beside the `GiB` that it took.

Of a video `DiT s` and `VAE s` add up to the time after the prompt; a stream has
both under way at once, and its decoding is not told apart. `first s` is the
time to the first block's frames, the prompt's encoding left out: add `text`.
`fps` counts pixel frames; a stream's are those of the blocks after the first.

TFLOP are those of XLA's cost analysis, but for the text encoder, whose layers
are a loop: it counts a loop once and a kernel not at all. Of the transformer it
is therefore asked about one and two layers with all scores held, and the rest
is proportional; a video's are its passes at the full window, more than the
first blocks need. The peak is the device's, or the process's where the device
keeps no account.

There are no results here: no GPU was at hand when this was written.
docs/gpu.md says which programs were compiled for one.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

_ROOT = pathlib.Path(__file__).parents[1]
# Beside a checkout, and where nothing is installed.
sys.path.insert(0, str(_ROOT))

_SIZES = ('1.3B', 'tiny')
_CASES = (
  *('numerics', 'protocol:tiny', 'pass:auto', 'stream_serial:tiny'),
  *('stream_shared:tiny', 'vae', 'tiny_vae', 'generator', 'critic'),
  *('stream_serial:wan', 'stream_serial:none', 'stream_batched:tiny'),
  *('stream_block_first:tiny', 'step_first:tiny', 'block_first:tiny'),
  *('attention:auto', 'protocol:none', 'stream_shared:wan'),
  *('stream_batched:wan', 'step_first:wan', 'block_first:wan', 'text'),
  *('vae_first', 'stream_shared:none', 'stream_batched:none'),
  *('step_first:none', 'block_first:none'),
  *('pass:chunked', 'attention:chunked', 'attention:xla', 'pass:xla'),
)
_COLUMNS = ('s', 'block s', 'DiT s', 'VAE s', 'first s', 'fps', 'TFLOP/s')
_COLUMNS += ('MFU', 'GiB', 'plan', 'error')
_GIB = 2**30


def main() -> None:
  """Runs the cases that are asked for, within their minutes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--size', choices=_SIZES, default='1.3B')
  parser.add_argument('--attention', default='auto', help='of the videos')
  parser.add_argument('--num_blocks', type=int, default=7)
  parser.add_argument('--repetitions', type=int, default=5)
  parser.add_argument('--cases', default=','.join(_CASES), help='by comma')
  parser.add_argument('--minutes', type=float, default=60.0, help='for all')
  parser.add_argument('--json', help='a file that gets every case as well')
  parser.add_argument('--worker', help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.worker:
    print(json.dumps(_measure(options.worker, options)))
    return
  deadline = time.monotonic() + 60 * options.minutes
  if options.num_blocks < 2 or options.repetitions < 1:
    parser.error('--num_blocks is at least 2, --repetitions at least 1')
  names = options.cases.split(',')
  for name in names:
    if name not in _CASES:
      parser.error(f'case {name!r} is not one of {", ".join(_CASES)}')
  print(
    f'size {options.size}, {options.num_blocks} blocks, attention '
    f'{options.attention}, medians of {options.repetitions}'
  )
  print(_machine())
  print(f'{"case":23}' + ''.join(f'{name:>10}' for name in _COLUMNS))
  found: dict[str, Any] = {}
  with tempfile.TemporaryDirectory() as cache:
    for name in names:
      found[name] = _case(name, deadline, cache)
      if isinstance(found[name], str):
        print(f'{name:23} {found[name]}', flush=True)
      else:
        cells = (_cell(found[name].get(column)) for column in _COLUMNS)
        line = f'{name:23}' + ''.join(f'{cell:>10}' for cell in cells)
        print(line, flush=True)
      if options.json:
        with open(options.json, 'w') as file:
          json.dump({'machine': _machine(), 'cases': found}, file, indent=1)
  devices = {x['device'] for x in found.values() if isinstance(x, dict)}
  print('device:', ', '.join(sorted(devices)) or 'none')
  if not devices:
    sys.exit(1)


def _case(name: str, deadline: float, cache: str) -> dict[str, Any] | str:
  """What a process of its own measures, or why there is nothing."""
  left = deadline - time.monotonic()
  if left < 0:
    return 'skipped: no time left'
  try:
    done = subprocess.run(
      # Not by -m: the arguments are this program's own.
      [sys.executable, __file__, *sys.argv[1:], f'--worker={name}'],
      env=os.environ
      | {
        'JAX_COMPILATION_CACHE_DIR': cache,
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      },
      stdout=subprocess.PIPE,
      text=True,
      timeout=left,
      check=False,
    )
  except subprocess.TimeoutExpired:
    return 'skipped: it did not end in the time left'
  if done.returncode:
    # What a back-end has no memory for is a result, too.
    return 'failed; the message is above'
  return json.loads(done.stdout.splitlines()[-1])


def _machine() -> str:
  """Versions, and what the driver says of its cards."""
  versions = (
    f'Python {sys.version.split()[0]}, jax {importlib.metadata.version("jax")}'
  )
  query = 'name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,memory.total'
  try:
    cards = subprocess.run(
      ['nvidia-smi', f'--query-gpu={query}', '--format=csv,noheader'],
      capture_output=True,
      text=True,
      timeout=20,
      check=True,
    )
  except (OSError, subprocess.SubprocessError):
    return f'{versions}, no Nvidia driver'
  return f'{versions}; {query}: ' + '; '.join(cards.stdout.splitlines())


def _cell(value: float | None) -> str:
  return '' if value is None else f'{value:.4g}'


def _measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
  """One line of the table: column -> number."""
  # Here, so that the process that starts the cases holds nothing of a GPU.
  import jax

  from hiar_jax.models import flops as flops_lib

  rows = _rows(name, options)
  next(rows)  # Compiles.
  found = [next(rows) for _ in range(options.repetitions)]
  for row in found:
    if 'flops' in row:
      row['rate'] = row['flops'] / row.get('DiT s', row['s'])
  medians = {
    column: statistics.median(row[column] for row in found)
    for column in found[0]
  }
  device = jax.local_devices()[0]
  stats = device.memory_stats() or {}
  peak_rate, rate = flops_lib.peak([device]), medians.pop('rate', None)
  medians.pop('flops', None)
  peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  planned = medians.pop('plan', None)
  return medians | {
    'TFLOP/s': rate and rate / 1e12,
    'MFU': rate and peak_rate and rate / peak_rate,
    'GiB': stats.get('peak_bytes_in_use', peak) / _GIB,
    'plan': planned and planned / _GIB,
    'device': device.device_kind,
  }


def _rows(name: str, options: argparse.Namespace) -> Any:
  """The case's rows; it imports no more than it needs."""
  from benchmarks import gpu_programs

  size = gpu_programs.sizes()[options.size]
  kind, _, way = name.partition(':')
  if kind in gpu_programs.PROGRAMS:
    return gpu_programs.PROGRAMS[kind](size)
  if kind in gpu_programs.BY_BACKEND:
    return gpu_programs.BY_BACKEND[kind](size, way)
  if kind in ('generator', 'critic'):
    from benchmarks import gpu_training

    return gpu_training.step(size, kind, options.attention)
  from benchmarks import gpu_videos

  if kind == 'protocol':
    return gpu_videos.protocol(size, options.attention, way)
  return gpu_videos.video(
    size, kind, options.attention, way, options.num_blocks
  )


if __name__ == '__main__':
  main()
