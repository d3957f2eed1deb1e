"""The video VAE behind the seam of `codecs`: frames to latents and back.

B batch, F frames, H W height and width of pixels or latents, C channels.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Self

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from hiar_jax.models import vae, vae_bands
from hiar_jax.weights import networks


@struct.dataclass
class VAECodec:
  """Encodes, decodes and decodes block by block with a `models.vae`.

  1 + 4k pixel frames stand for 1 + k latent frames, so the first block of a
  stream has three frames fewer than the blocks after it.

  Attributes:
    params: of the VAE; without 'encoder' it only decodes.
    config: of the VAE.
    bands: of rows that frames are decoded in; the frames are the same.
  """

  params: vae.Params
  config: vae.VAEConfig = struct.field(pytree_node=False)
  bands: vae_bands.Bands = struct.field(
    pytree_node=False, default=vae_bands.Bands()
  )

  @property
  def spatial_stride(self) -> int:
    return self.config.space_factor

  @property
  def temporal_stride(self) -> int:
    return self.config.time_factor

  @property
  def channels(self) -> int:
    return self.config.z_dim

  def encode(self, video_BFHWC: jax.Array) -> jax.Array:
    """Encodes pixels, in memory for the frames of one latent frame.

    Args:
      video_BFHWC: float [B, 1 + 4k, H, W, 3] in [-1, 1].

    Returns:
      Normalised float32 [B, 1 + k, H / 8, W / 8, C].

    Raises:
      ValueError: if F, H or W is not what the VAE takes.
    """
    if video_BFHWC.shape[1] % self.temporal_stride != 1 or (
      video_BFHWC.shape[1] == 1
    ):
      # One frame, or a number that is refused there by name.
      return vae.encode(self.config, self.params, video_BFHWC)
    return vae.encode_in_blocks(
      self.config,
      self.params,
      video_BFHWC,
      frames_per_block=self.temporal_stride,
    )

  def decode(self, latents_BFHWC: jax.Array) -> jax.Array:
    """Decodes latents to float32 [B, 4F - 3, 8 H, 8 W, 3] in [-1, 1]."""
    return self.decode_stream((), latents_BFHWC)[0]

  def init_decode_state(self, batch_size: int) -> tuple[()]:
    """The state before the first frame, which no block is decoded with."""
    del batch_size
    return ()

  def decode_stream(
    self, state: tuple[()] | vae.Cache, latents_BFHWC: jax.Array
  ) -> tuple[jax.Array, vae.Cache]:
    """Decodes the next latents: their pixels and the state after.

    The states before and after the first block differ in structure, so that a
    jitted caller compiles one program for it and one for all later blocks.
    """
    first = not jax.tree.leaves(state)
    video, cache = vae_bands.decode_block(
      self.config,
      self.params,
      None if first or isinstance(state, tuple) else state,
      latents_BFHWC,
      first=first,
      bands=self.bands,
    )
    return jnp.clip(video, -1.0, 1.0), cache

  def tiled(self, tiles: int, latent_height: int) -> Self:
    """The codec that decodes frames in so many bands of rows, in turn.

    Args:
      tiles: >= 1, of each device that decodes.
      latent_height: of the frames that it is checked for.

    Raises:
      ValueError: if there are more of them than rows.
    """
    bands = dataclasses.replace(self.bands, in_turn=tiles)
    vae_bands.check(self.config, latent_height, bands)
    return dataclasses.replace(self, bands=bands)

  def divided(self, devices: Sequence[jax.Device], latent_height: int) -> Self:
    """The codec on devices each of which decodes some rows of a frame.

    Raises:
      ValueError: if there are more of them than rows.
    """
    mesh = vae_bands.make_mesh(devices, len(devices))
    bands = dataclasses.replace(self.bands, mesh=mesh)
    vae_bands.check(self.config, latent_height, bands)
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = jax.device_put(self.params, everywhere)
    return dataclasses.replace(self, params=params, bands=bands)


def load_vae_codec(path: str | os.PathLike, config: vae.VAEConfig) -> VAECodec:
  """Reads the weights of a converted folder; they stay float32.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is damaged, or of another VAE.
  """
  abstract = jax.eval_shape(lambda: vae.init(config, jax.random.key(0)))
  params = jax.device_put(networks.load_weights(path, abstract))
  return VAECodec(params, config)
