"""Videos that benchmarks/gpu.py measures, with each of the codecs."""

import dataclasses
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_programs
from benchmarks.gpu_programs import Rows, Size
from hiar_jax.denoiser import Denoiser
from hiar_jax.sampling import (
  calls,
  decoding,
  modes,
  passes,
  seeds,
  streaming,
)
from hiar_jax.text import word_hash

ORDERS = ('block_first', 'step_first')


def protocol(size: Size, backend: str, codec_name: str) -> Rows:
  """Blocks as flashdreams counts them, and as a viewer waits for them."""
  model = dataclasses.replace(
    size.transformer, attention=backend, unroll=size.transformer.num_layers
  )
  denoiser, config = Denoiser(model), gpu_programs.rollout_config(size)
  params = gpu_programs.random_params(
    jax.eval_shape(
      lambda key: denoiser.unstack_layers(denoiser.init(key)),
      jax.random.key(0),
    )
  )
  states = jnp.zeros((1, model.text_len, model.text_dim), model.dtype)
  text = jax.jit(denoiser.project_text)(params, states)
  bank = jax.tree.map(lambda a: a[None], text)
  keys = jax.random.split(jax.random.key(1), 1)
  stream = passes.Passes(denoiser, config, params, bank, keys)

  codec = gpu_programs.codec_of(size, codec_name)
  decode = jax.jit(lambda codec, state, x: codec.decode_stream(state, x))
  flops = config.num_steps * gpu_programs.pass_flops(size)
  while True:
    state = codec.init_decode_state(1)
    held = passes.begin(
      *(denoiser, config, params, text, None, 0), num_windows=1
    )
    seconds = []
    for block in range(7):
      jax.block_until_ready(held.windows)
      started = time.perf_counter()
      x = stream.denoise_block(held, 0, block)
      frames, state = decode(codec, state, x)
      jax.block_until_ready(frames)
      seconds.append(time.perf_counter() - started)
      stream.commit_block(held, x, 0, block)
    middle = statistics.median(seconds[1:6])
    yield {'s': middle, 'block s': middle, 'flops': flops}


def video(
  size: Size, name: str, backend: str, codec_name: str, num_blocks: int
) -> Rows:
  """A video of an order, or a stream 'stream_MODE'."""
  model = dataclasses.replace(size.transformer, attention=backend)
  denoiser = Denoiser(model)
  params = gpu_programs.random_params(
    jax.eval_shape(denoiser.init, jax.random.key(0))
  )
  encoder = word_hash.WordHashEncoder(model.text_dim, model.text_len)
  codec = gpu_programs.codec_of(size, codec_name)
  config = gpu_programs.rollout_config(
    size, context='shared' if name == 'stream_shared' else 'matched'
  )
  # A stream makes some passes beyond the video: those of its blocks count.
  flops = gpu_programs.pass_flops(size)
  keys = seeds.sample_keys(np.uint32(0), np.zeros(1, int), np.zeros(1, int))
  if name in ORDERS:
    request = calls.Request(num_blocks, order=name)
    states = encoder.encode(['a cat'])
    sample = functools.partial(
      *(calls.sample, denoiser, params, config, request, keys, states, None)
    )
    return _offline(sample, codec, config, request, flops)
  engine = streaming.Engine(denoiser, config, name.removeprefix('stream_'))
  engine = modes.on_device(engine, params, 1)
  planned = modes.estimate_memory(engine, params, 1).total

  def start():
    return streaming.Stream(
      engine, params, codec, encoder.encode, ['a cat'], keys
    )

  return _stream(start, engine, num_blocks, flops, planned)


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
      'block s': seconds / request.num_blocks,
      'flops': flops * total,
    }


def _stream(start, engine, num_blocks, flops, planned) -> Rows:
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
      'block s': later / (num_blocks - 1),
      'plan': planned,
      'flops': flops * passes * (num_blocks - 1) * (first + later) / later,
    }
