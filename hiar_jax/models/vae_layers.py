"""Layers of the video VAE: pure functions (x, past) -> (y, past).

`past` holds the last input frames of a layer's causal convolutions. None means
that the video starts here; {} that the layer looks at no other frame.

`inside_BH` tells which rows belong to the frame, where some do not (see
vae_bands); None: all.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

# B batch, F frames, H rows, W columns, C channels.
Cache = dict[str, Any]


class CausalConv(nn.Module):
  """Convolution whose output frame sees no later input frame.

  Attributes:
    features: output channels.
    kernel_size: frames, rows, columns; rows and columns odd.
    dtype: compute dtype.
    stride: in time.
  """

  features: int
  kernel_size: tuple[int, int, int]
  dtype: str
  stride: int = 1

  @nn.compact
  def __call__(
    self,
    x_BFHWC: jax.Array,
    past: jax.Array | None,
    inside_BH: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    x_BFHWC = _inside(x_BFHWC, inside_BH)
    taps = self.kernel_size[0]
    batch, _, *side, channels = x_BFHWC.shape
    kernel = self.param(
      'kernel',
      nn.initializers.lecun_normal(),
      (*self.kernel_size, channels, self.features),
    )
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    if past is None:
      past = jnp.zeros((batch, taps - 1, *side, channels), x_BFHWC.dtype)
    x = jnp.concatenate([past, x_BFHWC], axis=1)
    frames = max(0, (x.shape[1] - taps) // self.stride + 1)

    y = jax.lax.platform_dependent(
      x[:, : max(0, (frames - 1) * self.stride + taps)],
      kernel.astype(x.dtype),
      bias.astype(jnp.float32),
      cuda=functools.partial(_conv_at_once, stride=self.stride),
      default=functools.partial(_conv_by_taps, stride=self.stride),
    )
    y = y.astype(self.dtype)
    return y, x[:, x.shape[1] - (taps - self.stride) :]


def _conv_by_taps(x_BFHWC, kernel, bias, *, stride):
  """A causal convolution as a sum of 2-D ones, one a tap.

  That is the arithmetic of a 3-D one, and on a CPU four times as fast. float32
  until the sum is complete.
  """
  taps, rows, columns = kernel.shape[:3]
  batch, seen, *side, channels = x_BFHWC.shape
  frames = max(0, (seen - taps) // stride + 1)
  total = bias.reshape(1, 1, 1, -1)
  for tap in range(taps):
    stop = tap + (frames - 1) * stride + 1
    x = x_BFHWC[:, tap : max(tap, stop) : stride]
    total += jax.lax.conv_general_dilated(
      x.reshape(-1, *side, channels),
      kernel[tap],
      window_strides=(1, 1),
      padding=((rows // 2, rows // 2), (columns // 2, columns // 2)),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      preferred_element_type=jnp.float32,
    )
  return total.reshape(batch, frames, *side, kernel.shape[-1])


def _conv_at_once(x_BFHWC, kernel, bias, *, stride):
  """The same as one 3-D convolution, whose results have the dtype of x.

  For GPUs: XLA computes a 16-bit convolution with float32 results in float32
  there, at half the rate and with all of its arrays converted and copied. For
  the VAE of Wan2.1 on an H100 that is three times the traffic (docs/gpu.md).
  """
  rows, columns = kernel.shape[1:3]
  y = jax.lax.conv_general_dilated(
    x_BFHWC,
    kernel,
    window_strides=(stride, 1, 1),
    padding=((0, 0), (rows // 2, rows // 2), (columns // 2, columns // 2)),
    dimension_numbers=('NDHWC', 'DHWIO', 'NDHWC'),
  )
  return y.astype(jnp.float32) + bias.reshape(1, 1, 1, 1, -1)


class RMSNorm(nn.Module):
  """x / |x| * sqrt(C) * scale over channels, in float32."""

  rank: int  # Of the scale, as checkpoints have it: ones but for channels.

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    channels = x.shape[-1]
    shape = (1,) * (self.rank - 1) + (channels,)
    scale = self.param('scale', nn.initializers.ones, shape)
    scale = scale.reshape((1,) * (x.ndim - 1) + (channels,))
    y = x.astype(jnp.float32)
    # The bound is inside the root, which has no finite slope at 0.
    square = jnp.maximum(jnp.sum(y * y, axis=-1, keepdims=True), 1e-24)
    return (y * jax.lax.rsqrt(square) * channels**0.5 * scale).astype(x.dtype)


class ResidualBlock(nn.Module):
  """Two normalised 3x3x3 convolutions beside a (projected) identity."""

  features: int
  dtype: str

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    past: Cache | None,
    inside_BH: jax.Array | None = None,
  ) -> tuple[jax.Array, Cache]:
    y, new = x, {}
    for i in (1, 2):
      name = f'conv{i}'
      y = nn.silu(RMSNorm(4, name=f'norm{i}')(y))
      conv = CausalConv(self.features, (3, 3, 3), self.dtype, name=name)
      y, new[name] = conv(y, None if past is None else past[name], inside_BH)
    if x.shape[-1] != self.features:
      x = nn.Conv(self.features, (1, 1, 1), dtype=self.dtype, name='shortcut')(
        x
      )
    return x + y, new


class Attention(nn.Module):
  """Single-head self-attention within each frame."""

  dtype: str

  @nn.compact
  def __call__(
    self, x: jax.Array, past: Cache | None
  ) -> tuple[jax.Array, Cache]:
    del past  # Frames do not see each other here.
    batch, frames, rows, columns, channels = x.shape
    y = RMSNorm(3, name='norm')(x)
    qkv = nn.Conv(3 * channels, (1, 1), dtype=self.dtype, name='qkv')(y)
    q, k, v = jnp.split(qkv.reshape(batch, frames, -1, 3 * channels), 3, -1)
    scores = jnp.einsum(
      'bfqc,bfkc->bfqk', q, k, preferred_element_type=jnp.float32
    )
    weights = jax.nn.softmax(scores * channels**-0.5).astype(self.dtype)
    y = jnp.einsum('bfqk,bfkc->bfqc', weights, v)
    y = y.reshape(batch, frames, rows, columns, channels)
    return x + nn.Conv(channels, (1, 1), dtype=self.dtype, name='proj')(y), {}


class Downsample(nn.Module):
  """Halves rows and columns, and frames after the first if temporal."""

  features: int
  temporal: bool
  dtype: str

  @nn.compact
  def __call__(
    self, x: jax.Array, past: Cache | None
  ) -> tuple[jax.Array, Cache]:
    x = nn.Conv(
      self.features,
      (3, 3),
      strides=2,
      padding=((0, 1), (0, 1)),
      dtype=self.dtype,
      name='conv',
    )(x)
    if not self.temporal:
      return x, {}
    conv = CausalConv(
      self.features, (3, 1, 1), self.dtype, stride=2, name='time_conv'
    )
    if past is not None:
      x, last = conv(x, past['time_conv'])
    else:
      # The first frame skips the filter, which then takes the others in
      # pairs, each with the frame before it.
      y, last = conv(x, x[:, :0])
      x = jnp.concatenate([x[:, :1], y], axis=1)
    return x, {'time_conv': last}


class Upsample(nn.Module):
  """Doubles rows and columns, and frames after the first if temporal."""

  features: int
  temporal: bool
  dtype: str

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    past: Cache | None,
    inside_BH: jax.Array | None = None,
  ) -> tuple[jax.Array, Cache]:
    new = {}
    if self.temporal:
      conv = CausalConv(
        2 * self.features, (3, 1, 1), self.dtype, name='time_conv'
      )
      if past is not None:
        x, new['time_conv'] = conv(x, past['time_conv'])
        x = _interleave(x)
      else:
        # The first frame stays single, and the temporal filter never sees it:
        # zeros are before the second.
        y, new['time_conv'] = conv(x[:, 1:], None)
        x = jnp.concatenate([x[:, :1], _interleave(y)], axis=1)
    x = _inside(x, inside_BH)
    x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
    conv = nn.Conv(self.features // 2, (3, 3), dtype=self.dtype, name='conv')
    return conv(x), new


class Head(nn.Module):
  """Norm, SiLU and the last 3x3x3 convolution."""

  features: int
  dtype: str

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    past: Cache | None,
    inside_BH: jax.Array | None = None,
  ) -> tuple[jax.Array, Cache]:
    x = nn.silu(RMSNorm(4, name='norm')(x))
    conv = CausalConv(self.features, (3, 3, 3), self.dtype, name='conv')
    x, last = conv(x, None if past is None else past['conv'], inside_BH)
    return x, {'conv': last}


def to_patches(x_BFHWC: jax.Array, size: int) -> jax.Array:
  """[B, F, H, W, C] -> [B, F, H / size, W / size, C * size * size]."""
  batch, frames, height, width, channels = x_BFHWC.shape
  x = x_BFHWC.reshape(
    batch, frames, height // size, size, width // size, size, channels
  )
  x = x.transpose(0, 1, 2, 4, 6, 5, 3)
  return x.reshape(*x.shape[:4], channels * size * size)


def from_patches(x_BFHWC: jax.Array, size: int) -> jax.Array:
  """Inverse of `to_patches`."""
  batch, frames, height, width, channels = x_BFHWC.shape
  x = x_BFHWC.reshape(batch, frames, height, width, -1, size, size)
  x = x.transpose(0, 1, 2, 6, 3, 5, 4)
  return x.reshape(
    batch, frames, height * size, width * size, channels // size**2
  )


def _inside(x_BFHWC: jax.Array, inside_BH: jax.Array | None) -> jax.Array:
  """Zeros in the rows that are outside of the frame, as padding is."""
  if inside_BH is None:
    return x_BFHWC
  return jnp.where(inside_BH[:, None, :, None, None], x_BFHWC, 0)


def _interleave(x_BFHWC: jax.Array) -> jax.Array:
  """[B, F, H, W, 2 C] -> [B, 2 F, H, W, C]: channel halves are two frames."""
  batch, frames, rows, columns, channels = x_BFHWC.shape
  x = x_BFHWC.reshape(batch, frames, rows, columns, 2, channels // 2)
  x = jnp.moveaxis(x, 4, 2)
  return x.reshape(batch, 2 * frames, rows, columns, channels // 2)
