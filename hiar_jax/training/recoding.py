"""How the cut of a long rollout gets the beginning of a video.

A video VAE encodes the first frame of a video alone and later ones in groups,
so a latent from the middle is not what critic and teacher know a video to begin
with. The frame before the cut's second latent is decoded to pixels, with all
that came before it, and encoded as a first frame again.

Source: the public code of Self-Forcing (arXiv:2506.08009) and HiAR.
"""

# b blocks, B batch, f frames per block, F frames, h w latent rows and columns,
# C channels

from typing import Any

import jax
import jax.numpy as jnp

from hiar_jax import rollout


def first_latent(
  codec: Any,
  before_bBfhwC: jax.Array,
  num_before: jax.Array,
  first_BFhwC: jax.Array,
) -> jax.Array:
  """A frame of latents as the first of a video.

  Args:
    codec: see `codecs`. It decodes as a stream, block by block, so that the
      number of blocks need not be known.
    before_bBfhwC: blocks before the cut.
    num_before: how many of them there are, int32 scalar, at least 1.
    first_BFhwC: the cut's first frame, F = 1.

  Returns:
    [B, 1, h, w, C].
  """
  size = before_bBfhwC.shape[2]
  frames = rollout.join_blocks(before_bBfhwC)
  # The pieces: frame 0, then blocks that end one frame later than theirs did.
  frames = jnp.concatenate([frames, jnp.zeros_like(first_BFhwC)], 1)
  frames = jax.lax.dynamic_update_slice_in_dim(
    frames, first_BFhwC, num_before * size, 1
  )
  state = codec.init_decode_state(frames.shape[0])
  pixels, state = codec.decode_stream(state, frames[:, :1])

  def one_piece(i, carry):
    _, state = carry
    piece = jax.lax.dynamic_slice_in_dim(frames, 1 + i * size, size, 1)
    pixels, state = codec.decode_stream(state, piece)
    return pixels[:, -1:], state

  pixels, _ = jax.lax.fori_loop(
    0, num_before, one_piece, (pixels[:, -1:], state)
  )
  return codec.encode(pixels)
