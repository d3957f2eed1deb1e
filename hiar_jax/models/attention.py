"""The one seam for attention, and the frame masks of its uses.

Which frame sees which is known when a program is traced, and made of blocks: a
block's queries see a few runs of frames. So a masked pass is one call without a
mask for each block, over the keys of its runs, which flash kernels take and
which does no work for what is not seen.
"""

# B batch, T queries, S keys, H heads, K head width, F frames, P tokens a frame

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import layout

from hiar_jax.models import splash

# Queries whose scores are held at once: at 32,760 keys and 12 heads 0.4 GB.
_CHUNK = 256
_UNSEEN = -1e30
_KERNELS = {'tpu': 'splash', 'cuda': 'cuDNN'}


def attend(
  q_BTHK: jax.Array,
  k_BSHK: jax.Array,
  v_BSHK: jax.Array,
  *,
  length: jax.Array | None = None,
  mask_TS: jax.Array | None = None,
  backend: str = 'xla',
  differentiated: bool = True,
) -> jax.Array:
  """softmax(q k^T / sqrt(K)) v with a float32 softmax.

  Args:
    q_BTHK: queries.
    k_BSHK: keys.
    v_BSHK: values.
    length: int32 scalar, only the first `length` keys are seen.
    mask_TS: bool, True where query t sees key s.
    backend: one of `config.ATTENTIONS`. 'xla' holds all scores [B, H, T, S];
      'chunked' those of 256 queries at a time, the same numbers otherwise;
      'splash' none, by a TPU kernel; 'cudnn' none, by an Nvidia kernel, see
      `cudnn_refusal`; 'auto' is whichever of these two there is on the platform
      that is compiled for. Where there is a mask, or the kernel cannot be had,
      all three are 'chunked'. The choice is logged, once.
    differentiated: whether anyone may ask for a gradient.

  Returns:
    [B, T, H, K] in the dtype of q.
  """
  if backend == 'xla':
    return _attend_xla(q_BTHK, k_BSHK, v_BSHK, length, mask_TS)
  kernels: dict[str, Callable[..., jax.Array]] = {}
  refused = 'a mask' if mask_TS is not None else ''
  if backend in ('splash', 'auto') and not refused:
    kernels['tpu'] = functools.partial(
      splash.attend_splash, forward_only=not differentiated
    )
  if backend in ('cudnn', 'auto'):
    refused = refused or cudnn_refusal(q_BTHK, k_BSHK, v_BSHK)
    if not refused:
      kernels['cuda'] = attend_cudnn
  _log_choice(
    backend, f'{q_BTHK.dtype}[{q_BTHK.shape[-1]}]', tuple(kernels), refused
  )
  if not kernels:
    return _attend_chunked(q_BTHK, k_BSHK, v_BSHK, length, mask_TS)
  # Asked when it is compiled, so that a machine without a TPU or a GPU can
  # compile for one.
  return jax.lax.platform_dependent(
    q_BTHK,
    k_BSHK,
    v_BSHK,
    length,
    **kernels,
    default=functools.partial(_attend_chunked, mask_TS=None),
  )


@functools.cache
def _log_choice(
  backend: str, heads: str, kernels: tuple[str, ...], refused: str
) -> None:
  taken = [f'{_KERNELS[platform]} on {platform}' for platform in kernels]
  logging.info(
    'attention %r of heads %s: %s%s',
    *(backend, heads, ', '.join([*taken, 'else in chunks'])),
    f'; not {_KERNELS["cuda"]}: {refused}' if refused else '',
  )


# (first row, row after the last, runs of columns as (first, after)) of each
# group of rows that see the same: a frame mask as a static, hashable value.
Visible = tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]


def visible_keys(mask_FS: np.ndarray) -> Visible:
  """A frame mask as runs of frames, for `attend_visible`.

  Raises:
    ValueError: if a frame sees nothing.
  """
  mask_FS = np.asarray(mask_FS, bool)
  if not mask_FS.any(1).all():
    raise ValueError(f'frame {mask_FS.any(1).argmin()} sees nothing')
  new = np.any(mask_FS[1:] != mask_FS[:-1], axis=1)
  starts = [0, *np.flatnonzero(new) + 1, len(mask_FS)]
  groups = []
  for first, after in zip(starts[:-1], starts[1:], strict=True):
    edges = np.diff(np.pad(mask_FS[first].astype(int), 1))
    ends = zip(np.flatnonzero(edges > 0), np.flatnonzero(edges < 0))
    runs = tuple((int(a), int(b)) for a, b in ends)
    groups.append((int(first), int(after), runs))
  return tuple(groups)


def attend_visible(
  q_BFPHK: jax.Array,
  k_BSHK: jax.Array,
  v_BSHK: jax.Array,
  visible: Visible,
  *,
  tokens_per_frame: int,
  length: jax.Array | None = None,
  backend: str = 'xla',
) -> jax.Array:
  """`attend` where frames see frames: one call for each group of `visible`.

  Args:
    q_BFPHK: queries; P may be a part of a frame's tokens.
    k_BSHK: keys of whole frames.
    v_BSHK: values.
    visible: of all F frames over all frames of the keys.
    tokens_per_frame: of the keys.
    length: int32 scalar, of the keys only the first `length` are seen.
    backend: as in `attend`.
  """
  batch, _, _, *heads = q_BFPHK.shape
  parts = []
  for first, after, runs in visible:
    bounds = [(a * tokens_per_frame, b * tokens_per_frame) for a, b in runs]
    keys, values = (
      jnp.concatenate([x[:, a:b] for a, b in bounds], 1)
      if len(bounds) > 1
      else x[:, slice(*bounds[0])]
      for x in (k_BSHK, v_BSHK)
    )
    seen: jax.Array | None = None
    if length is not None:
      # The runs rise, so that what is seen of them is a prefix as well.
      sizes = (jnp.clip(length - a, 0, b - a) for a, b in bounds)
      seen = functools.reduce(jnp.add, sizes)
    q = q_BFPHK[:, first:after]
    out = attend(
      q.reshape(batch, -1, *heads), keys, values, length=seen, backend=backend
    )
    parts.append(out.reshape(q.shape))
  return jnp.concatenate(parts, 1) if len(parts) > 1 else parts[0]


def _attend_xla(q_BTHK, k_BSHK, v_BSHK, length, mask_TS):
  """What jax.nn.dot_product_attention(implementation='xla') gives.

  Heads lie in front of tokens for both products: as jax has them, a CPU takes
  1.7 times as long (docs/pipeline.md). Divided by the sum last, where there are
  K numbers a query and not S.
  """
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BTHK, k_BSHK, v_BSHK))
  scores_BHTS = jnp.einsum(
    'BHTK,BHSK->BHTS', q, k, preferred_element_type=jnp.float32
  )
  scores_BHTS *= q.shape[-1] ** -0.5
  seen = mask_TS
  if length is not None:
    prefix = jnp.arange(k.shape[2]) < length
    seen = prefix if seen is None else seen & prefix
  if seen is not None:
    # Finite, so that a row that sees nothing is no NaN.
    scores_BHTS = jnp.where(seen, scores_BHTS, _UNSEEN)
  largest = jnp.max(scores_BHTS, -1, keepdims=True)
  weights = jnp.exp(scores_BHTS - jax.lax.stop_gradient(largest))
  out = jnp.einsum(
    'BHTS,BHSK->BHTK',
    weights.astype(v.dtype),
    v,
    preferred_element_type=jnp.float32,
  )
  out /= jnp.sum(weights, -1, keepdims=True)
  return jnp.swapaxes(out, 1, 2).astype(q.dtype)


def _attend_chunked(q_BTHK, k_BSHK, v_BSHK, length, mask_TS):
  """`_attend_xla` for some queries after the others; so is its gradient."""
  num_queries = q_BTHK.shape[1]
  size = splash.block_size(num_queries, _CHUNK, 8)
  rows = [jnp.moveaxis(splash.pad_axis(q_BTHK, 1, size), 1, 0)]
  if mask_TS is not None:
    rows.append(splash.pad_axis(mask_TS, 0, size))
  chunks = [x.reshape(-1, size, *x.shape[1:]) for x in rows]

  # Without remat the gradient would keep the scores of all chunks.
  @jax.checkpoint
  def one_chunk(chunk):
    q_tBHK, *mask = chunk
    out = _attend_xla(
      jnp.moveaxis(q_tBHK, 0, 1), k_BSHK, v_BSHK, length, *(mask or [None])
    )
    return jnp.moveaxis(out, 1, 0)

  out = jax.lax.map(one_chunk, chunks)
  out_TBHK = out.reshape(-1, *out.shape[2:])[:num_queries]
  return jnp.moveaxis(out_TBHK, 0, 1)


def kernel_layout(x_BSHK: jax.Array, backend: str) -> jax.Array:
  """Keys or values laid out in memory as the splash kernel reads them.

  That is [B, H, S, K]. Left to itself, XLA gives new keys another layout, and
  their cache with them, and copies the whole cache at every pass. cuDNN reads
  them as they are.
  """
  if backend not in ('splash', 'auto'):
    return x_BSHK
  return jax.lax.platform_dependent(
    x_BSHK,
    tpu=lambda x: layout.with_layout_constraint(x, layout.Layout((0, 2, 1, 3))),
    default=lambda x: x,
  )


def attend_cudnn(
  q_BTHK: jax.Array,
  k_BSHK: jax.Array,
  v_BSHK: jax.Array,
  length: jax.Array | None,
) -> jax.Array:
  """Flash attention by cuDNN, through jax.

  Lowered and compiled for CUDA in the tests and run on no GPU yet: of its
  numbers and its speed nothing is claimed here. `benchmarks/gpu.py` measures
  both.

  Args:
    q_BTHK: queries, such that `cudnn_refusal` has nothing against them.
    k_BSHK: keys.
    v_BSHK: values.
    length: int32 scalar, only the first `length` keys are seen; None: all,
      for which there is a kernel without padding.
  """
  # jax's rule for vmap takes arguments of which all are mapped, or none, and
  # stages have their own queries and lengths beside common text. This zero is
  # mapped if any argument is; XLA folds it, and the selections with it.
  zero_B = jnp.zeros(q_BTHK.shape[:1], jnp.int32)
  if length is not None:
    zero_B += length * 0
  for x in (q_BTHK, k_BSHK, v_BSHK):
    zero_B += 0 * x[:, 0, 0, 0].astype(jnp.int32)
  own = (zero_B == 0)[:, None, None, None]
  q, k, v = (jnp.where(own, x, 0) for x in (q_BTHK, k_BSHK, v_BSHK))
  lengths: dict[str, Any] = {}
  if length is not None:
    lengths = {
      'query_seq_lengths': zero_B + q.shape[1],
      'key_value_seq_lengths': zero_B + length,
    }
  return jax.nn.dot_product_attention(
    q, k, v, **lengths, implementation='cudnn'
  )


def cudnn_refusal(*arrays: jax.Array) -> str:
  """Why cuDNN has no flash attention for such q, k, v; '' if it has.

  It has for compute capability 8.0 or higher, one 16-bit dtype, and heads whose
  width is a multiple of 8 up to 128, or 256 from Hopper on. Known to jax where
  cuDNN is installed, with a GPU or without: what is compiled elsewhere for a
  GPU takes the kernel too.
  """
  for device in jax.local_devices() if _has_cuda() else ():
    # jax itself does not ask for this, and the kernel would fail when it runs.
    if tuple(map(int, device.compute_capability.split('.'))) < (8, 0):
      return f'compute capability {device.compute_capability} is below 8.0'
  abstract = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
  try:
    jax.eval_shape(functools.partial(attend_cudnn, length=None), *abstract)
  except (RuntimeError, NotImplementedError, ValueError) as error:
    return str(error).splitlines()[0].rstrip('.')
  return ''


def _has_cuda() -> bool:
  return 'cuda' in jax.extend.backend.get_backend().platform_version


def block_ends(
  num_frames: int, frames_per_block: int, first: int = 0
) -> np.ndarray:
  """Index after the last frame of each frame's block, int [F].

  Args:
    num_frames: F.
    frames_per_block: frames of a block; the last block may be shorter.
    first: frames of a first block of another size (image-to-video: 1).
  """
  frames = np.arange(num_frames)
  later = frames - first
  ends = first + (later // frames_per_block + 1) * frames_per_block
  return np.minimum(np.where(frames < first, first, ends), num_frames)


def block_causal_mask(
  num_frames: int,
  frames_per_block: int,
  *,
  window: int | None = None,
  sink: int = 0,
  first: int = 0,
) -> np.ndarray:
  """Which frame sees which in a full sequence denoised block by block.

  Args:
    num_frames: F.
    frames_per_block: frames that see each other freely.
    window: frames seen, own block and sink included; None = all.
    sink: first frames that stay visible for ever.
    first: see `block_ends`.

  Returns:
    bool [F, F], True where the row's frame sees the column's.
  """
  ends = block_ends(num_frames, frames_per_block, first)
  frame = np.arange(num_frames)[None]
  mask = frame < ends[:, None]
  if window is not None:
    mask &= (frame >= (ends - window + sink)[:, None]) | (frame < sink)
  return mask


def own_then_past_mask(
  num_frames: int,
  frames_per_block: int,
  *,
  window: int | None = None,
  sink: int = 0,
  first: int = 0,
  rows: int | None = None,
) -> np.ndarray:
  """Mask of the last `rows` frames over [those frames | context of all frames].

  A frame sees its own block, and of earlier blocks in the window their
  context: what denoising block by block against a cache sees.

  Args:
    num_frames: F.
    frames_per_block: frames that see each other freely.
    window: as in `block_causal_mask`.
    sink: as there.
    first: see `block_ends`.
    rows: R, frames to denoise; None = all.

  Returns:
    bool [R, R + F].
  """
  causal = block_causal_mask(
    num_frames, frames_per_block, window=window, sink=sink, first=first
  )
  ends = block_ends(num_frames, frames_per_block, first)
  own = ends[:, None] == ends[None]
  last = slice(0 if rows is None else num_frames - rows, None)
  return np.concatenate([own[last, last], (causal & ~own)[last]], 1)


def teacher_forcing_mask(num_frames: int, frames_per_block: int) -> np.ndarray:
  """Mask of the sequence [clean | noisy], each `num_frames` long.

  Clean blocks are block-causal among themselves; a noisy block sees itself
  and the clean blocks before it.

  Returns:
    bool [2 F, 2 F].
  """
  causal = block_causal_mask(num_frames, frames_per_block)
  own = causal & causal.T
  return np.block([[causal, np.zeros_like(causal)], [causal & ~own, own]])


def expand_frame_mask(mask_FS: jax.Array, tokens_per_frame: int) -> jax.Array:
  """Frame mask that is not known yet to token mask, bool [F * P, S * P]."""
  mask = jnp.repeat(jnp.asarray(mask_FS), tokens_per_frame, axis=0)
  return jnp.repeat(mask, tokens_per_frame, axis=1)
