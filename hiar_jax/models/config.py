"""Sizes of the video DiT; every other size is derived from these."""

import dataclasses
from typing import Any

REMAT_POLICIES = ('none', 'full', 'dots')
DTYPES = ('float32', 'bfloat16')
ATTENTIONS = ('xla', 'chunked', 'splash', 'cudnn', 'auto')


@dataclasses.dataclass(frozen=True)
class WanConfig:
  """Wan2.1 video transformer at any size.

  Attributes:
    dim: width of the token stream.
    ffn_dim: hidden width of the feed-forward layers.
    num_heads: attention heads; dim / num_heads must be even and at least 6.
    num_layers: transformer layers.
    latent_height: rows of a latent frame.
    latent_width: columns of a latent frame.
    channels: latent channels, in and out.
    patch: patch size in rows and columns (the temporal patch is 1).
    freq_dim: width of the timestep sinusoid.
    text_dim: width of the text encoder's states.
    text_len: number of text tokens, padding included.
    eps: of every norm.
    dtype: compute dtype; parameters, norms, modulation and RoPE are float32.
    remat: rematerialisation policy of a layer: 'none', 'full' (keep only the
      layer's input) or 'dots' (keep matrix products without batch axes).
    unroll: layers in one iteration of the scan over layers; more makes small
      networks faster on a CPU and compiling slower. With all of them, sampling
      holds each layer's weights apart, see `Denoiser.unstack_layers`.
    attention: 'xla', 'chunked' (a part of the queries at a time: for windows
      whose scores do not fit into memory), 'splash' (a kernel for TPUs),
      'cudnn' (one for GPUs) or 'auto' (either, where there is one); see
      `models.attention.attend`.

  Raises:
    ValueError: naming the size that does not fit.
  """

  dim: int
  ffn_dim: int
  num_heads: int
  num_layers: int
  latent_height: int
  latent_width: int
  channels: int = 16
  patch: tuple[int, int] = (2, 2)
  freq_dim: int = 256
  text_dim: int = 4096
  text_len: int = 512
  eps: float = 1e-6
  dtype: str = 'float32'
  remat: str = 'none'
  unroll: int = 1
  attention: str = 'xla'

  def __post_init__(self):
    object.__setattr__(self, 'patch', tuple(self.patch))
    if self.dim % self.num_heads or self.head_dim % 2 or self.head_dim < 6:
      raise ValueError(
        f'dim={self.dim} over num_heads={self.num_heads} heads must give an '
        'even head width of at least 6'
      )
    for side, size, patch in (
      ('latent_height', self.latent_height, self.patch[0]),
      ('latent_width', self.latent_width, self.patch[1]),
    ):
      if size % patch:
        raise ValueError(f'{side}={size} is not a multiple of patch {patch}')
    if self.freq_dim % 2:
      raise ValueError(f'freq_dim={self.freq_dim} is not even')
    if self.dtype not in DTYPES:
      raise ValueError(f'dtype={self.dtype!r} is not one of {DTYPES}')
    if not 1 <= self.unroll <= self.num_layers:
      raise ValueError(
        f'unroll={self.unroll} is not in 1..{self.num_layers}, num_layers'
      )
    if self.remat not in REMAT_POLICIES:
      raise ValueError(f'remat={self.remat!r} is not one of {REMAT_POLICIES}')
    if self.attention not in ATTENTIONS:
      raise ValueError(
        f'attention={self.attention!r} is not one of {ATTENTIONS}'
      )

  @property
  def is_unrolled(self) -> bool:
    """Whether no scan over layers is left."""
    return self.unroll == self.num_layers

  @property
  def head_dim(self) -> int:
    return self.dim // self.num_heads

  @property
  def grid(self) -> tuple[int, int]:
    """Token rows and columns of a latent frame."""
    return (
      self.latent_height // self.patch[0],
      self.latent_width // self.patch[1],
    )

  @property
  def tokens_per_frame(self) -> int:
    return self.grid[0] * self.grid[1]

  @property
  def patch_dim(self) -> int:
    """Numbers in one patch, channels included."""
    return self.patch[0] * self.patch[1] * self.channels

  @classmethod
  def wan_1_3b(cls, **overrides: Any) -> 'WanConfig':
    """Wan2.1-T2V-1.3B at 480x832 pixels."""
    sizes: dict[str, Any] = {
      'dim': 1536,
      'ffn_dim': 8960,
      'num_heads': 12,
      'num_layers': 30,
      'latent_height': 60,
      'latent_width': 104,
      'dtype': 'bfloat16',
      'remat': 'full',
    }
    return cls(**(sizes | overrides))

  @classmethod
  def wan_14b(cls, **overrides: Any) -> 'WanConfig':
    """Wan2.1-T2V-14B at 480x832 pixels."""
    sizes = {'dim': 5120, 'ffn_dim': 13824, 'num_heads': 40, 'num_layers': 40}
    return cls.wan_1_3b(**(sizes | overrides))
