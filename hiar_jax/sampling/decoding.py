"""Latents to pixels, block by block, in constant memory.

B batch, F frames, h w latent rows and columns, H W pixels, C channels.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from hiar_jax.codecs import pixels


def decoded_blocks(
  codec: Any, latents_BFhwC: np.ndarray | jax.Array, frames_per_block: int
) -> Iterator[tuple[np.ndarray, Any]]:
  """Decodes latents from the first frame on.

  The next block is under way while the caller looks at the last one.

  Args:
    codec: see `codecs`.
    latents_BFhwC: any number of frames; what makes no whole number of blocks
      are given frames, and those come first.
    frames_per_block: latent frames that are decoded at a time.

  Yields:
    A block's uint8 [B, F, H, W, 3], and the decoder's state after it.
  """
  batch_size, num_frames = latents_BFhwC.shape[:2]
  first = num_frames % frames_per_block or frames_per_block
  cuts = [0, *range(first, num_frames + 1, frames_per_block)]
  state, before = codec.init_decode_state(batch_size), None
  for start, end in itertools.pairwise(cuts):
    frames, state = decode_block(codec, state, latents_BFhwC[:, start:end])
    if before is not None:
      yield np.asarray(before[0]), before[1]
    before = frames, state
  if before is not None:
    yield np.asarray(before[0]), before[1]


def decode_blocks(
  codec: Any, latents_BFhwC: np.ndarray | jax.Array, frames_per_block: int
) -> tuple[np.ndarray, Any]:
  """All blocks of `decoded_blocks` in one array, and the last state."""
  blocks = list(decoded_blocks(codec, latents_BFhwC, frames_per_block))
  return np.concatenate([frames for frames, _ in blocks], 1), blocks[-1][1]


def decode_block(
  codec: Any, state: Any, latents_BFhwC: np.ndarray | jax.Array
) -> tuple[jax.Array, Any]:
  """The next latents' uint8 frames, and the decoder's state after them.

  Where the codec was put onto a device, that one decodes: a block is decoded
  there while others denoise the next.
  """
  own = [a for a in jax.tree.leaves(codec) if isinstance(a, jax.Array)]
  if own and own[0].committed:
    latents_BFhwC = jax.device_put(latents_BFhwC, own[0].sharding)
  return _decode_block(codec, state, latents_BFhwC)


@jax.jit
def _decode_block(codec, state, latents_BFhwC):
  frames, state = codec.decode_stream(state, latents_BFhwC)
  return pixels.from_float(frames), state
