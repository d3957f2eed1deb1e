"""Principal components of pixel patches: a codec that is fitted, not trained.

B batch, F frames, H height, W width, C latent channels, P values of a patch.
"""

import os
from collections.abc import Iterable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from hiar_jax.runtime import files

_RGB = 3


@struct.dataclass
class LinearCodec:
  """Whitened principal components of square pixel patches, frame by frame.

  Attributes:
    mean_P: mean patch, P = stride * stride * 3.
    encoder_PC: from a patch without its mean to channels of unit variance.
    decoder_CP: the encoder's pseudo-inverse.
    spatial_stride: side of a patch in px.
  """

  mean_P: jax.Array
  encoder_PC: jax.Array
  decoder_CP: jax.Array
  spatial_stride: int = struct.field(pytree_node=False)

  @property
  def temporal_stride(self) -> int:
    return 1

  @property
  def channels(self) -> int:
    return self.decoder_CP.shape[0]

  def encode(self, video_BFHWC: jax.Array) -> jax.Array:
    """Encodes pixels.

    Args:
      video_BFHWC: float [B, F, H, W, 3] in [-1, 1].

    Returns:
      float32 [B, F, H / stride, W / stride, C].

    Raises:
      ValueError: if H or W is not a multiple of the stride.
    """
    patches = to_patches(video_BFHWC, self.spatial_stride)
    # HIGHEST: the default of a TPU rounds the factors to bfloat16, and of some
    # GPUs to TF32, which alone costs more than the dropped components do.
    return jnp.matmul(
      patches.astype(jnp.float32) - self.mean_P[(None,) * 4],
      self.encoder_PC,
      precision=jax.lax.Precision.HIGHEST,
    )

  def decode(self, latents_BFHWC: jax.Array) -> jax.Array:
    """Decodes latents to float32 [B, F, H * stride, W * stride, 3]."""
    patches = jnp.matmul(
      latents_BFHWC.astype(jnp.float32),
      self.decoder_CP,
      precision=jax.lax.Precision.HIGHEST,
    )
    patches = patches + self.mean_P[(None,) * 4]
    return jnp.clip(from_patches(patches, self.spatial_stride), -1.0, 1.0)

  def init_decode_state(self, batch_size: int) -> tuple[()]:
    """The state before the first frame: nothing, frames are independent."""
    del batch_size
    return ()

  def decode_stream(
    self, state: tuple[()], latents_BFHWC: jax.Array
  ) -> tuple[jax.Array, tuple[()]]:
    """Decodes the next latent frames: their pixels and the state after."""
    return self.decode(latents_BFHWC), state


# An array of jax or of NumPy.
A = TypeVar('A', jax.Array, np.ndarray)


def to_patches(video_BFHWC: A, stride: int) -> A:
  """Cuts frames into patches: [B, F, H / stride, W / stride, stride**2 * C]."""
  b, f, h, w, c = video_BFHWC.shape
  if h % stride or w % stride:
    raise ValueError(
      f'a {h}x{w} frame does not divide into patches of {stride}'
    )
  x = video_BFHWC.reshape(b, f, h // stride, stride, w // stride, stride, c)
  x = x.swapaxes(3, 4)
  return x.reshape(b, f, h // stride, w // stride, stride * stride * c)


def from_patches(patches_BFHWP: jax.Array, stride: int) -> jax.Array:
  """Inverse of `to_patches`."""
  b, f, h, w, p = patches_BFHWP.shape
  c = p // (stride * stride)
  x = patches_BFHWP.reshape(b, f, h, w, stride, stride, c).swapaxes(3, 4)
  return x.reshape(b, f, h * stride, w * stride, c)


def fit_linear_codec(
  videos: Iterable[np.ndarray],
  *,
  channels: int,
  whitening: float = 1.0,
  spatial_stride: int = 8,
) -> LinearCodec:
  """Fits the codec to videos.

  The fit is exact (an eigendecomposition of the patches' covariance), so the
  same arguments give the same codec.

  Args:
    videos: uint8 [F, H, W, 3] each; read once, one at a time.
    channels: latent channels.
    whitening: in [0, 1]. The standard deviation of channel c is
      (std_c / std_0) ** (1 - whitening), std_c being that of the principal
      component: 1 makes all channels equally loud, 0 keeps their proportions
      in pixels.
    spatial_stride: side of a patch in px.

  Raises:
    ValueError: if there are no videos, more channels than values in a patch,
      or more than the videos have directions of variance.
  """
  size = spatial_stride * spatial_stride * _RGB
  if not 1 <= channels <= size:
    raise ValueError(f'channels={channels} must be in [1, {size}]')
  if not 0.0 <= whitening <= 1.0:
    raise ValueError(f'whitening={whitening} must be in [0, 1]')
  count = 0
  total_P = np.zeros(size)
  square_PP = np.zeros((size, size))
  for video in videos:
    frames = video[None].astype(np.float32) / 127.5 - 1.0
    patches = to_patches(frames, spatial_stride).reshape(-1, size)
    count += len(patches)
    total_P += patches.sum(axis=0, dtype=np.float64)
    square_PP += patches.T @ patches
  if not count:
    raise ValueError('there are no videos to fit the codec to')
  mean_P = total_P / count
  variance_P, vectors_PP = np.linalg.eigh(
    square_PP / count - np.outer(mean_P, mean_P)
  )
  # eigh sorts upwards.
  variance_C = variance_P[::-1][:channels]
  vectors_PC = vectors_PP[:, ::-1][:, :channels]
  if variance_C[-1] <= 1e-9 * variance_C[0]:
    raise ValueError(f'the videos have no variance left for channel {channels}')
  # An eigenvector's sign is arbitrary: fix it, or latents change with LAPACK.
  vectors_PC = vectors_PC * np.where(vectors_PC.sum(axis=0) < 0, -1.0, 1.0)
  std_C = np.sqrt(variance_C)
  scale_C = std_C**whitening * std_C[0] ** (1.0 - whitening)
  return LinearCodec(
    mean_P=jnp.asarray(mean_P, jnp.float32),
    encoder_PC=jnp.asarray(vectors_PC / scale_C, jnp.float32),
    decoder_CP=jnp.asarray((vectors_PC * scale_C).T, jnp.float32),
    spatial_stride=spatial_stride,
  )


def save_linear_codec(codec: LinearCodec, path: str | os.PathLike) -> None:
  """Writes a codec as an .npz file of float32 arrays (tens of KB).

  In one move: a run that is killed leaves no half of a codec.
  """
  with files.whole_file(path) as partial, partial.open('wb') as file:
    np.savez(
      file,
      mean=np.asarray(codec.mean_P),
      encoder=np.asarray(codec.encoder_PC),
      decoder=np.asarray(codec.decoder_CP),
      spatial_stride=np.asarray(codec.spatial_stride, np.int32),
    )


def load_linear_codec(path: str | os.PathLike) -> LinearCodec:
  """Reads what `save_linear_codec` wrote; the values are bit-exact."""
  with np.load(path, allow_pickle=False) as file:
    return LinearCodec(
      mean_P=jnp.asarray(file['mean']),
      encoder_PC=jnp.asarray(file['encoder']),
      decoder_CP=jnp.asarray(file['decoder']),
      spatial_stride=int(file['spatial_stride']),
    )
