"""How fast a video is made, by order of the work and place of the stages.

  python benchmarks/pipeline.py                       # all, some minutes
  python benchmarks/pipeline.py --size=tiny --num_blocks=3 --repetitions=2
  python benchmarks/pipeline.py --cases=one_core,two_cores --num_blocks=30

Every case is a process of its own, so that its peak memory is its own. One
after the other they start and compile; then they take turns, one repetition
each, so that whatever else the machine does strikes all alike. Times are
medians.

Included: network passes, noise, writing of the past, and for the streams the
host's loop and the copy of each block. Not included: compiling, the text
encoder, the codec, files. 'pass' counts one stage's work on one block; `s/pass`
is the time for a video over its passes, so overlap makes it smaller.

The two-core cases take a schedule of two steps. `one_core` makes all passes on
core 0; `two_cores` is a pipeline of two processes, pinned to cores 0 and 1,
each with one thread. 2 is ideal: 4B passes in a row against 2B ticks.
"""

import argparse
import dataclasses
import json
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
import time

_SIZES = {
  # dim, ffn_dim, heads, layers, latent side
  'tiny': (16, 32, 1, 1, 4),
  'bouncing': (128, 512, 2, 4, 8),
  'medium': (256, 1024, 4, 6, 16),
  'large': (512, 2048, 8, 8, 16),
}
_STEPS = {2: (1000, 500), 4: (1000, 750, 500, 250)}
_FRAMES_PER_BLOCK = 3


@dataclasses.dataclass(frozen=True)
class Case:
  """What one line of the table is.

  Attributes:
    kind: 'offline', 'stream' or 'pipeline'.
    mode: order, stream mode, or 'alternating' / 'fused'.
    context: 'matched' or 'shared'.
    steps: denoising steps.
    devices: stage devices of a process; 0: no mesh.
    cores: one process for each, pinned to it; empty: one process, unpinned.
    against: the case that its speed is compared with.
  """

  kind: str
  mode: str
  context: str = 'matched'
  steps: int = 4
  devices: int = 0
  cores: tuple[int, ...] = ()
  against: str = 'step_first'

  def passes(self, num_blocks: int) -> int:
    """Passes of one stage over one block that the video takes."""
    is_short = self.mode == 'block_first' or self.context == 'shared'
    return num_blocks * (self.steps + 1 if is_short else 2 * self.steps)


CASES = {
  'block_first': Case('offline', 'block_first'),
  'step_first': Case('offline', 'step_first'),
  'shared': Case('offline', 'step_first', 'shared'),
  'stream_batched': Case('stream', 'batched'),
  'stream_serial': Case('stream', 'serial'),
  'stream_shared': Case('stream', 'shared', 'shared'),
  'alternating': Case('pipeline', 'alternating', against='alternating'),
  'fused': Case('pipeline', 'fused', against='alternating'),
  'devices_1': Case('pipeline', 'alternating', devices=1, against='devices_1'),
  'devices_2': Case('pipeline', 'alternating', devices=2, against='devices_1'),
  'devices_4': Case('pipeline', 'alternating', devices=4, against='devices_1'),
  'shared_devices_1': Case(
    'pipeline', 'alternating', 'shared', devices=1, against='devices_1'
  ),
  'shared_devices_2': Case(
    'pipeline', 'alternating', 'shared', devices=2, against='devices_2'
  ),
  'one_core': Case(
    'offline', 'step_first', steps=2, cores=(0,), against='one_core'
  ),
  'one_core_pipeline': Case(
    'pipeline', 'alternating', steps=2, cores=(0,), against='one_core'
  ),
  'two_cores': Case(
    'pipeline', 'alternating', steps=2, cores=(0, 1), against='one_core'
  ),
  'shared_two_cores': Case(
    'pipeline', 'alternating', 'shared', 2, cores=(0, 1), against='one_core'
  ),
}


def _worker(case: Case, options, process_id: int) -> None:
  """Prepares a case, then makes one video for each line of stdin."""
  if case.cores:
    # Before jax is imported: it makes one thread for each core that it sees.
    os.sched_setaffinity(0, {case.cores[process_id]})
    os.environ['XLA_FLAGS'] = '--xla_cpu_multi_thread_eigen=false'
  import jax

  if options.platform:
    jax.config.update('jax_platforms', options.platform)
  if options.platform == 'cpu':
    jax.config.update('jax_num_cpu_devices', max(case.devices, 1))
  if len(case.cores) > 1:
    from hiar_jax.runtime import distributed

    distributed.start(
      distributed.Processes(options.coordinator, len(case.cores), process_id),
      timeout=300,
    )
  make = _maker(case, options)
  jax.block_until_ready(make()[1])  # Compiles.
  print(json.dumps({'device': jax.devices()[0].device_kind}), flush=True)
  for _ in sys.stdin:
    started = time.perf_counter()
    first, under_way = make()
    seconds = time.perf_counter() - started
    # Or it would slow down the case whose turn is next.
    jax.block_until_ready(under_way)
    stats = jax.local_devices()[0].memory_stats() or {}
    print(
      json.dumps(
        {
          'seconds': seconds,
          'first': first,
          'host_mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
          'device_mib': stats.get('peak_bytes_in_use', 0) / 2**20,
        }
      ),
      flush=True,
    )


def _maker(case: Case, options):
  """A function that makes one video.

  It returns the seconds to the first block, and arrays that it has begun beyond
  the video.
  """
  import jax
  import numpy as np
  import plain_codec

  from hiar_jax import noise_schedule, rollout
  from hiar_jax.denoiser import Denoiser
  from hiar_jax.models.config import WanConfig
  from hiar_jax.sampling import (
    calls,
    pipeline,
    seeds,
    shared_pipeline,
    streaming,
  )

  dim, ffn_dim, heads, layers, side = _SIZES[options.size]
  denoiser = Denoiser(
    WanConfig(
      dim=dim,
      ffn_dim=ffn_dim,
      num_heads=heads,
      num_layers=layers,
      unroll=layers,
      latent_height=side,
      latent_width=side,
      freq_dim=64,
      text_dim=64,
      text_len=16,
    )
  )
  config = rollout.RolloutConfig(
    levels=noise_schedule.warped_levels(_STEPS[case.steps], 5.0),
    frames_per_block=_FRAMES_PER_BLOCK,
    window=options.window,
    context=case.context,
  )
  params = denoiser.unstack_layers(denoiser.init(jax.random.key(0)))
  states = np.zeros((1, 16, 64), np.float32)
  keys = seeds.sample_keys(np.uint32(0), np.zeros(1, int), np.zeros(1, int))
  num_blocks = options.num_blocks

  if case.kind == 'offline':
    request = calls.Request(num_blocks, order=case.mode)
    total = calls.num_passes(request, config)
    per_block = 2 if case.mode == 'step_first' else case.steps + 1
    if case.context == 'shared':
      per_block = case.steps + 1
    # The sweep that finishes blocks is the last one.
    until_first = total - per_block * (num_blocks - 1)

    def make():
      started, done, first = time.perf_counter(), 0, []

      def report(passes):
        nonlocal done
        done += passes
        if done >= until_first and not first:
          first.append(time.perf_counter() - started)

      calls.sample(
        *(denoiser, params, config, request, keys, states, None, report)
      )
      return first[0], ()

    return make

  if case.kind == 'stream':
    engine = streaming.Engine(denoiser, config, case.mode)
    codec = plain_codec.PlainCodec()

    def make():
      started = time.perf_counter()
      stream = streaming.Stream(
        *(engine, params, codec, lambda prompts: states, [''], keys)
      )
      next(stream)
      first = time.perf_counter() - started
      for _ in range(num_blocks - 1):
        next(stream)
      return first, stream._ready  # A stream is one block ahead.

    return make

  mesh = None
  if case.devices or len(case.cores) > 1:
    devices = jax.devices()[: case.devices or len(case.cores)]
    mesh = jax.make_mesh(
      (case.devices or len(case.cores),),
      ('stage',),
      axis_types=(jax.sharding.AxisType.Auto,),
      devices=devices,
    )
  if case.context == 'shared':
    stages = shared_pipeline.SharedPipeline(denoiser, config, mesh)
  else:
    stages = pipeline.Pipeline(
      denoiser, config, mesh, fused=case.mode == 'fused'
    )
  # A global program takes no arrays that one process alone can see.
  params = jax.tree.map(np.asarray, params)
  keys_data = np.asarray(jax.random.key_data(keys))

  def run(blocks):
    def program(params, keys_data):
      text = denoiser.project_text(params, states)
      turns = stages.num_turns(blocks)
      bank, slots = pipeline.single_prompt(text, turns, stages.num_stages)
      state = stages.init_state(params, text)
      keys = jax.random.wrap_key_data(keys_data)
      return stages.run(params, bank, slots, keys, state)[1]

    return jax.jit(program)

  video, first_block = run(num_blocks), run(1)

  def make():
    jax.block_until_ready(video(params, keys_data))
    started = time.perf_counter()
    jax.block_until_ready(first_block(params, keys_data))
    return time.perf_counter() - started, ()

  return make


class _Workers:
  """The processes of one case."""

  def __init__(self, name: str, arguments: list[str]):
    count = max(1, len(CASES[name].cores))
    with socket.create_server(('127.0.0.1', 0)) as server:
      coordinator = f'127.0.0.1:{server.getsockname()[1]}'
    self._processes = [
      subprocess.Popen(
        [
          *(sys.executable, __file__, *arguments, f'--worker={name}'),
          *(f'--process_id={i}', f'--coordinator={coordinator}'),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
      )
      for i in range(count)
    ]

  def read(self) -> list[dict]:
    """What each has to say next."""
    return [json.loads(self._line(process)) for process in self._processes]

  def _line(self, process: subprocess.Popen) -> str:
    for line in process.stdout:
      if line.startswith('{'):  # Others are gloo's.
        return line
    raise RuntimeError('a worker ended; its message is above')

  def repeat(self) -> list[dict]:
    for process in self._processes:
      process.stdin.write('\n')
      process.stdin.flush()
    return self.read()

  def stop(self) -> None:
    for process in self._processes:
      process.stdin.close()
    for process in self._processes:
      try:
        process.wait(timeout=30)
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _seconds(case: Case, repetition: list[dict]) -> tuple[float, float]:
  """(seconds for the video, seconds to the first block) of the slowest."""
  seconds = max(r['seconds'] for r in repetition)
  first = max(r['first'] for r in repetition)
  # A scan hands out nothing before its end: the first block is timed apart.
  return (seconds - first if case.kind == 'pipeline' else seconds), first


def _table(results: dict[str, list[list[dict]]], num_blocks: int) -> None:
  measured = {
    name: [_seconds(CASES[name], r) for r in repetitions]
    for name, repetitions in results.items()
  }
  print(
    f'{"case":18} {"passes":>6} {"s/pass":>9} {"fps":>8} {"first s":>8} '
    f'{"peak MiB":>8}  speed'
  )
  for name, times in measured.items():
    case, passes = CASES[name], CASES[name].passes(num_blocks)
    seconds = statistics.median(t for t, _ in times)
    peak = max(
      sum(r['device_mib'] or r['host_mib'] for r in repetition)
      for repetition in results[name]
    )
    speed = ''
    if case.against in measured and case.against != name:
      # Repetitions that ran beside each other are compared.
      ratios = [b / t for (t, _), (b, _) in zip(times, measured[case.against])]
      speed = f'{statistics.median(ratios):.2f} x {case.against}'
    print(
      f'{name:18} {passes:6} {seconds / passes:9.5f} '
      f'{num_blocks * _FRAMES_PER_BLOCK / seconds:8.2f} '
      f'{statistics.median(f for _, f in times):8.3f} {peak:8.0f}  {speed}'
    )


def main() -> None:
  """Times the cases in turns and prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--size', choices=_SIZES, default='bouncing')
  parser.add_argument('--num_blocks', type=int, default=24)
  parser.add_argument('--window', type=int, default=21, help='latent frames')
  parser.add_argument('--repetitions', type=int, default=7)
  parser.add_argument('--cases', default=','.join(CASES), help='by comma')
  parser.add_argument(
    '--platform', default='cpu', help="jax's; empty: what it finds"
  )
  for hidden in ('--worker', '--coordinator'):
    parser.add_argument(hidden, help=argparse.SUPPRESS)
  parser.add_argument(
    '--process_id', type=int, default=0, help=argparse.SUPPRESS
  )
  options = parser.parse_args()
  if options.worker:
    _worker(CASES[options.worker], options, options.process_id)
    return
  names = options.cases.split(',')
  for name in names:
    if name not in CASES:
      parser.error(f'case {name!r} is not one of {", ".join(CASES)}')
  if min(options.num_blocks, options.repetitions) < 1:
    parser.error('--num_blocks and --repetitions are at least 1')
  print(
    f'{platform.machine()} {platform.processor()}, {os.cpu_count()} cores, '
    f'load {os.getloadavg()[0]:.1f}; size {options.size}, '
    f'{options.num_blocks} blocks, window {options.window}, '
    f'{options.repetitions} repetitions'
  )
  workers, results = {}, {name: [] for name in names}
  try:
    devices = set()
    for name in names:
      workers[name] = _Workers(name, sys.argv[1:])
      # One case after the other: where one of two processes shares its core
      # with others that compile, gloo stops waiting for it.
      devices.add(workers[name].read()[0]['device'])
    print('devices:', ', '.join(sorted(devices)), flush=True)
    for _ in range(options.repetitions):
      for name in names:
        results[name].append(workers[name].repeat())
  finally:
    for case in workers.values():
      case.stop()
  _table(results, options.num_blocks)


if __name__ == '__main__':
  main()
