"""What benchmarks/gpu.py measures of single programs, and what all cases share.

A case is an iterator: what comes first has compiled and counts as warming up,
every later row is one repetition, column -> number.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax import noise_schedule, rollout
from hiar_jax.codecs import tiny
from hiar_jax.codecs import vae as codecs_vae
from hiar_jax.denoiser import Denoiser
from hiar_jax.models import attention, kv_cache, tiny_vae, umt5, vae
from hiar_jax.models.config import WanConfig
from hiar_jax.planning import parts as planning_parts

Rows = Iterator[dict[str, float]]

LEVELS = noise_schedule.warped_levels((1000, 750, 500, 250), 5.0)


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


def sizes() -> dict[str, Size]:
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


def timed(run: Callable[[], Any], flops: float) -> Rows:
  while True:
    started = time.perf_counter()
    jax.block_until_ready(run())
    yield {'s': time.perf_counter() - started, 'flops': flops}


def _layered_flops(lower: Callable[[int], Any], num_layers: int) -> float:
  """FLOPs of a program of so many layers, from those of one and of two."""
  one, two = (lower(n).cost_analysis()['flops'] for n in (1, 2))
  return one + (num_layers - 1) * (two - one)


def _text(size: Size) -> Rows:
  config, tokens = size.umt5, size.transformer.text_len
  params = random_params(
    jax.eval_shape(lambda: umt5.init(config, jax.random.key(0)))
  )
  run = jax.jit(functools.partial(umt5.encode, config))
  ids = jnp.ones((1, tokens), jnp.int32)
  flops = planning_parts.text_flops(config, tokens)
  return timed(lambda: run(params, ids, ids), flops)


def planned_bytes(compiled: Any) -> float:
  """Of arguments and temporaries, as the compiler counts them."""
  memory = compiled.memory_analysis()
  return float(
    memory.argument_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
  )


@jax.tree_util.register_static
class NoCodec:
  """Three channels of the latents in the place of frames."""

  def init_decode_state(self, batch_size: int) -> tuple[()]:
    del batch_size
    return ()

  def decode_stream(self, state: Any, latents: jax.Array) -> tuple:
    return jnp.clip(latents[..., :3], -1, 1), state


def codec_of(size: Size, name: str) -> Any:
  """'wan', 'tiny' or 'none', with random weights."""
  if name == 'none':
    return NoCodec()
  if name == 'tiny':
    shapes = {
      # Kernels as weights.tiny_vae_files lays them.
      name: jax.ShapeDtypeStruct(shape[2:] + shape[1::-1], 'float32')
      for name, shape in tiny_vae.shapes().items()
      if name.startswith('decoder')
    }
    return tiny.TinyCodec(random_params(shapes, 'float32'))
  abstract = jax.eval_shape(lambda: vae.init(size.vae, jax.random.key(0)))
  return codecs_vae.VAECodec(random_params(abstract, 'float32'), size.vae)


def _block(size: Size) -> jax.Array:
  model = size.transformer
  return jnp.ones(
    (1, 3, model.latent_height, model.latent_width, model.channels)
  )


def _vae(size: Size, codec: str, *, first: bool) -> Rows:
  codec, latents = codec_of(size, codec), _block(size)
  decode = jax.jit(lambda codec, state, x: codec.decode_stream(state, x))
  state = codec.init_decode_state(1)
  if not first:
    state = decode(codec, state, latents)[1]
  cost = decode.lower(codec, state, latents).cost_analysis()
  return timed(lambda: decode(codec, state, latents), cost['flops'])


def rollout_config(size: Size, **changes: Any) -> rollout.RolloutConfig:
  return rollout.RolloutConfig(levels=LEVELS, window=size.window, **changes)


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


def pass_flops(size: Size) -> float:
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


def _one_pass(size: Size, backend: str) -> Rows:
  model = dataclasses.replace(size.transformer, attention=backend)
  run, (params, *others) = _pass_program(model, size.window)
  x, projected, past = jax.tree.map(
    lambda a: jnp.zeros(a.shape, a.dtype), tuple(others)
  )
  past = past.replace(frames=jnp.int32(size.window))
  params = random_params(params)
  compiled = run.lower(params, x, projected, past).compile()
  planned = planned_bytes(compiled)
  for row in timed(
    lambda: compiled(params, x, projected, past), pass_flops(size)
  ):
    yield row | {'plan': planned}


def _attention(size: Size, backend: str) -> Rows:
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
  return timed(lambda: run(q, k, k, backend), cost['flops'])


def _numerics(size: Size) -> Rows:
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


PROGRAMS: dict[str, Callable[[Size], Rows]] = {
  'numerics': _numerics,
  'text': _text,
  'vae': functools.partial(_vae, codec='wan', first=False),
  'vae_first': functools.partial(_vae, codec='wan', first=True),
  'tiny_vae': functools.partial(_vae, codec='tiny', first=False),
}
BY_BACKEND: dict[str, Callable[[Size, str], Rows]] = {
  'pass': _one_pass,
  'attention': _attention,
}
