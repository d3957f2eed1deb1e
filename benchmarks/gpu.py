"""How fast Wan2.1-1.3B makes 480x832 video here, and where the time goes.

  python benchmarks/gpu.py                       # full size, random weights
  python benchmarks/gpu.py --cases=step_first,stream_batched --num_blocks=14
  python benchmarks/gpu.py --size=tiny --repetitions=2      # seconds, on a CPU

Every case is a process of its own, so that its peak memory is its own, with
random bfloat16 weights: what is measured does not depend on their values.
Each compiles in a first run that is not counted; times are medians of the
repetitions after it.

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
"""

import argparse
import dataclasses
import functools
import json
import resource
import statistics
import subprocess
import sys
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
from hiar_jax.models.config import WanConfig
from hiar_jax.planning import parts as planning_parts
from hiar_jax.sampling import calls, seeds, video_pipeline
from hiar_jax.text import word_hash

_LEVELS = noise_schedule.warped_levels((1000, 750, 500, 250), 5.0)
_BACKENDS = ('xla', 'chunked', 'auto')
_ORDERS = ('block_first', 'step_first')
_STREAMS = ('batched', 'serial', 'shared')
_CASES = (
  *('text', 'vae_first', 'vae'),
  *(f'pass:{backend}' for backend in _BACKENDS),
  *(f'attention:{backend}' for backend in _BACKENDS),
  *_ORDERS,
  *(f'stream_{mode}' for mode in _STREAMS),
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
  parser.add_argument('--worker', help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.worker:
    print(json.dumps(_measure(options.worker, options)))
    return
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
  header = ('case', 's', 'DiT s', 'VAE s', 'first s', 'fps', 'TFLOP/s', 'GiB')
  print(f'{header[0]:18}' + ''.join(f'{name:>9}' for name in header[1:]))
  devices = set()
  for name in names:
    # Not by -m: the arguments are this program's own.
    done = subprocess.run(
      [sys.executable, __file__, *sys.argv[1:], f'--worker={name}'],
      stdout=subprocess.PIPE,
      text=True,
      check=False,
    )
    if done.returncode:
      # What a back-end has no memory for is a result, too.
      print(f'{name:18} failed; the message is above', flush=True)
      continue
    found = json.loads(done.stdout.splitlines()[-1])
    devices.add(found.pop('device'))
    cells = (_cell(found.get(column)) for column in header[1:])
    print(f'{name:18}' + ''.join(f'{cell:>9}' for cell in cells), flush=True)
  print('device:', ', '.join(sorted(devices)) or 'none')
  if len(devices) == 0:
    sys.exit(1)


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
  peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return medians | {
    'TFLOP/s': flops and flops / 1e12 / medians.get('DiT s', medians['s']),
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


def _video(
  size: Size, name: str, backend: str, num_blocks: int
) -> Iterator[dict[str, float]]:
  model = dataclasses.replace(size.transformer, attention=backend)
  denoiser = Denoiser(model)
  pipe = video_pipeline.VideoPipeline(
    name='random',
    denoiser=denoiser,
    params=random_params(jax.eval_shape(denoiser.init, jax.random.key(0))),
    encoder=word_hash.WordHashEncoder(model.text_dim, model.text_len),
    codec=_codec(size),
    rollout=_config(
      size, context='shared' if name == 'stream_shared' else 'matched'
    ),
    order='step_first',
    fps=16.0,
  )
  # A stream makes some passes beyond the video: those of its blocks count.
  flops = _pass_flops(size)
  if name in _ORDERS:
    return _offline(pipe, name, num_blocks, flops)
  return _stream(pipe, name.removeprefix('stream_'), num_blocks, flops)


def _offline(pipe, order, num_blocks, flops) -> Iterator[dict[str, float]]:
  request = calls.Request(num_blocks, order=order)
  total = calls.num_passes(request, pipe.rollout)
  # The sweep that finishes the blocks is the last one.
  last = 2 if order == 'step_first' else pipe.rollout.num_steps + 1
  until_first = total - last * (num_blocks - 1)
  keys = seeds.sample_keys(np.uint32(0), np.zeros(1, int), np.zeros(1, int))
  states = pipe.encoder.encode(['a cat'])
  block_frames = pipe.rollout.frames_per_block
  while True:
    started, done, first = time.perf_counter(), 0, 0.0

    def report(passes):
      nonlocal done, first
      done += passes
      if done >= until_first and not first:
        first = time.perf_counter() - started  # noqa: B023

    latents = calls.sample(
      *(pipe.denoiser, pipe.params, pipe.rollout, request, keys, states),
      *(None, report),
    )
    made = time.perf_counter()
    pipe.decode(latents[:, :block_frames])
    first_decoded = time.perf_counter() - made
    again = time.perf_counter()
    frames = pipe.decode(latents)
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


def _stream(pipe, mode, num_blocks, flops) -> Iterator[dict[str, float]]:
  steps = pipe.rollout.num_steps
  passes = steps + 1 if mode == 'shared' else 2 * steps
  while True:
    started = time.perf_counter()
    stream = pipe.stream('a cat', mode=mode)
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
