"""The tiny VAE behind the seam of `codecs`: fast, small, close to Wan2.1's.

B batch, F frames, H W height and width of pixels or latents, C channels.
"""

import os

import jax
import jax.numpy as jnp
from flax import struct

from hiar_jax.models import tiny_vae
from hiar_jax.weights import tiny_vae_files


@struct.dataclass
class TinyCodec:
  """Encodes, decodes and decodes block by block with `models.tiny_vae`.

  1 + 4k pixel frames stand for 1 + k latent frames, as with Wan2.1's VAE.

  Attributes:
    params: by their published names.
    dtype: compute dtype.
  """

  params: dict[str, jax.Array]
  dtype: str = struct.field(pytree_node=False, default='float32')

  @property
  def spatial_stride(self) -> int:
    return tiny_vae.SPACE_FACTOR

  @property
  def temporal_stride(self) -> int:
    return tiny_vae.TIME_FACTOR

  @property
  def channels(self) -> int:
    return tiny_vae.CHANNELS

  def encode(self, video_BFHWC: jax.Array) -> jax.Array:
    """Encodes pixels.

    Args:
      video_BFHWC: float [B, 1 + 4k, H, W, 3] in [-1, 1].

    Returns:
      float32 [B, 1 + k, H / 8, W / 8, C], as the network takes them.

    Raises:
      ValueError: if F, H or W is none of these.
    """
    frames, height, width = video_BFHWC.shape[1:4]
    if (frames - 1) % tiny_vae.TIME_FACTOR:
      raise ValueError(f'{frames} frames are not 1 + {tiny_vae.TIME_FACTOR}k')
    if height % tiny_vae.SPACE_FACTOR or width % tiny_vae.SPACE_FACTOR:
      raise ValueError(
        f'frames of {height}x{width} are no multiples of '
        f'{tiny_vae.SPACE_FACTOR}'
      )
    video = (video_BFHWC.astype(self.dtype) + 1) / 2
    return tiny_vae.encode(self.params, video).astype(jnp.float32)

  def decode(self, latents_BFHWC: jax.Array) -> jax.Array:
    """Decodes latents to float32 [B, 4F - 3, 8 H, 8 W, 3] in [-1, 1]."""
    return self.decode_stream((), latents_BFHWC)[0]

  def init_decode_state(self, batch_size: int) -> tuple[()]:
    """The state before the first frame, which no block is decoded with."""
    del batch_size
    return ()

  def decode_stream(
    self, state: tuple[()] | tiny_vae.State, latents_BFHWC: jax.Array
  ) -> tuple[jax.Array, tiny_vae.State]:
    """Decodes the next latents: their pixels and the state after.

    As of the VAE, the states before and after the first block differ in
    structure.
    """
    before = None if isinstance(state, tuple) else state
    video, after = tiny_vae.decode(
      self.params, latents_BFHWC.astype(self.dtype), before
    )
    if before is None:
      video = video[:, tiny_vae.LEAD :]
    return 2 * jnp.clip(video.astype(jnp.float32), 0.0, 1.0) - 1, after


def load_tiny_codec(
  path: str | os.PathLike, dtype: str = 'float32'
) -> TinyCodec:
  """Reads a published file, such as taew2_1.safetensors or taew2_1.pth.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is damaged, or of another network.
  """
  return TinyCodec(tiny_vae_files.read(path), dtype)
