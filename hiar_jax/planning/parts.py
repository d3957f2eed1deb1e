"""Do the text encoder and the VAEs fit one chip? See planning/stream.py.

They run beside the stream, or before and after it, on one chip: the encoder
once a prompt, a VAE's decoder once a block, from its cache. The large VAE's may
be divided over several.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from hiar_jax.codecs import tiny
from hiar_jax.models import tiny_vae, umt5, vae, vae_bands
from hiar_jax.planning import chips, compiled
from hiar_jax.planning import stream as planning_stream


@dataclasses.dataclass(frozen=True)
class PartPlan:
  """What a part needs of the one chip that it runs on.

  Attributes:
    title: what was compiled.
    topology: its first chip is taken.
    weights: bytes of its weights.
    state: bytes that it keeps between two calls.
    flops: of a call.
    flops_from: who counted them.
    program: what the compiler says.
    shared_by: chips that share it.
  """

  title: str
  topology: str
  weights: int
  state: int
  flops: float
  flops_from: str
  program: compiled.Program
  shared_by: int = 1

  @property
  def chip(self) -> chips.Chip:
    return chips.chip_of(self.topology)

  @property
  def total(self) -> int:
    """Bytes, as far as they are known."""
    return self.program.arguments + (self.program.temporaries or 0)

  @property
  def fits(self) -> bool:
    return self.program.temporaries is not None and self.total <= self.chip.hbm

  def table(self) -> str:
    """A Markdown table."""
    gigabytes, program = planning_stream.gigabytes, self.program
    at_best = program.at_best(self.topology)
    room = f'{gigabytes(self.total)} of {gigabytes(self.chip.hbm)}'
    fits = f'yes: {room}' if self.fits else f'no: {program.refusal or room}'
    shortest = self.flops / self.chip.peak
    other = program.arguments - self.weights - self.state
    temporaries = 'unknown'
    if program.temporaries is not None:
      temporaries = gigabytes(program.temporaries)
    return planning_stream.markdown(
      [
        (
          self.title,
          f'one chip of {self.topology}'
          if self.shared_by == 1
          else f'each of {self.shared_by} chips of {self.topology}',
        ),
        ('fits', fits),
        ('weights', gigabytes(self.weights)),
        ('state between calls', gigabytes(self.state)),
        ('other arguments', gigabytes(other)),
        ('temporaries', temporaries),
        *planning_stream.largest_rows(program.hlo),
        ('FLOPs', f'{self.flops / 1e12:.3g} T, {self.flops_from}'),
        (
          'time at peak rate (modelled)',
          f'{1e3 * shortest:.1f} ms at {self.chip.peak / 1e12:.0f} TFLOP/s',
        ),
        (
          "compiler's time estimate",
          planning_stream.compiler_estimate(program.compiler_seconds, shortest),
        ),
        *(at_best.rows() if at_best else ()),
        ('compiling took', f'{program.compile_seconds:.0f} s'),
      ]
    )


def plan_vae_decode(
  cfg: vae.VAEConfig,
  topology: str,
  *,
  frames: int,
  latent_height: int,
  latent_width: int,
  weights_dtype: str,
  tiles: int = 1,
  decode: int = 1,
) -> PartPlan:
  """Compiles the decoding of a stream's later blocks.

  Args:
    cfg: of the VAE.
    topology: see `chips.describe`.
    frames: latent frames of a block.
    latent_height: rows of a latent frame.
    latent_width: columns.
    weights_dtype: in which the weights are held.
    tiles: bands of rows that a chip decodes in turn, see `models.vae_bands`.
    decode: chips that share the rows.

  Raises:
    ValueError: see `chips.describe`; if there are fewer chips.
  """
  place, mesh = _placer(topology), None
  if decode > 1:
    mesh = vae_bands.make_mesh(chips.describe(topology).devices, decode)
    place = _placer_of(NamedSharding(mesh, PartitionSpec()))
  bands = vae_bands.Bands(tiles, mesh)
  params = jax.eval_shape(lambda: vae.init(cfg, jax.random.key(0)))
  decoder = place({'decoder': params['decoder']}, weights_dtype)
  shapes = jax.eval_shape(
    lambda: vae_bands.init_decode_cache(
      cfg, 1, latent_height, latent_width, bands
    )
  )
  cache = place(shapes)
  if mesh is not None:
    by_band = NamedSharding(mesh, PartitionSpec(None, vae_bands.AXIS))
    cache['bands'] = _placer_of(by_band)(shapes['bands'])
  latents = place(
    jax.ShapeDtypeStruct(
      (1, frames, latent_height, latent_width, cfg.z_dim), jnp.float32
    )
  )

  def decode_block(params, cache, latents):
    return vae_bands.decode_block(
      cfg, params, cache, latents, first=False, bands=bands
    )

  run = jax.jit(decode_block, donate_argnums=1)
  program = compiled.compile_program(run, (decoder, cache, latents))
  title = f'VAE decode, {frames} latent frames'
  if tiles > 1:
    title += f', {tiles} tiles'
  return _decode_plan(
    *(title, topology, decoder, cache, program),
    turns=tiles,
    shared_by=decode,
  )


def plan_tiny_vae_decode(
  topology: str, *, frames: int, latent_height: int, latent_width: int
) -> PartPlan:
  """Compiles the decoding of a stream's later blocks by the tiny VAE.

  In float32, as a pipeline runs it; arguments as of `plan_vae_decode`.

  Raises:
    ValueError: see `chips.describe`.
  """
  place = _placer(topology)
  decoder = place(
    {
      # Kernels in the order that they are run in, see weights.tiny_vae_files.
      name: jax.ShapeDtypeStruct(shape[2:] + shape[1::-1], jnp.float32)
      for name, shape in tiny_vae.shapes().items()
      if name.startswith('decoder')
    }
  )
  shape = (1, frames, latent_height, latent_width, tiny_vae.CHANNELS)
  latents = place(jax.ShapeDtypeStruct(shape, jnp.float32))

  def decode(params, state, latents):
    return tiny.TinyCodec(params).decode_stream(state, latents)

  state = place(jax.eval_shape(decode, decoder, (), latents)[1])
  run = jax.jit(decode, donate_argnums=1)
  program = compiled.compile_program(run, (decoder, state, latents))
  return _decode_plan(
    *(f'tiny VAE decode, {frames} latent frames', topology),
    *(decoder, state, program),
  )


def _decode_plan(title, topology, params, state, program, turns=1, shared_by=1):
  # No kernel is in these programs, so the compiler counts them in full, but of
  # a loop one turn; that of GPUs counts nothing.
  at_best, compilers = program.at_best(topology), program.flops
  if turns > 1 and at_best:
    compilers = None
  count = compilers or (at_best.total.flops if at_best else 0.0)
  return PartPlan(
    title=title,
    topology=topology,
    weights=compiled.bytes_per_chip(params),
    state=compiled.bytes_per_chip(state),
    flops=count,
    flops_from="the compiler's count" if compilers else 'of the program',
    program=program,
    shared_by=shared_by,
  )


def plan_text_encoder(
  cfg: umt5.UMT5Config,
  topology: str,
  *,
  tokens: int,
  weights_dtype: str,
) -> PartPlan:
  """Compiles the encoding of one prompt.

  Args:
    cfg: of the encoder.
    topology: see `chips.describe`.
    tokens: of a prompt, padding included.
    weights_dtype: in which the weights are held.

  Raises:
    ValueError: see `chips.describe`.
  """
  place = _placer(topology)
  params = place(
    jax.eval_shape(lambda: umt5.init(cfg, jax.random.key(0))), weights_dtype
  )
  ids = place(jax.ShapeDtypeStruct((1, tokens), jnp.int32))

  def encode(params, ids, mask):
    return umt5.encode(cfg, params, ids, mask)

  program = compiled.compile_program(jax.jit(encode), (params, ids, ids))
  return PartPlan(
    title=f'text encoder, {tokens} tokens',
    topology=topology,
    weights=compiled.bytes_per_chip(params),
    state=0,
    flops=text_flops(cfg, tokens),
    flops_from='2 N L (4 D A + 3 D E) + 4 N L² A',
    program=program,
  )


def text_flops(cfg: umt5.UMT5Config, tokens: int) -> float:
  """Matrix products of one prompt: L tokens, N layers, widths D, A, E."""
  linear = 4 * cfg.dim * cfg.attention_dim + 3 * cfg.dim * cfg.ffn_dim
  attention = 4 * tokens * cfg.attention_dim
  return float(cfg.num_layers * tokens * (2 * linear + attention))


def _placer(topology: str) -> Callable[..., Any]:
  """A function that puts abstract arrays on the topology's first chip."""
  return _placer_of(SingleDeviceSharding(chips.describe(topology).devices[0]))


def _placer_of(sharding: Any) -> Callable[..., Any]:
  """Likewise, for a sharding of all of them."""

  def place(tree: Any, dtype: Any = None) -> Any:
    return jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(
        a.shape, dtype or a.dtype, sharding=sharding
      ),
      tree,
    )

  return place
