"""umT5 text encoder: token ids to hidden states.

T5 v1.1 (arXiv:1910.10683, arXiv:2002.05202) with a relative position table of
its own in every layer, as in umT5 (arXiv:2304.09151).
"""

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from hiar_jax.models import config as model_config

# B batch, L tokens, D width, H heads, K head_dim.
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class UMT5Config:
  """Sizes of the encoder.

  Attributes:
    vocab_size: rows of the token table.
    dim: width of the token stream.
    ffn_dim: hidden width of the gated feed-forward layers.
    num_heads: attention heads; a divisor of attention_dim.
    attention_dim: width of all heads together.
    num_layers: transformer layers.
    num_buckets: rows of a relative position table, half of them a direction;
      a multiple of 4.
    max_distance: tokens from which on all distances share a bucket.
    eps: of every norm.
    dtype: compute dtype; norms, scores and softmax are float32.

  Raises:
    ValueError: naming the size that does not fit.
  """

  vocab_size: int
  dim: int
  ffn_dim: int
  num_heads: int
  attention_dim: int
  num_layers: int
  num_buckets: int = 32
  max_distance: int = 128
  eps: float = 1e-6
  dtype: str = 'float32'

  def __post_init__(self):
    if self.attention_dim % self.num_heads:
      raise ValueError(
        f'attention_dim={self.attention_dim} is not a multiple of '
        f'num_heads={self.num_heads}'
      )
    if self.num_buckets % 4 or self.max_distance <= self.num_buckets // 4:
      raise ValueError(
        f'num_buckets={self.num_buckets} must be a multiple of 4 and less '
        f'than 4 max_distance={4 * self.max_distance}'
      )
    if self.dtype not in model_config.DTYPES:
      raise ValueError(
        f'dtype={self.dtype!r} is not one of {model_config.DTYPES}'
      )

  @classmethod
  def xxl(cls, dtype: str = 'bfloat16') -> Self:
    """The encoder of umT5-xxl (5.7 billion weights), as Wan2.1 uses it."""
    return cls(
      vocab_size=256384,
      dim=4096,
      ffn_dim=10240,
      num_heads=64,
      attention_dim=4096,
      num_layers=24,
      dtype=dtype,
    )

  @property
  def head_dim(self) -> int:
    return self.attention_dim // self.num_heads


def init(cfg: UMT5Config, key: jax.Array) -> Params:
  """Random float32 parameters; those of a layer stacked on axis 0."""
  ids = jnp.zeros((1, 1), jnp.int32)
  return UMT5Encoder(cfg).init(key, ids, jnp.ones((1, 1), bool))['params']


def encode(
  cfg: UMT5Config, params: Params, ids_BL: jax.Array, mask_BL: jax.Array
) -> jax.Array:
  """Hidden states of the tokens; zeros at padding.

  Args:
    cfg: of the encoder.
    params: from a checkpoint or `init`.
    ids_BL: integers in [0, vocab_size); padding may hold any of them.
    mask_BL: nonzero at tokens, 0 at padding.

  Returns:
    [B, L, dim] in cfg.dtype.

  Raises:
    ValueError: if the two shapes differ or are not [B, L].
  """
  if ids_BL.ndim != 2 or ids_BL.shape != mask_BL.shape:
    raise ValueError(
      f'ids of shape {ids_BL.shape} and mask of shape {mask_BL.shape} are not '
      'both [batch, tokens]'
    )
  mask_BL = mask_BL.astype(bool)
  hidden_BLD = UMT5Encoder(cfg).apply({'params': params}, ids_BL, mask_BL)
  return jnp.where(mask_BL[..., None], hidden_BLD, 0)


def relative_buckets(
  offsets: np.ndarray, *, num_buckets: int, max_distance: int
) -> np.ndarray:
  """Row of the relative position table for a key's offset from its query.

  Half of the rows are for keys after the query. Of either half, one half is
  exact and the other logarithmic up to max_distance.

  Args:
    offsets: integers, key position - query position.
    num_buckets: rows of the table.
    max_distance: the logarithm's last distance; those beyond share its row.

  Returns:
    int32 of the same shape, in [0, num_buckets).
  """
  half, exact = num_buckets // 2, num_buckets // 4
  distance = np.abs(offsets)
  # float32 and truncated, as checkpoints were trained: a more precise
  # logarithm moves distances at the edge of a bucket.
  ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
  scale = np.float32(math.log(max_distance / exact))
  far = np.log(ratio) / scale * np.float32(half - exact)
  far = np.minimum(exact + far.astype(np.int32), half - 1)
  bucket = np.where(distance < exact, distance, far)
  return (bucket + np.where(offsets > 0, half, 0)).astype(np.int32)


class UMT5Encoder(nn.Module):
  """Hidden states of all tokens, those of padding not zeroed."""

  cfg: UMT5Config

  @nn.compact
  def __call__(self, ids_BL: jax.Array, mask_BL: jax.Array) -> jax.Array:
    cfg = self.cfg
    position = np.arange(ids_BL.shape[1])
    buckets_LL = relative_buckets(
      position[None, :] - position[:, None],
      num_buckets=cfg.num_buckets,
      max_distance=cfg.max_distance,
    )
    x_BLD = nn.Embed(
      cfg.vocab_size, cfg.dim, dtype=cfg.dtype, name='token_embedding'
    )(ids_BL)
    layers = nn.scan(
      Layer,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=nn.broadcast,
      length=cfg.num_layers,
    )
    x_BLD, _ = layers(cfg, name='layers')(
      x_BLD, jnp.asarray(buckets_LL), mask_BL
    )
    return RMSNorm(cfg.eps, name='norm')(x_BLD)


class Layer(nn.Module):
  """Pre-norm self-attention and gated feed-forward; no bias anywhere."""

  cfg: UMT5Config

  @nn.compact
  def __call__(
    self, x_BLD: jax.Array, buckets_LL: jax.Array, mask_BL: jax.Array
  ) -> tuple[jax.Array, None]:
    cfg = self.cfg
    dense = lambda features, name: nn.Dense(
      features, use_bias=False, dtype=cfg.dtype, name=name
    )
    table = self.param(
      'relative_bias',
      nn.initializers.normal(stddev=(2 * cfg.num_buckets) ** -0.5),
      (cfg.num_buckets, cfg.num_heads),
    )

    y_BLD = RMSNorm(cfg.eps, name='norm1')(x_BLD)
    q_BLHK, k_BLHK, v_BLHK = (
      dense(cfg.attention_dim, name)(y_BLD).reshape(
        *y_BLD.shape[:2], cfg.num_heads, cfg.head_dim
      )
      for name in ('q', 'k', 'v')
    )
    # T5 has no 1 / sqrt(head_dim): its initialisation takes that place.
    scores_BHLL = jnp.einsum(
      'bqhk,bshk->bhqs', q_BLHK, k_BLHK, preferred_element_type=jnp.float32
    )
    bias_HLL = jnp.moveaxis(table.astype(jnp.float32)[buckets_LL], -1, 0)
    scores_BHLL = jnp.where(
      mask_BL[:, None, None, :],
      scores_BHLL + bias_HLL[None],
      jnp.finfo(jnp.float32).min,
    )
    weights_BHLL = jax.nn.softmax(scores_BHLL).astype(v_BLHK.dtype)
    y_BLHK = jnp.einsum('bhqs,bshk->bqhk', weights_BHLL, v_BLHK)
    x_BLD += dense(cfg.dim, 'o')(y_BLHK.reshape(*y_BLD.shape[:2], -1))

    y_BLD = RMSNorm(cfg.eps, name='norm2')(x_BLD)
    gate = nn.gelu(dense(cfg.ffn_dim, 'ffn_gate')(y_BLD), approximate=True)
    x_BLD += dense(cfg.dim, 'ffn_out')(
      gate * dense(cfg.ffn_dim, 'ffn_in')(y_BLD)
    )
    return x_BLD, None


class RMSNorm(nn.Module):
  """x / rms(x) * scale, in float32, without mean or bias."""

  eps: float

  @nn.compact
  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    scale = self.param('scale', nn.initializers.ones, x_BLD.shape[-1:])
    y = x_BLD.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    return (y * scale.reshape(1, 1, -1)).astype(x_BLD.dtype)
