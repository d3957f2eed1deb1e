"""The one seam for attention, and the frame masks of its uses."""

# B batch, T queries, S keys, H heads, K head width, F frames

import jax
import jax.numpy as jnp
import numpy as np


def attend(
  q_BTHK: jax.Array,
  k_BSHK: jax.Array,
  v_BSHK: jax.Array,
  *,
  length: jax.Array | None = None,
  mask_TS: jax.Array | None = None,
) -> jax.Array:
  """softmax(q k^T / sqrt(K)) v with a float32 softmax.

  Args:
    q_BTHK: queries.
    k_BSHK: keys.
    v_BSHK: values.
    length: int32 scalar, only the first `length` keys are seen.
    mask_TS: bool, True where query t sees key s.

  Returns:
    [B, T, H, K] in the dtype of q.
  """
  lengths = None
  if length is not None:
    lengths = jnp.broadcast_to(length, q_BTHK.shape[:1])
  if mask_TS is not None:
    mask_TS = mask_TS[None, None]
  return jax.nn.dot_product_attention(
    q_BTHK, k_BSHK, v_BSHK, mask=mask_TS, key_value_seq_lengths=lengths
  )


def block_ends(num_frames: int, frames_per_block: int, first: int = 0):
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


def expand_frame_mask(mask_FS: np.ndarray, tokens_per_frame: int) -> jax.Array:
  """Frame mask to token mask, bool [F * P, S * P]."""
  mask = jnp.repeat(jnp.asarray(mask_FS), tokens_per_frame, axis=0)
  return jnp.repeat(mask, tokens_per_frame, axis=1)
