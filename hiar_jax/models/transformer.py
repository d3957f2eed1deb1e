"""The Wan2.1 video transformer, one network with three uses.

* bidirectional: no past, no mask (teacher, critic, forward KL);
* block-causal over a full sequence: no past, a frame mask;
* cached: the past comes in, the new tokens' K/V go out.

Architecture: Wan2.1 (arXiv:2503.20314) with per-frame timesteps, as in
CausVid and Self-Forcing. Layers are scanned and their parameters stacked on a
leading axis N. The network reads the past and never writes it; the rollout
writes the K/V that come out.

The token stream keeps its frames apart, [B, F, P, D]: modulation is per frame,
and a mesh divides the tokens of every frame.
"""

# B batch, F frames, P tokens per frame, T = F*P tokens, D width, H heads,
# K head width, N layers, L text tokens, S past tokens, h w rows and columns

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from hiar_jax.models import (
  attention,
  divided_attention,
  past_attention,
  quantised,
  rope,
  sharding,
)
from hiar_jax.models.config import WanConfig
from hiar_jax.models.dense import PRODUCT, Dense
from hiar_jax.models.kv_cache import KV, KVCache, Picked
from hiar_jax.models.norms import layer_norm, rms_norm
from hiar_jax.models.patches import patchify, unpatchify
from hiar_jax.models.text_kv import StackedTextKV, TextKV
from hiar_jax.models.window import Window, WindowLayer, Written

_DENSE_INIT = nn.initializers.xavier_uniform()
_EMBED_INIT = nn.initializers.normal(0.02)


def sinusoid(timestep: jax.Array, width: int) -> jax.Array:
  """[cos | sin] of t * 10000^(-i / (width/2)), float32 [..., width].

  The whole part of t is looked up in a table made in float64 and the fraction
  added as a rotation: a float32 angle near 1000 rad would be off by 6e-5.

  Args:
    timestep: 1000 sigma in [0, 1000], any shape.
    width: even.
  """
  half = width // 2
  freqs = 10000.0 ** (-np.arange(half) / half)
  table = np.arange(1001)[:, None] * freqs
  timestep = timestep.astype(jnp.float32)
  whole = jnp.floor(timestep)
  fraction = (timestep - whole)[..., None] * jnp.asarray(
    freqs.reshape((1,) * timestep.ndim + (half,)), jnp.float32
  )
  index = whole.astype(jnp.int32)
  cos_w = jnp.asarray(np.cos(table), jnp.float32)[index]
  sin_w = jnp.asarray(np.sin(table), jnp.float32)[index]
  cos_f, sin_f = jnp.cos(fraction), jnp.sin(fraction)
  return jnp.concatenate(
    [cos_w * cos_f - sin_w * sin_f, sin_w * cos_f + cos_w * sin_f], -1
  )


def _dense(
  config: WanConfig, features: int, name: str, init: Any = _DENSE_INIT
) -> Dense:
  return Dense(features, jnp.dtype(config.dtype), kernel_init=init, name=name)


def _attend(
  q_BFPHK,
  keys_BSHK,
  values_BSHK,
  rotation,
  mask_FPS,
  rows,
  common,
  *,
  config,
  visible=None,
  sizes=(),
  sampled=False,
):
  """Attention of queries by frame; what there is not is None.

  What is `common` is the number of keys that are seen; beside `rows`, it is the
  `past_attention.Place` in them. `sampled`: nobody asks for a gradient.
  """
  batch, _, _, *heads = q_BFPHK.shape
  backend = config.attention
  q = q_BFPHK.reshape(batch, -1, *heads)
  if rotation is not None:
    q = rope.rotate(q, [r.reshape(-1, r.shape[-1]) for r in rotation])
  if rows is not None:
    out = past_attention.attend_past(
      *(q, keys_BSHK, values_BSHK, rows, common),
      sizes=sizes,
      tokens_per_frame=config.tokens_per_frame,
      backend=backend,
    )
    return out.reshape(q_BFPHK.shape)
  if visible is not None:
    return attention.attend_visible(
      q.reshape(q_BFPHK.shape),
      keys_BSHK,
      values_BSHK,
      visible,
      tokens_per_frame=config.tokens_per_frame,
      length=common,
      backend=backend,
    )
  if mask_FPS is not None:
    mask_FPS = mask_FPS.reshape(-1, mask_FPS.shape[-1])
  out = attention.attend(
    *(q, keys_BSHK, values_BSHK),
    length=common,
    mask_TS=mask_FPS,
    backend=backend,
    differentiated=not sampled,
  )
  return out.reshape(q_BFPHK.shape)


@dataclasses.dataclass(frozen=True)
class Masks:
  """Who sees whom, as far as it is known when a program is traced.

  Attributes:
    visible: see `attention.attend_visible`; None: all see all.
    same_frames: see `WanTransformer`.
    sizes: of a cache, see `past_attention.prefixes`.
  """

  visible: attention.Visible | None = None
  same_frames: tuple[int, int] | None = None
  sizes: tuple[int, ...] = ()


class SelfAttention(nn.Module):
  """Attention of the new tokens over themselves and the past."""

  config: WanConfig

  @nn.compact
  def __call__(
    self,
    x_BFPD: jax.Array,
    past: KV | WindowLayer | past_attention.Place | None,
    rotation: Any,
    length: jax.Array | None,
    mask_FPS: Any,
    rows: KV | None,
    masks: Masks,
  ) -> Any:
    cfg = self.config
    batch, num_frames, tokens, _ = x_BFPD.shape
    heads = (batch, num_frames, tokens, cfg.num_heads, cfg.head_dim)
    sequence = (batch, num_frames * tokens, *heads[3:])
    ones = nn.initializers.ones
    norm_q = self.param('norm_q', ones, (cfg.dim,))
    norm_k = self.param('norm_k', ones, (cfg.dim,))
    q = rms_norm(_dense(cfg, cfg.dim, 'q')(x_BFPD), norm_q, cfg.eps)
    k = rms_norm(_dense(cfg, cfg.dim, 'k')(x_BFPD), norm_k, cfg.eps)
    v = _dense(cfg, cfg.dim, 'v')(x_BFPD)
    q = sharding.constrain(q.reshape(heads), sharding.QUERIES_BFPHK)
    k = sharding.constrain(k.reshape(heads), sharding.KEYS_BFPHK)
    v = sharding.constrain(v.reshape(heads), sharding.KEYS_BFPHK)
    k = rope.rotate(k.reshape(sequence), rotation)
    v = v.reshape(sequence)
    lay_out = functools.partial(attention.kernel_layout, backend=cfg.attention)
    k, v = (divided_attention.map_keys(lay_out, x) for x in (k, v))
    keys, values = k, v
    common: Any = length
    sampled = isinstance(past, WindowLayer)
    if isinstance(past, WindowLayer):
      past = past.write(KV(k, v))
      k, v, common = past.k, past.v, past.length
      keys, values = k, v
    elif isinstance(past, KV):
      past_k, past_v = (quantised.restore(x, k.dtype) for x in (past.k, past.v))
      if masks.same_frames is not None:
        past_k = _carry_gradient(past_k, k, masks.same_frames, tokens)
        past_v = _carry_gradient(past_v, v, masks.same_frames, tokens)
      keys = jnp.concatenate([k, past_k], 1)
      values = jnp.concatenate([v, past_v], 1)
      if length is not None:
        common = length + k.shape[1]
    elif past is not None:
      common = past
    by_frame = (num_frames, tokens, -1)
    out = divided_attention.split_queries(
      functools.partial(
        _attend,
        config=cfg,
        visible=masks.visible,
        sizes=masks.sizes,
        sampled=sampled,
      ),
      q,
      keys,
      values,
      rotation=[r.reshape(by_frame) for r in rotation],
      mask_FPS=mask_FPS,
      rows=rows,
      common=common,
    )
    out = sharding.constrain(out, sharding.TOKENS_BFPHK)
    out = out if sampled else out.reshape(x_BFPD.shape)
    out = _dense(cfg, cfg.dim, 'o')(out)
    return out, KV(k=k, v=v)


def _carry_gradient(past, own, same_frames, tokens):
  """Values of `past`; gradient of some of its frames goes to `own` (spec 9)."""
  start, end = (frame * tokens for frame in same_frames)
  own = own[:, : end - start]
  same = past[:, start:end] + (own - jax.lax.stop_gradient(own))
  return jnp.concatenate([past[:, :start], same, past[:, end:]], 1)


class CrossAttention(nn.Module):
  """Attention over the text, whose K/V were projected once per prompt."""

  config: WanConfig

  @nn.compact
  def __call__(
    self, x_BFPD: jax.Array, text: TextKV, sampled: bool
  ) -> jax.Array:
    cfg = self.config
    norm_q = self.param('norm_q', nn.initializers.ones, (cfg.dim,))
    q = rms_norm(_dense(cfg, cfg.dim, 'q')(x_BFPD), norm_q, cfg.eps)
    q = q.reshape(*x_BFPD.shape[:3], cfg.num_heads, cfg.head_dim)
    out = divided_attention.split_queries(
      functools.partial(_attend, config=cfg, sampled=sampled),
      sharding.constrain(q, sharding.TOKENS_BFPHK),
      text.k,
      text.v,
      spec=sharding.TOKENS_BFPHK,
    )
    out = out if sampled else out.reshape(x_BFPD.shape)
    return _dense(cfg, cfg.dim, 'o')(out)


class Layer(nn.Module):
  """One transformer layer; the carry of the scan is the token stream."""

  config: WanConfig
  masks: Masks

  @nn.compact
  def __call__(
    self,
    x_BFPD,
    scanned,
    rotation,
    modulation_BF6D,
    length,
    mask,
    rows,
    place,
  ):
    cfg = self.config
    past, text = scanned
    if place is not None:  # What is scanned is the layer's index.
      past = place.replace(row=(*place.row, past))
    own = self.param(
      'modulation',
      nn.initializers.normal(cfg.dim**-0.5),
      (6, cfg.dim),
      jnp.float32,
    )
    parts = jnp.split(own[None, None] + modulation_BF6D, 6, axis=2)
    shift1, scale1, gate1, shift2, scale2, gate2 = parts

    def modulate(x, shift, scale):
      y = layer_norm(x, cfg.eps) * (1 + scale) + shift
      return y.astype(cfg.dtype)

    def gated(y, gate):
      return (y.astype(jnp.float32) * gate).astype(cfg.dtype)

    y, new_kv = SelfAttention(cfg, name='self_attention')(
      modulate(x_BFPD, shift1, scale1),
      past,
      rotation,
      length,
      mask,
      rows,
      self.masks,
    )
    x_BFPD = x_BFPD + gated(y, gate1)
    y = nn.LayerNorm(epsilon=cfg.eps, dtype=jnp.float32, name='cross_norm')(
      x_BFPD
    ).astype(cfg.dtype)
    x_BFPD = x_BFPD + CrossAttention(cfg, name='cross_attention')(
      *(y, text), sampled=isinstance(past, WindowLayer)
    )
    y = modulate(x_BFPD, shift2, scale2)
    y = nn.gelu(_dense(cfg, cfg.ffn_dim, 'ffn_in')(y), approximate=True)
    y = _dense(cfg, cfg.dim, 'ffn_out')(y)
    return x_BFPD + gated(y, gate2), new_kv


_REMAT = {
  'full': None,
  'dots': jax.checkpoint_policies.save_only_these_names(PRODUCT),
}


class WanTransformer(nn.Module):
  """Text states -> TextKV (`project_text`); tokens -> flow (`__call__`)."""

  config: WanConfig

  @nn.compact
  def project_text(self, states_BLD: jax.Array) -> TextKV:
    """Projects text encoder states to the K/V of every layer's cross-attention.

    Args:
      states_BLD: [B, text_len, text_dim]; padding rows are zeros and are
        attended to, as in Wan2.1.
    """
    cfg = self.config
    x = _dense(cfg, cfg.dim, 'text_in', _EMBED_INIT)(states_BLD)
    x = nn.gelu(x, approximate=True)
    x = _dense(cfg, cfg.dim, 'text_out', _EMBED_INIT)(x)
    return StackedTextKV(cfg, name='text_kv')(x)

  @nn.compact
  def __call__(
    self,
    x_BFhwC: jax.Array,
    timestep_BF: jax.Array,
    text: TextKV,
    positions_F: jax.Array,
    past: KV | KVCache | Picked | Window | None = None,
    past_frames: jax.Array | None = None,
    frame_mask: np.ndarray | jax.Array | None = None,
    same_frames: tuple[int, int] | None = None,
    layers: Sequence[dict] | None = None,
  ) -> tuple[jax.Array, Any]:
    """Predicts the flow of some frames.

    Args:
      x_BFhwC: noisy latents.
      timestep_BF: 1000 sigma, [B or 1, F or 1].
      text: see `project_text`.
      positions_F: absolute frame indices, int32.
      past: a KVCache, or one Picked from several, whose valid prefix is seen
        by all frames; or a Window, which needs `layers`; or a KV of whole
        frames in any order, which needs a `frame_mask`.
      past_frames: int32 scalar, of such a KV only the first so many frames are
        there, whatever the mask says; None: all.
      frame_mask: bool [F, F + past frames], True where the row's frame sees
        the column's; own frames first. As a numpy array it costs nothing, see
        `attention.visible_keys`; a traced one is a mask over all tokens, which
        no flash kernel takes.
      same_frames: (first, after) of frames of the past that are the first of
        these frames at another level: lets the gradient of the past reach them
        (spec 9). Changes no value.
      layers: the layers' parameters one by one, in place of the stacked ones;
        see `Denoiser.unstack_layers`.

    Returns:
      Flow, float32, shape of x, and the K/V of these frames; of a Window its
      arrays with these in them, a Written.
    """
    cfg = self.config
    batch, num_frames, height, width, channels = x_BFhwC.shape
    if (height, width, channels) != (
      cfg.latent_height,
      cfg.latent_width,
      cfg.channels,
    ):
      raise ValueError(
        f'latents of shape {x_BFhwC.shape} do not end in '
        f'{(cfg.latent_height, cfg.latent_width, cfg.channels)}'
      )
    x = patchify(x_BFhwC, cfg.patch)
    x = _dense(cfg, cfg.dim, 'patch_embedding')(
      x.reshape(batch, num_frames, cfg.tokens_per_frame, -1)
    )
    x = sharding.constrain(x, sharding.TOKENS_BFPD)

    time = sinusoid(timestep_BF, cfg.freq_dim)
    # HIGHEST: by default a TPU multiplies float32 in bfloat16, and a GPU in
    # TF32, and passes over one level and over several would differ.
    dense = functools.partial(
      Dense, dtype=jnp.float32, precision=jax.lax.Precision.HIGHEST
    )
    time = dense(cfg.dim, name='time_in', kernel_init=_EMBED_INIT)(time)
    time = dense(cfg.dim, name='time_out', kernel_init=_EMBED_INIT)(
      nn.silu(time)
    )
    modulation = dense(
      6 * cfg.dim, name='time_projection', kernel_init=_DENSE_INIT
    )(nn.silu(time))
    modulation = modulation.reshape(*time.shape[:2], 6, cfg.dim)

    def keys(kv):
      def laid_out(a):
        lead = (None,) * (a.ndim - len(sharding.KEYS_BSHK))
        return sharding.constrain(a, (*lead, *sharding.KEYS_BSHK))

      return jax.tree.map(laid_out, kv)

    masks, past_kv = Masks(same_frames=same_frames), None
    length = rows = place = None
    if isinstance(past, KVCache | Picked):
      assert frame_mask is None, 'all frames see all of a cache'
      sizes = past_attention.prefixes(past.slots, num_frames)
      masks, rows = Masks(sizes=sizes), keys(past.rows.kv)
      place = past_attention.place_of(past, sizes, cfg)
      past_kv = jnp.arange(cfg.num_layers)
    elif isinstance(past, Window):
      assert layers is not None and frame_mask is None
    elif past is not None:
      past_kv = keys(past)
      if past_frames is not None:
        length = past_frames * cfg.tokens_per_frame
    mask = None
    if isinstance(frame_mask, np.ndarray):
      visible = attention.visible_keys(frame_mask)
      masks = dataclasses.replace(masks, visible=visible)
    elif frame_mask is not None:
      mask = attention.expand_frame_mask(frame_mask, cfg.tokens_per_frame)
      mask = mask.reshape(num_frames, cfg.tokens_per_frame, -1)
    layer = Layer
    if cfg.remat != 'none':
      # What is computed again must not be merged with what it repeats. Inside
      # of a scan it cannot be, and is faster without the barriers.
      layer = nn.remat(
        Layer,
        policy=_REMAT[cfg.remat],
        prevent_cse=cfg.is_unrolled or layers is not None,
      )
    rotation = rope.rotations(positions_F, cfg.grid, cfg.head_dim)
    inputs = (rotation, modulation, length, mask, rows, place)
    if layers is None:
      scan = nn.scan(
        layer,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        in_axes=(0, *(nn.broadcast for _ in inputs)),
        length=cfg.num_layers,
        unroll=cfg.unroll,
      )
      scanned = scan(cfg, masks, name='layers')
      x, new_kv = scanned(x, (past_kv, text), *inputs)
    else:
      kvs, each = [], layer(cfg, masks, parent=None)
      for i, params in enumerate(layers):
        own = jax.tree.map(lambda a, i=i: a[i], (past_kv, text))
        if isinstance(past, Window):
          own = past.layer(i, num_frames), own[1]
        x, kv = each.apply({'params': params}, x, own, *inputs)
        kvs.append(kv)
      if isinstance(past, Window):
        new_kv = Written(
          tuple(kv.k for kv in kvs), tuple(kv.v for kv in kvs), num_frames
        )
      else:
        new_kv = jax.tree.map(lambda *a: jnp.stack(a), *kvs)

    head_modulation = self.param(
      'head_modulation',
      nn.initializers.normal(cfg.dim**-0.5),
      (2, cfg.dim),
      jnp.float32,
    )
    shift, scale = jnp.split(
      head_modulation[None, None] + time[:, :, None], 2, axis=2
    )
    x = layer_norm(x, cfg.eps) * (1 + scale) + shift
    x = _dense(cfg, cfg.patch_dim, 'head', nn.initializers.zeros)(
      x.astype(cfg.dtype)
    )
    x = x.reshape(batch, num_frames, *cfg.grid, cfg.patch_dim)
    return unpatchify(x.astype(jnp.float32), cfg.patch), new_kv

  def initialise(self, states_BLD: jax.Array) -> jax.Array:
    """Touches every parameter; for `init`."""
    cfg = self.config
    x = jnp.zeros((1, 1, cfg.latent_height, cfg.latent_width, cfg.channels))
    text = self.project_text(states_BLD)
    return self(x, jnp.zeros((1, 1)), text, jnp.zeros((1,), jnp.int32))[0]
