"""The VAE's decoder over bands of rows: the same frames, in part of the memory.

What sees a whole frame, the attention, works on the latents' own rows, where
little is to be held. All that comes after are convolutions of three rows: a
band is computed from its rows and a margin, of which every convolution eats a
row. Outside of the frame the margin is zeros before every convolution, as the
padding of the whole is, so that nothing is approximated.

Each band keeps its own past, margin included. So bands do not wait for each
other: they are decoded in turn on one device, or side by side on several.
"""

# B batch, F frames, H rows, W columns, C channels, T bands in turn, D devices,
# N = D * B bands at a time, R rows of a band with its margins

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hiar_jax.models import vae, vae_layers

AXIS = 'decode'
# Upsamplings that are banded, the last ones: before them frames are small, and
# margins, which are computed twice, would be large beside the bands.
_BANDED = 2


@dataclasses.dataclass(frozen=True)
class Bands:
  """How the rows of a frame are divided.

  Attributes:
    in_turn: bands that a device decodes one after the other.
    mesh: whose devices along `AXIS` decode side by side; None: one device.

  Raises:
    ValueError: if there are none.
  """

  in_turn: int = 1
  mesh: Mesh | None = None

  def __post_init__(self):
    if self.in_turn < 1:
      raise ValueError(f'tiles={self.in_turn} is below 1')

  @property
  def side_by_side(self) -> int:
    """Devices."""
    return 1 if self.mesh is None else self.mesh.shape[AXIS]

  @property
  def count(self) -> int:
    """Bands of a frame; 1: it is decoded whole."""
    return self.in_turn * self.side_by_side


def make_mesh(devices: Sequence[Any], count: int) -> Mesh:
  """Over the first devices, for `Bands`.

  Raises:
    ValueError: if there are fewer.
  """
  if count > len(devices):
    raise ValueError(
      f'decode={count} devices to decode on, and there are {len(devices)}'
    )
  grid = np.array(devices[:count])
  return Mesh(grid, (AXIS,), axis_types=(AxisType.Auto,))


def rows_where_cut(cfg: vae.VAEConfig, latent_height: int) -> int:
  """Rows of a frame where bands are cut; there are no more bands than that."""
  layers = vae.decoder_layers(cfg)
  whole = layers[: _cut_at(layers)]
  return latent_height * 2 ** sum(
    isinstance(layer, vae_layers.Upsample) for layer in whole
  )


def check(cfg: vae.VAEConfig, latent_height: int, bands: Bands) -> None:
  """Raises ValueError if there are more bands than rows where they are cut."""
  rows = rows_where_cut(cfg, latent_height)
  if bands.count > rows:
    raise ValueError(
      f'{bands.count} tiles of frames that have {rows} rows where they are cut'
    )


def decode_block(
  cfg: vae.VAEConfig,
  params: vae.Params,
  cache: vae.Cache | None,
  latents_BFHWC: jax.Array,
  *,
  first: bool,
  bands: Bands,
) -> tuple[jax.Array, vae.Cache]:
  """`vae.decode_block` by bands; of several, caches have another structure.

  Raises:
    ValueError: if the channels are not z_dim; see `check`.
  """
  if bands.count == 1:
    return vae.decode_block(cfg, params, cache, latents_BFHWC, first=first)
  z = vae.denormalised(cfg, latents_BFHWC)
  decoder, batch = {'params': params['decoder']}, len(z)
  past: vae.Cache = {} if first or cache is None else cache
  x, front = _Front(cfg).apply(decoder, z, past.get('front'))
  layers = vae.decoder_layers(cfg)
  rows, margin = x.shape[2], _needed(layers[_cut_at(layers) :])[0]
  check(cfg, latents_BFHWC.shape[2], bands)
  core = -(-rows // bands.count)
  last = bands.count * core - rows + margin
  x = jnp.pad(x, ((0, 0), (0, 0), (margin, last), (0, 0), (0, 0)))
  # Band d * T + t is device d's at turn t.
  starts_TD = core * jnp.arange(bands.count).reshape(-1, bands.in_turn).T

  def decode(past: vae.Cache | None, turn: Any) -> tuple[jax.Array, vae.Cache]:
    """Its frames [N, F, R, W, C] and its new past."""
    starts_D = starts_TD[turn]
    cut = jax.vmap(
      lambda start: jax.lax.dynamic_slice_in_dim(
        x, start, core + 2 * margin, axis=2
      )
    )(starts_D)
    cut = _side_by_side(cut.reshape(-1, *cut.shape[2:]), bands)
    tops_N = jnp.repeat(starts_D - margin, batch)
    frames, past = _Back(cfg).apply(decoder, cut, past, tops_N, rows)
    return _side_by_side(frames, bands), _side_by_side(past, bands)

  shapes = jax.eval_shape(lambda: decode(None, 0)[1])
  kept = past.get('bands')
  if first:
    kept = jax.tree.map(
      lambda a: jnp.zeros((bands.in_turn, *a.shape), a.dtype), shapes
    )

  def body(kept: Any, turn: jax.Array) -> tuple[Any, jax.Array]:
    past = None
    if not first:
      past = jax.tree.map(
        lambda a: jax.lax.dynamic_index_in_dim(a, turn, keepdims=False), kept
      )
    frames, past = decode(past, turn)
    kept = jax.tree.map(
      lambda a, new: jax.lax.dynamic_update_index_in_dim(a, new, turn, 0),
      *(kept, past),
    )
    return kept, frames

  # The pasts are carried, and written where they lie.
  kept, frames = jax.lax.scan(body, kept, jnp.arange(bands.in_turn))
  # [T, D, B, F, R, W, C] to [B, F, D, T, R, W, C]
  frames = frames.reshape(bands.in_turn, -1, batch, *frames.shape[2:])
  frames = jnp.moveaxis(frames, (2, 3, 1, 0), (0, 1, 2, 3))
  frames = frames.reshape(*frames.shape[:2], -1, *frames.shape[-2:])
  height = latents_BFHWC.shape[2] * cfg.space_factor
  return frames[:, :, :height], {'front': front, 'bands': kept}


def init_decode_cache(
  cfg: vae.VAEConfig,
  batch: int,
  latent_height: int,
  latent_width: int,
  bands: Bands,
) -> vae.Cache:
  """Zeros in the shapes of decode_block's cache, for a given latent size."""
  z = jnp.zeros((batch, 1, latent_height, latent_width, cfg.z_dim))
  params = jax.eval_shape(lambda: vae.init(cfg, jax.random.key(0)))
  cache = jax.eval_shape(
    lambda params: decode_block(cfg, params, None, z, first=True, bands=bands)[
      1
    ],
    params,
  )
  return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), cache)


def decode_bytes(
  cfg: vae.VAEConfig,
  bands: Bands,
  *,
  frames: int,
  latent_height: int,
  latent_width: int,
  platform: str = 'tpu',
) -> int:
  """About what decoding a block takes of a device, weights left out.

  The pasts are counted. The temporaries are taken to be some float32 arrays of
  the widest layers, as XLA compiles it (docs/tpu.md, docs/gpu.md): of full
  frames, or a band of them, and of those before the cut, if there is one.

  Args:
    cfg: of the VAE.
    bands: how frames are divided.
    frames: latent frames of a block.
    latent_height: rows of a latent frame.
    latent_width: columns.
    platform: of the device.
  """
  cache = jax.eval_shape(
    lambda: init_decode_cache(cfg, 1, latent_height, latent_width, bands)
  )
  held = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache))
  layers = vae.decoder_layers(cfg)
  ups = [i for i, a in enumerate(layers) if isinstance(a, vae_layers.Upsample)]
  after = ups[-1] + 1 if ups else 0
  size = 2 ** len(ups)
  columns, rows = latent_width * size, latent_height * size
  full = frames * cfg.time_factor * columns * cfg.widths[0] * 4
  arrays, before = (3, 0) if platform == 'gpu' else (8.3, 6.5)
  if bands.count == 1:
    return int(held + arrays * full * rows)
  cut = rows_where_cut(cfg, latent_height)
  core = -(-cut // bands.count) * rows // cut
  band = core + 2 * _needed(layers[after:])[0]
  level = sum(i < _cut_at(layers) for i in ups)
  temporal = 2 ** sum(cfg.temporal_downsample[::-1][:level])
  front = frames * temporal * cut * (latent_width * cut // latent_height)
  front *= cfg.widths[::-1][level] * 4
  return int(held / bands.side_by_side + arrays * full * band + before * front)


class _Front(nn.Module):
  """The decoder's layers on whole frames."""

  cfg: vae.VAEConfig

  @nn.compact
  def __call__(
    self, z_BFHWC: jax.Array, past: vae.Cache | None
  ) -> tuple[jax.Array, vae.Cache]:
    x = vae.post_quant(self.cfg, z_BFHWC)
    layers = vae.decoder_layers(self.cfg)
    return vae.thread(layers[: _cut_at(layers)], x, past)


class _Back(nn.Module):
  """The decoder's layers on bands."""

  cfg: vae.VAEConfig

  @nn.compact
  def __call__(
    self,
    x_NFRWC: jax.Array,
    past: vae.Cache | None,
    tops_N: jax.Array,
    rows: int,
  ) -> tuple[jax.Array, vae.Cache]:
    """Frames of the bands without margins, float32, and their pasts.

    Args:
      x_NFRWC: with margins.
      past: of the same bands.
      tops_N: their first rows, where a frame's first one is 0.
      rows: of a frame.
    """
    layers = vae.decoder_layers(self.cfg)
    layers = layers[_cut_at(layers) :]
    needed, new, x = _needed(layers), {}, x_NFRWC
    margin = needed[0]
    for layer, needed_after in zip(layers, needed[1:], strict=True):
      rows_NR = tops_N[:, None] + jnp.arange(x.shape[2])[None]
      x, new[layer.name] = layer(
        x,
        None if past is None else past[layer.name],
        inside_BH=(rows_NR >= 0) & (rows_NR < rows),
      )
      if isinstance(layer, vae_layers.Upsample):
        # What the layers to come do not need is left out.
        spare = 2 * margin - needed_after
        x = x[:, :, spare : x.shape[2] - spare]
        tops_N, rows, margin = 2 * tops_N + spare, 2 * rows, needed_after
    x = x[:, :, margin : x.shape[2] - margin].astype(jnp.float32)
    return vae_layers.from_patches(x, self.cfg.patch_size), new


def _cut_at(layers: Sequence[nn.Module]) -> int:
  """Index of the first layer that is banded."""
  ups = [i for i, a in enumerate(layers) if isinstance(a, vae_layers.Upsample)]
  return ups[-min(_BANDED, len(ups))] if ups else len(layers) - 1


def _needed(layers: Sequence[nn.Module]) -> list[int]:
  """Rows of margin that are right before each layer, and after the last."""
  needed = [0]
  for layer in reversed(layers):
    if isinstance(layer, vae_layers.ResidualBlock):
      needed.append(needed[-1] + 2)
    elif isinstance(layer, vae_layers.Upsample):
      needed.append((needed[-1] + 2) // 2)
    else:
      needed.append(needed[-1] + 1)
  return needed[::-1]


def _side_by_side(tree: Any, bands: Bands) -> Any:
  """Arrays [N, ...] laid out over the devices that decode."""
  if bands.mesh is None:
    return tree
  place = NamedSharding(bands.mesh, PartitionSpec(AXIS))
  return jax.tree.map(
    lambda a: jax.lax.with_sharding_constraint(a, place), tree
  )
