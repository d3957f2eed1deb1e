"""Flash attention by jax's splash kernel for TPUs."""

# B batch, T queries, S keys, H heads, K head width

from typing import Any

import jax
import jax.numpy as jnp

# Queries at a time where only values are asked for, with 512 keys. The kernel
# has 16 MiB unless the compiler is told otherwise: with 2,432 it took 16.02 in
# one of three training programs for v5p, which was refused.
_MOST = 2304


def attend_splash(
  q_BTHK: jax.Array,
  k_BSHK: jax.Array,
  v_BSHK: jax.Array,
  length: jax.Array | None,
  *,
  forward_only: bool = False,
  interpret: bool = False,
) -> jax.Array:
  """softmax(q k^T / sqrt(K)) v.

  Keys beyond the length cost nothing but for those of its last block.

  Args:
    q_BTHK: queries; on a TPU, K is a multiple of 128.
    k_BSHK: keys; as they are where S is a `padded` number, else copied.
    v_BSHK: values.
    length: int32 scalar, only the first `length` keys are seen; None: all.
    forward_only: nobody asks for a gradient, see `splash_blocks`.
    interpret: runs the kernel without a TPU, slowly: for tests.
  """
  # Not at the top: Pallas takes a second to import, and only TPUs need it.
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as splash_mask,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask_info as mask_info,
  )

  num_queries, num_heads, width = q_BTHK.shape[1:]
  kind = 'once' if forward_only else 'all' if length is None else 'cached'
  sizes = splash_blocks(num_queries, k_BSHK.shape[1], kind)
  # The kernel does not scale. In float32: 1 / sqrt(K) is no power of two.
  q = (q_BTHK.astype(jnp.float32) * width**-0.5).astype(q_BTHK.dtype)
  q = pad_axis(q, 1, sizes['block_q'])
  k, v = (pad_axis(x, 1, sizes['block_kv']) for x in (k_BSHK, v_BSHK))
  shape = (q.shape[1], k.shape[1])
  kernel = splash.make_splash_mha_single_device(
    splash_mask.MultiHeadMask([splash_mask.FullMask(shape)] * num_heads),
    block_sizes=splash.BlockSizes(**sizes),
    interpret=interpret,
  )
  if length is None:
    length = jnp.int32(k_BSHK.shape[1])
  elif forward_only:
    # Which blocks of keys are worked on, and which to fetch for each: beyond
    # the last one that again, which is there.
    used = -(-length // sizes['block_kv'])
    block = jnp.arange(shape[1] // sizes['block_kv'])
    rows = (1, shape[0] // sizes['block_q'], 1)
    kernel = splash.SplashAttentionKernel(
      mask_info.MaskInfo(
        data_next=jnp.tile(jnp.minimum(block, used - 1), rows),
        mask_next=None,
        block_mask=jnp.tile(2 * (block < used).astype(jnp.int32), rows),
        partial_mask_blocks=None,
        q_sequence=None,
      ),
      *(None, None),
      **kernel.kwargs,
    )
  # Queries see the keys of their own segment: the valid prefix is segment 1.
  segments = splash.SegmentIds(
    q=jnp.ones(shape[0], jnp.int32),
    kv=(jnp.arange(shape[1]) < length).astype(jnp.int32),
  )
  out_BHTK = jax.vmap(lambda q, k, v: kernel(q, k, v, segments))(
    *(jnp.swapaxes(x, 1, 2) for x in (q, k, v))
  )
  return jnp.swapaxes(out_BHTK, 1, 2)[:, :num_queries]


def splash_blocks(num_queries: int, num_keys: int, kind: str) -> dict[str, Any]:
  """Queries and keys at a time, by the names of splash's `BlockSizes`.

  Args:
    num_queries: T.
    num_keys: S.
    kind: 'all' has the padding suit the kernels of the gradient, which hold
      several times as much as that of the values. 'cached': passes against a
      cache, for which the latter decides: it reads all keys once for each block
      of queries. 'once': there is no gradient, and nothing is padded where T is
      a few equal parts of whole tiles of 8 rows. A block of Wan2.1's 4,680
      queries is three of 1,664 with 6.7 % of padding if it is 'cached', three
      of 1,560 'once'.
  """
  block_q = block_size(num_queries, 1024 if kind == 'all' else _MOST, 128)
  if kind == 'once':
    block_q = _even_part(num_queries) or block_q
  block_kv = block_size(num_keys, 1024, 128)
  padded = -(-num_queries // block_q) * block_q
  of_gradient = max(
    (n for n in range(128, 513, 128) if padded % n == 0), default=block_q
  )
  compute = max(n for n in range(128, 513, 128) if block_kv % n == 0)
  return dict(
    block_q=block_q,
    block_kv=block_kv,
    block_kv_compute=compute,
    block_q_dkv=of_gradient,
    block_kv_dkv=block_kv,
    block_kv_dkv_compute=block_kv,
    block_q_dq=of_gradient,
    block_kv_dq=block_kv,
  )


def _even_part(num_queries: int) -> int:
  """The largest part of at most _MOST in whole tiles; 0: none worth it."""
  for parts in range(1, 9):
    size, rest = divmod(num_queries, parts)
    if not rest and size % 8 == 0 and size <= _MOST:
      return size
  return 0


def padded(num_keys: int) -> int:
  """Keys that the kernel takes for so many without a copy."""
  block = splash_blocks(128, num_keys, 'once')['block_kv']
  return -(-num_keys // block) * block


def block_size(size: int, largest: int, multiple: int) -> int:
  """The multiple, at most `largest`, of which `size` needs fewest, evenly."""
  num_blocks = -(-size // largest)
  return -(-size // (num_blocks * multiple)) * multiple


def pad_axis(x: jax.Array, axis: int, multiple: int) -> jax.Array:
  """Zeros after x up to a multiple."""
  pad = -x.shape[axis] % multiple
  widths = [(0, pad if i == axis else 0) for i in range(x.ndim)]
  return jnp.pad(x, widths) if pad else x
