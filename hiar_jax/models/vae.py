"""Causal video VAE of Wan2.1: 8x in space, 4x in time, streamed both ways.

1 + 4k pixel frames <-> 1 + k latent frames: the first frame stands alone.
Every layer (see vae_layers) is a pure function (x, past) -> (y, past), where
`past` holds the last input frames of its convolutions, or is None before the
first frame. One block after another therefore gives the frames of one call for
all of them, in memory that does not grow with the video.

Architecture: Wan2.1 (arXiv:2503.20314), section on the spatio-temporal VAE.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from hiar_jax.models import config as model_config
from hiar_jax.models import vae_layers

# B batch, F frames, H rows, W columns, C channels. Latents have F, H, W of
# their own: a latent frame is 1/8 of a pixel frame a side.
Params = dict[str, Any]
Cache = vae_layers.Cache

# fmt: off
_WAN_MEAN = (
  -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
  0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
_WAN_STD = (
  2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
  3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
# fmt: on


@dataclasses.dataclass(frozen=True)
class VAEConfig:
  """Sizes of the VAE and the statistics of its latents.

  Attributes:
    base_dim: width of the first level.
    z_dim: latent channels.
    dim_mult: width of each level over base_dim, from pixels to latents; every
      level but the last halves the sides.
    num_res_blocks: residual blocks of a level (the decoder has one more).
    temporal_downsample: whether each level but the last halves the frames.
    mean: of the raw latents, one a channel.
    std: of the raw latents, one a channel.
    dtype: compute dtype; norms, softmax and the latents are float32.
    patch_size: side of the pixel patches that are the first level's channels:
      1 in Wan2.1; 2, as in Wan2.2, halves the sides once more.

  Raises:
    ValueError: naming the size that does not fit.
  """

  base_dim: int
  z_dim: int
  dim_mult: tuple[int, ...]
  num_res_blocks: int
  temporal_downsample: tuple[bool, ...]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  dtype: str = 'float32'
  patch_size: int = 1

  def __post_init__(self):
    if self.patch_size < 1:
      raise ValueError(f'patch_size={self.patch_size} is not positive')
    # A ConfigDict hands over lists, and a static argument must hash.
    for name in ('dim_mult', 'temporal_downsample', 'mean', 'std'):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    if len(self.temporal_downsample) != len(self.dim_mult) - 1:
      raise ValueError(
        f'temporal_downsample={self.temporal_downsample} must have one entry '
        f'fewer than dim_mult={self.dim_mult}'
      )
    for name in ('mean', 'std'):
      if len(getattr(self, name)) != self.z_dim:
        raise ValueError(
          f'{name} has {len(getattr(self, name))} entries, z_dim={self.z_dim}'
        )
    for level, width in enumerate(self.widths[1:], start=1):
      if width % 2:
        raise ValueError(
          f'level {level} is {width} wide, which the decoder cannot halve'
        )
    if self.dtype not in model_config.DTYPES:
      raise ValueError(
        f'dtype={self.dtype!r} is not one of {model_config.DTYPES}'
      )

  @classmethod
  def wan(cls, dtype: str = 'bfloat16') -> Self:
    """The VAE released with Wan2.1, for weights from its checkpoint."""
    return cls(
      base_dim=96,
      z_dim=16,
      dim_mult=(1, 2, 4, 4),
      num_res_blocks=2,
      temporal_downsample=(False, True, True),
      mean=_WAN_MEAN,
      std=_WAN_STD,
      dtype=dtype,
    )

  @property
  def widths(self) -> tuple[int, ...]:
    """Channels of each level, from pixels to latents."""
    return tuple(self.base_dim * mult for mult in self.dim_mult)

  @property
  def space_factor(self) -> int:
    """Pixels per latent along a side."""
    return self.patch_size * 2 ** len(self.temporal_downsample)

  @property
  def time_factor(self) -> int:
    """Pixel frames per latent frame, after the first."""
    return 2 ** sum(self.temporal_downsample)


def init(cfg: VAEConfig, key: jax.Array) -> Params:
  """Random float32 parameters {'encoder': ..., 'decoder': ...}.

  Kernels are normal with variance 1 / fan_in, scales 1 and biases 0.
  """
  side = cfg.space_factor
  video = jnp.zeros((1, 1, side, side, 3))
  z = jnp.zeros((1, 1, 1, 1, cfg.z_dim))
  leaves, tree = jax.tree_util.tree_flatten_with_path(
    {
      name: jax.eval_shape(network(cfg).init, key, x, None)['params']
      for name, network, x in (
        ('encoder', Encoder, video),
        ('decoder', Decoder, z),
      )
    }
  )
  # One draw for all kernels: a CPU takes seconds to compile one of each shape.
  noise = jax.random.normal(
    key, (sum(a.size for path, a in leaves if path[-1].key == 'kernel'),)
  )
  start, params = 0, []
  for path, leaf in leaves:
    if path[-1].key == 'kernel':
      fan_in = leaf.size // leaf.shape[-1]
      value = noise[start : start + leaf.size].reshape(leaf.shape)
      params.append(value * fan_in**-0.5)
      start += leaf.size
    else:
      constant = jnp.ones if path[-1].key == 'scale' else jnp.zeros
      params.append(constant(leaf.shape))
  return jax.tree.unflatten(tree, params)


def posterior(
  cfg: VAEConfig, params: Params, video_BFHWC: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Mean and log variance of the raw (not normalised) latents, for training.

  Args:
    cfg: of the VAE.
    params: needs 'encoder'.
    video_BFHWC: [B, 1 + 4k, H, W, 3] in [-1, 1].

  Returns:
    Two float32 arrays [B, 1 + k, H / 8, W / 8, z_dim].

  Raises:
    ValueError: if a size is not a multiple of what the VAE takes.
  """
  _check_video(cfg, video_BFHWC, first=True)
  mean, log_var, _ = _encode(cfg, params, None, video_BFHWC)
  return mean, log_var


def encode(cfg: VAEConfig, params: Params, video_BFHWC: jax.Array) -> jax.Array:
  """Normalised latents (the posterior's mean) of a whole video at once.

  Args:
    cfg: of the VAE.
    params: needs 'encoder'.
    video_BFHWC: [B, 1 + 4k, H, W, 3] in [-1, 1].

  Returns:
    float32 [B, 1 + k, H / 8, W / 8, z_dim].

  Raises:
    ValueError: if a size is not a multiple of what the VAE takes.
  """
  return encode_block(cfg, params, None, video_BFHWC, first=True)[0]


def decode(
  cfg: VAEConfig, params: Params, latents_BFHWC: jax.Array
) -> jax.Array:
  """Frames of all latents at once.

  Args:
    cfg: of the VAE.
    params: needs 'decoder'.
    latents_BFHWC: normalised, [B, 1 + k, H, W, z_dim].

  Returns:
    float32 [B, 1 + 4k, 8 H, 8 W, 3]; -1 is black and 1 white, not clipped.

  Raises:
    ValueError: if the channels are not z_dim.
  """
  return decode_block(cfg, params, None, latents_BFHWC, first=True)[0]


def encode_block(
  cfg: VAEConfig,
  params: Params,
  cache: Cache | None,
  video_BFHWC: jax.Array,
  *,
  first: bool,
) -> tuple[jax.Array, Cache]:
  """Latents of the next pixel frames of a stream.

  Args:
    cfg: of the VAE.
    params: needs 'encoder'.
    cache: of the block before; not read, and may be None, if `first`.
    video_BFHWC: [B, 1 + 4k, H, W, 3] if `first`, else [B, 4k, H, W, 3].
    first: whether a video starts here; static.

  Returns:
    Normalised float32 latents [B, k (+ 1 if first), H / 8, W / 8, z_dim], and
    the cache for the next block, of the same shapes whatever the block's size.

  Raises:
    ValueError: if a size is not a multiple of what the VAE takes.
  """
  _check_video(cfg, video_BFHWC, first)
  mean, _, cache = _encode(cfg, params, None if first else cache, video_BFHWC)
  return (mean - _per_channel(cfg.mean)) / _per_channel(cfg.std), cache


def decode_block(
  cfg: VAEConfig,
  params: Params,
  cache: Cache | None,
  latents_BFHWC: jax.Array,
  *,
  first: bool,
) -> tuple[jax.Array, Cache]:
  """Frames of the next latents of a stream.

  Args:
    cfg: of the VAE.
    params: needs 'decoder'.
    cache: of the block before; not read, and may be None, if `first`.
    latents_BFHWC: normalised, [B, F, H, W, z_dim], any F.
    first: whether a video starts here; static.

  Returns:
    float32 frames [B, 4 F (- 3 if first), 8 H, 8 W, 3], not clipped, and the
    cache for the next block, of the same shapes whatever the block's size.

  Raises:
    ValueError: if the channels are not z_dim.
  """
  z = denormalised(cfg, latents_BFHWC)
  return Decoder(cfg).apply(
    {'params': params['decoder']}, z, None if first else cache
  )


def denormalised(cfg: VAEConfig, latents_BFHWC: jax.Array) -> jax.Array:
  """Raw latents of normalised ones; errors as `decode_block`."""
  if latents_BFHWC.ndim != 5 or latents_BFHWC.shape[-1] != cfg.z_dim:
    raise ValueError(
      f'latents of shape {latents_BFHWC.shape} are not '
      f'[batch, frames, rows, columns, z_dim={cfg.z_dim}]'
    )
  return latents_BFHWC * _per_channel(cfg.std) + _per_channel(cfg.mean)


def init_encode_cache(
  cfg: VAEConfig, batch: int, video_height: int, video_width: int
) -> Cache:
  """Zeros in the shapes of encode_block's cache, for a given pixel size."""
  video = jnp.zeros((batch, 1, video_height, video_width, 3))
  _check_video(cfg, video, first=True)
  return _zero_cache(Encoder(cfg), video)


def init_decode_cache(
  cfg: VAEConfig, batch: int, latent_height: int, latent_width: int
) -> Cache:
  """Zeros in the shapes of decode_block's cache, for a given latent size."""
  z = jnp.zeros((batch, 1, latent_height, latent_width, cfg.z_dim))
  return _zero_cache(Decoder(cfg), z)


def encode_in_blocks(
  cfg: VAEConfig,
  params: Params,
  video_BFHWC: jax.Array,
  *,
  frames_per_block: int,
) -> jax.Array:
  """Equals `encode`; activations are those of `frames_per_block` frames.

  Raises:
    ValueError: if the frames after the first do not fill whole blocks.
  """
  step = lambda cache, x, first: encode_block(
    cfg, params, cache, x, first=first
  )
  return _in_blocks(step, video_BFHWC, frames_per_block)


def decode_in_blocks(
  cfg: VAEConfig,
  params: Params,
  latents_BFHWC: jax.Array,
  *,
  frames_per_block: int,
) -> jax.Array:
  """Equals `decode`; activations are those of `frames_per_block` latents.

  Raises:
    ValueError: if the latents after the first do not fill whole blocks.
  """
  step = lambda cache, z, first: decode_block(
    cfg, params, cache, z, first=first
  )
  return _in_blocks(step, latents_BFHWC, frames_per_block)


class Encoder(nn.Module):
  """Pixels to (mean, log variance) side by side, [..., 2 z_dim], float32."""

  cfg: VAEConfig

  @nn.compact
  def __call__(
    self, x_BFHWC: jax.Array, past: Cache | None
  ) -> tuple[jax.Array, Cache]:
    cfg = self.cfg
    x_BFHWC = vae_layers.to_patches(x_BFHWC, cfg.patch_size)
    layers = [_conv3(cfg, cfg.widths[0], 'conv_in')]
    for level, width in enumerate(cfg.widths):
      for _ in range(cfg.num_res_blocks):
        name = f'down_{len(layers) - 1}'
        layers.append(vae_layers.ResidualBlock(width, cfg.dtype, name=name))
      if level < len(cfg.temporal_downsample):
        temporal = cfg.temporal_downsample[level]
        name = f'down_{len(layers) - 1}'
        layers.append(
          vae_layers.Downsample(width, temporal, cfg.dtype, name=name)
        )
    layers += _middle(cfg)
    layers.append(vae_layers.Head(2 * cfg.z_dim, cfg.dtype, name='head'))
    x, past = thread(layers, x_BFHWC.astype(cfg.dtype), past)
    x = nn.Conv(2 * cfg.z_dim, (1, 1, 1), dtype=cfg.dtype, name='quant')(x)
    return x.astype(jnp.float32), past


class Decoder(nn.Module):
  """Raw latents to float32 pixels."""

  cfg: VAEConfig

  @nn.compact
  def __call__(
    self, z_BFHWC: jax.Array, past: Cache | None
  ) -> tuple[jax.Array, Cache]:
    cfg = self.cfg
    x, past = thread(decoder_layers(cfg), post_quant(cfg, z_BFHWC), past)
    x = vae_layers.from_patches(x.astype(jnp.float32), cfg.patch_size)
    return x, past


def post_quant(cfg: VAEConfig, z_BFHWC: jax.Array) -> jax.Array:
  """What the decoder begins with, of a module that calls it."""
  x = z_BFHWC.astype(cfg.dtype)
  return nn.Conv(cfg.z_dim, (1, 1, 1), dtype=cfg.dtype, name='post_quant')(x)


def decoder_layers(cfg: VAEConfig) -> list[nn.Module]:
  """All that follows, in order, each under its name in the parameters."""
  layers = [_conv3(cfg, cfg.widths[-1], 'conv_in'), *_middle(cfg)]
  before = len(layers)
  temporals = cfg.temporal_downsample[::-1]
  for level, width in enumerate(cfg.widths[::-1]):
    for _ in range(cfg.num_res_blocks + 1):
      name = f'up_{len(layers) - before}'
      layers.append(vae_layers.ResidualBlock(width, cfg.dtype, name=name))
    if level < len(temporals):
      name = f'up_{len(layers) - before}'
      layers.append(
        vae_layers.Upsample(width, temporals[level], cfg.dtype, name=name)
      )
  features = 3 * cfg.patch_size**2
  layers.append(vae_layers.Head(features, cfg.dtype, name='head'))
  return layers


def _conv3(cfg: VAEConfig, features: int, name: str) -> vae_layers.CausalConv:
  return vae_layers.CausalConv(features, (3, 3, 3), cfg.dtype, name=name)


def _middle(cfg: VAEConfig) -> list[nn.Module]:
  return [
    vae_layers.ResidualBlock(cfg.widths[-1], cfg.dtype, name='middle_0'),
    vae_layers.Attention(cfg.dtype, name='middle_1'),
    vae_layers.ResidualBlock(cfg.widths[-1], cfg.dtype, name='middle_2'),
  ]


def thread(
  layers: Sequence[nn.Module], x: jax.Array, past: Cache | None
) -> tuple[jax.Array, Cache]:
  """Runs layers in order; each finds its past under its own name."""
  new = {}
  for layer in layers:
    x, new[layer.name] = layer(x, None if past is None else past[layer.name])
  return x, new


def _encode(
  cfg: VAEConfig, params: Params, past: Cache | None, video_BFHWC: jax.Array
) -> tuple[jax.Array, jax.Array, Cache]:
  moments, past = Encoder(cfg).apply(
    {'params': params['encoder']}, video_BFHWC, past
  )
  mean, log_var = jnp.split(moments, 2, axis=-1)
  return mean, log_var, past


def _per_channel(values: tuple[float, ...]) -> jax.Array:
  return jnp.asarray(values, jnp.float32).reshape(1, 1, 1, 1, -1)


def _check_video(cfg: VAEConfig, video_BFHWC: jax.Array, first: bool) -> None:
  shape = video_BFHWC.shape
  if len(shape) != 5 or shape[-1] != 3:
    raise ValueError(
      f'video of shape {shape} is not [batch, frames, rows, columns, 3]'
    )
  for side in shape[2:4]:
    if side % cfg.space_factor:
      raise ValueError(
        f'{shape[2]}x{shape[3]} pixels are not multiples of {cfg.space_factor}'
      )
  frames, whole = shape[1], '1 + ' * first + f'{cfg.time_factor} k'
  if frames < first or (frames - first) % cfg.time_factor:
    raise ValueError(f'{frames} frames are not {whole}')


def _zero_cache(network: nn.Module, x: jax.Array) -> Cache:
  (_, cache), _ = jax.eval_shape(
    lambda key: network.init_with_output(key, x, None), jax.random.key(0)
  )
  return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), cache)


def _in_blocks(
  step: Callable[[Cache | None, jax.Array, bool], tuple[jax.Array, Cache]],
  x: jax.Array,
  frames_per_block: int,
) -> jax.Array:
  """The first frame alone, then a scan over blocks of the others."""
  batch, frames = x.shape[:2]
  if (frames - 1) % frames_per_block:
    raise ValueError(
      f'{frames - 1} frames after the first do not fill blocks of '
      f'frames_per_block={frames_per_block}'
    )
  head, cache = step(None, x[:, :1], True)
  blocks = x[:, 1:].reshape(batch, -1, frames_per_block, *x.shape[2:])

  def body(cache: Cache, block: jax.Array) -> tuple[Cache, jax.Array]:
    y, cache = step(cache, block, False)
    return cache, y

  _, tail = jax.lax.scan(body, cache, jnp.moveaxis(blocks, 1, 0))
  tail = jnp.moveaxis(tail, 0, 1).reshape(batch, -1, *head.shape[2:])
  return jnp.concatenate([head, tail], axis=1)
