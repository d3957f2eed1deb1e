"""How fast Wan2.1-1.3B makes 480x832 video here, and where the time goes.

  python benchmarks/gpu.py                       # full size, random weights
  python benchmarks/gpu.py --minutes=8 --json=gpu.json     # as far as that goes
  python benchmarks/gpu.py --cases=step_first,stream_batched --num_blocks=14
  python benchmarks/gpu.py --size=tiny --repetitions=2      # seconds, on a CPU

Every case is a process of its own, so that its peak memory is its own, with
random bfloat16 weights: what is measured does not depend on their values.
Each compiles in a first run that is not counted; times are medians of the
repetitions after it. The processes share a compilation cache, the most wanted
case comes first, every line is out as soon as it is known, and what does not
fit into `--minutes` is skipped. jax, numpy, flax, absl and safetensors are all
that it needs: no video, data or training library is imported.

  numerics            the largest difference of this machine's attention kernel
                      from all scores held, short lengths, alone and mapped
  protocol            the S passes of a block, block after block with clean
                      context: the median of blocks 2 to 6; text, commit and
                      decoding are not counted. That is how public codes state
                      12 frames of Self-Forcing 1.3B at 480x832
  text                a prompt of 512 tokens through umT5-xxl
  vae_first, vae      decoding the first block, and any later one
  pass:BACK-END       one pass of the transformer over a block, the window full
  attention:BACK-END  its attention alone, one layer's
  block_first, ...    a video: passes, noise and writing of the past, decoding

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
import dataclasses
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax import noise_schedule, rollout
from hiar_jax.codecs import vae as codecs_vae
from hiar_jax.denoiser import Denoiser
from hiar_jax.models import attention, kv_cache, umt5, vae
from hiar_jax.models import flops as flops_lib
from hiar_jax.models.config import WanConfig
from hiar_jax.planning import parts as planning_parts
from hiar_jax.sampling import calls, decoding, seeds, streaming
from hiar_jax.text import word_hash

_LEVELS = noise_schedule.warped_levels((1000, 750, 500, 250), 5.0)
_ORDERS = ('block_first', 'step_first')
_CASES = (
  *('numerics', 'protocol', 'pass:auto', 'stream_serial', 'stream_shared'),
  *('vae', 'attention:auto', 'stream_batched', 'vae_first', *_ORDERS),
  *('text', 'pass:chunked', 'attention:chunked', 'attention:xla', 'pass:xla'),
)
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Size:
  """The networks of a benchmark.

  Attributes:
    transformer: its config.
    vae: likewise.
    umt5: likewise.
    window: latent frames that attention sees.
  """

  transformer: WanConfig
  vae: vae.VAEConfig
  umt5: umt5.UMT5Config
  window: int


def _sizes() -> dict[str, Size]:
  full = WanConfig.wan_1_3b(remat='none')
  tiny = dataclasses.replace(
    full,
    **{'dim': 32, 'ffn_dim': 48, 'num_heads': 2, 'num_layers': 2},
    **{'latent_height': 4, 'latent_width': 6, 'freq_dim': 16},
    **{'text_dim': 16, 'text_len': 8},
  )
  # The fewest layers: on a CPU, compiling them is most of the time.
  tiny_vae = dataclasses.replace(
    vae.VAEConfig.wan(),
    **{'base_dim': 4, 'dim_mult': (1, 1), 'num_res_blocks': 0},
    temporal_downsample=(True,),
  )
  tiny_umt5 = umt5.UMT5Config(
    vocab_size=32,
    dim=16,
    ffn_dim=24,
    num_heads=2,
    attention_dim=16,
    num_layers=1,
  )
  return {
    '1.3B': Size(full, vae.VAEConfig.wan(), umt5.UMT5Config.xxl(), 21),
    'tiny': Size(tiny, tiny_vae, tiny_umt5, 6),
  }


def random_params(abstract: Any, dtype: str = 'bfloat16') -> Any:
  """Small random numbers in the place of weights, array by array.

  The same numbers over and over: to draw each on the device would compile a
  program for every shape.
  """
  rng = np.random.default_rng(0)
  numbers = 0.02 * rng.standard_normal(2**20, np.float32)
  numbers = numbers.astype(jnp.dtype(dtype))
  return jax.tree.map(
    lambda leaf: jax.device_put(np.resize(numbers, leaf.shape)), abstract
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--size', choices=_sizes(), default='1.3B')
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
  header = ('case', 's', 'DiT s', 'VAE s', 'first s', 'fps', 'TFLOP/s', 'MFU')
  header += ('GiB', 'error')
  print(f'{header[0]:18}' + ''.join(f'{name:>9}' for name in header[1:]))
  found: dict[str, Any] = {}
  with tempfile.TemporaryDirectory() as cache:
    for name in names:
      found[name] = _case(name, deadline, cache)
      if isinstance(found[name], str):
        print(f'{name:18} {found[name]}', flush=True)
      else:
        cells = (_cell(found[name].get(column)) for column in header[1:])
        line = f'{name:18}' + ''.join(f'{cell:>9}' for cell in cells)
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
  versions = f'Python {sys.version.split()[0]}, jax {jax.__version__}'
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
  size = _sizes()[options.size]
  kind, _, backend = name.partition(':')
  if kind == 'text':
    rows = _text(size)
  elif kind in ('vae', 'vae_first'):
    rows = _vae(size, first=kind == 'vae_first')
  elif kind == 'pass':
    rows = _one_pass(size, backend)
  elif kind == 'attention':
    rows = _attention(size, backend)
  elif kind == 'numerics':
    rows = _numerics(size)
  elif kind == 'protocol':
    rows = _protocol(size, options.attention)
  else:
    rows = _video(size, name, options.attention, options.num_blocks)
  next(rows)  # Compiles.
  found = [next(rows) for _ in range(options.repetitions)]
  medians = {
    column: statistics.median(row[column] for row in found)
    for column in found[0]
  }
  flops = medians.pop('flops', None)
  device = jax.local_devices()[0]
  stats = device.memory_stats() or {}
  peak_rate = flops_lib.peak([device])
  rate = flops and flops / medians.get('DiT s', medians['s'])
  peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return medians | {
    'TFLOP/s': rate and rate / 1e12,
    'MFU': rate and peak_rate and rate / peak_rate,
    'GiB': stats.get('peak_bytes_in_use', peak) / _GIB,
    'device': device.device_kind,
  }


def _timed(run: Callable[[], Any], flops: float) -> Iterator[dict[str, float]]:
  while True:
    started = time.perf_counter()
    jax.block_until_ready(run())
    yield {'s': time.perf_counter() - started, 'flops': flops}


def _layered_flops(lower: Callable[[int], Any], num_layers: int) -> float:
  """FLOPs of a program of so many layers, from those of one and of two."""
  one, two = (lower(n).cost_analysis()['flops'] for n in (1, 2))
  return one + (num_layers - 1) * (two - one)


def _text(size: Size) -> Iterator[dict[str, float]]:
  config, tokens = size.umt5, size.transformer.text_len
  params = random_params(
    jax.eval_shape(lambda: umt5.init(config, jax.random.key(0)))
  )
  run = jax.jit(functools.partial(umt5.encode, config))
  ids = jnp.ones((1, tokens), jnp.int32)
  flops = planning_parts.text_flops(config, tokens)
  return _timed(lambda: run(params, ids, ids), flops)


def _codec(size: Size) -> codecs_vae.VAECodec:
  config = size.vae
  abstract = jax.eval_shape(lambda: vae.init(config, jax.random.key(0)))
  return codecs_vae.VAECodec(random_params(abstract, 'float32'), config)


def _block(size: Size) -> jax.Array:
  model = size.transformer
  return jnp.ones(
    (1, 3, model.latent_height, model.latent_width, model.channels)
  )


def _vae(size: Size, *, first: bool) -> Iterator[dict[str, float]]:
  codec, latents = _codec(size), _block(size)
  decode = jax.jit(lambda codec, state, x: codec.decode_stream(state, x))
  state = codec.init_decode_state(1)
  if not first:
    state = decode(codec, state, latents)[1]
  cost = decode.lower(codec, state, latents).cost_analysis()
  return _timed(lambda: decode(codec, state, latents), cost['flops'])


def _config(size: Size, **changes) -> rollout.RolloutConfig:
  return rollout.RolloutConfig(levels=_LEVELS, window=size.window, **changes)


def _pass_program(model: WanConfig, window: int) -> tuple[Any, tuple]:
  """A pass over a block with a full past, and its abstract arguments."""
  denoiser = Denoiser(model)
  params = jax.eval_shape(denoiser.init, jax.random.key(0))
  params = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, 'bfloat16'), params
  )
  states = jax.ShapeDtypeStruct((1, model.text_len, model.text_dim), 'float32')
  projected = jax.eval_shape(denoiser.project_text, params, states)
  past = jax.eval_shape(lambda: kv_cache.init_cache(model, 1, window - 3, 0, 0))
  x = jax.ShapeDtypeStruct(
    (1, 3, model.latent_height, model.latent_width, model.channels), 'float32'
  )

  def one_pass(params, x, text, past):
    return denoiser.flow(params, x, 0.5, text, past=past)

  return jax.jit(one_pass), (params, x, projected, past)


def _pass_flops(size: Size) -> float:
  def lower(num_layers):
    model = dataclasses.replace(
      size.transformer,
      attention='xla',
      num_layers=num_layers,
      unroll=num_layers,
    )
    run, arguments = _pass_program(model, size.window)
    return run.lower(*arguments)

  return _layered_flops(lower, size.transformer.num_layers)


def _one_pass(size: Size, backend: str) -> Iterator[dict[str, float]]:
  model = dataclasses.replace(size.transformer, attention=backend)
  run, (params, *others) = _pass_program(model, size.window)
  x, projected, past = jax.tree.map(
    lambda a: jnp.zeros(a.shape, a.dtype), tuple(others)
  )
  past = past.replace(frames=jnp.int32(size.window))
  params = random_params(params)
  return _timed(lambda: run(params, x, projected, past), _pass_flops(size))


def _attention(size: Size, backend: str) -> Iterator[dict[str, float]]:
  model = size.transformer

  def normal(frames):
    shape = (
      *(1, frames * model.tokens_per_frame),
      *(model.num_heads, model.head_dim),
    )
    return jax.random.normal(jax.random.key(frames), shape, model.dtype)

  q, k = normal(3), normal(size.window)

  def attend(q, k, v, backend):
    return attention.attend(q, k, v, backend=backend)

  run = jax.jit(attend, static_argnames='backend')
  cost = run.lower(q, k, k, 'xla').cost_analysis()
  return _timed(lambda: run(q, k, k, backend), cost['flops'])


def _numerics(size: Size) -> Iterator[dict[str, float]]:
  model = size.transformer
  heads = (model.num_heads, model.head_dim)

  def normal(seed, tokens, stages):
    shape = (stages, 1, tokens * model.tokens_per_frame, *heads)
    return jax.random.normal(jax.random.key(seed), shape, model.dtype)

  q, k, v = normal(0, 1, 3), normal(1, 6, 3), normal(2, 6, 3)
  lengths = model.tokens_per_frame * jnp.array([1, 3, 6])

  @functools.partial(jax.jit, static_argnames='backend')
  def run(q, k, v, lengths, backend):
    def one(q, k, v, length):
      return attention.attend(q, k, v, length=length, backend=backend)

    each = [one(*xs) for xs in zip(q, k, v, lengths, strict=True)]
    full = attention.attend(q[0], k[0], v[0], backend=backend)
    return jnp.stack([*each, full]), jax.vmap(one)(q, k, v, lengths)

  while True:
    started = time.perf_counter()
    ours, theirs = (
      jax.tree.map(
        lambda a: np.asarray(a, np.float32), run(q, k, v, lengths, backend)
      )
      for backend in ('auto', 'xla')
    )
    errors = [abs(a - b).max() for a, b in zip(ours, theirs, strict=True)]
    yield {
      's': time.perf_counter() - started,
      'error': float(max(errors)),
    }


def _protocol(size: Size, backend: str) -> Iterator[dict[str, float]]:
  model = dataclasses.replace(size.transformer, attention=backend)
  denoiser, config = Denoiser(model), _config(size)
  params = random_params(jax.eval_shape(denoiser.init, jax.random.key(0)))
  states = jnp.zeros((1, model.text_len, model.text_dim), model.dtype)
  text = jax.jit(denoiser.project_text)(params, states)
  keys = jax.random.split(jax.random.key(1), 1)

  @jax.jit
  def denoise(params, text, past, block):
    sampler = rollout.Sampler(denoiser, params, text, config)
    noise = rollout.named_noise(keys, config.block_shape(model))

    def one_step(x, step):
      flow, _ = sampler.denoise(x, past, step)
      return sampler.advance(x, flow, noise, step, block)[0], None

    steps = jnp.arange(config.num_steps)
    return jax.lax.scan(one_step, noise(0, block), steps)[0]

  @functools.partial(jax.jit, donate_argnums=2)
  def commit(params, text, past, x):
    sampler = rollout.Sampler(denoiser, params, text, config)
    return past.write(sampler.commit_kv(x, past, jnp.zeros(())))

  flops = config.num_steps * _pass_flops(size)
  while True:
    past = rollout.Sampler(denoiser, params, text, config).empty_past()
    seconds = []
    for block in range(7):
      jax.block_until_ready(past)
      started = time.perf_counter()
      x = jax.block_until_ready(denoise(params, text, past, np.int32(block)))
      seconds.append(time.perf_counter() - started)
      past = commit(params, text, past, x)
    yield {'s': statistics.median(seconds[1:6]), 'flops': flops}


def _video(
  size: Size, name: str, backend: str, num_blocks: int
) -> Iterator[dict[str, float]]:
  model = dataclasses.replace(size.transformer, attention=backend)
  denoiser = Denoiser(model)
  params = random_params(jax.eval_shape(denoiser.init, jax.random.key(0)))
  encoder = word_hash.WordHashEncoder(model.text_dim, model.text_len)
  codec = _codec(size)
  config = _config(
    size, context='shared' if name == 'stream_shared' else 'matched'
  )
  # A stream makes some passes beyond the video: those of its blocks count.
  flops = _pass_flops(size)
  keys = seeds.sample_keys(np.uint32(0), np.zeros(1, int), np.zeros(1, int))
  if name in _ORDERS:
    request = calls.Request(num_blocks, order=name)
    states = encoder.encode(['a cat'])
    sample = functools.partial(
      *(calls.sample, denoiser, params, config, request, keys, states, None)
    )
    return _offline(sample, codec, config, request, flops)
  engine = streaming.Engine(denoiser, config, name.removeprefix('stream_'))

  def start():
    return streaming.Stream(
      engine, params, codec, encoder.encode, ['a cat'], keys
    )

  return _stream(start, engine, num_blocks, flops)


def _offline(sample, codec, config, request, flops):
  total = calls.num_passes(request, config)
  # The sweep that finishes the blocks is the last one.
  last = 2 if request.order == 'step_first' else config.num_steps + 1
  until_first = total - last * (request.num_blocks - 1)
  block_frames = config.frames_per_block

  def decode(latents):
    return decoding.decode_blocks(codec, latents, block_frames)[0]

  while True:
    started, done, first = time.perf_counter(), 0, 0.0

    def report(passes):
      nonlocal done, first
      done += passes
      if done >= until_first and not first:
        first = time.perf_counter() - started  # noqa: B023

    latents = sample(report)
    made = time.perf_counter()
    decode(latents[:, :block_frames])
    first_decoded = time.perf_counter() - made
    again = time.perf_counter()
    frames = decode(latents)
    decoded = time.perf_counter() - again
    seconds = made - started + decoded
    yield {
      's': seconds,
      'DiT s': made - started,
      'VAE s': decoded,
      'first s': first + first_decoded,
      'fps': frames.shape[1] / seconds,
      'flops': flops * total,
    }


def _stream(start, engine, num_blocks, flops) -> Iterator[dict[str, float]]:
  steps = engine.config.num_steps
  passes = steps + 1 if engine.mode == 'shared' else 2 * steps
  while True:
    started = time.perf_counter()
    stream = start()
    next(stream)
    first = time.perf_counter() - started
    count = sum(next(stream).shape[1] for _ in range(num_blocks - 1))
    later = time.perf_counter() - started - first
    # It has begun the block after the last one, and waits for it here, or that
    # would be in the way of the next repetition.
    next(stream)
    yield {
      's': first + later,
      'first s': first,
      'fps': count / later,
      'flops': flops * passes * (num_blocks - 1) * (first + later) / later,
    }


if __name__ == '__main__':
  main()
