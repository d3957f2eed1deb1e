"""A codec that costs nothing: latents are handed out as they are."""

from typing import Any

import jax


@jax.tree_util.register_static
class PlainCodec:
  """One for all videos of a benchmark: programs are found by it."""

  def init_decode_state(self, batch_size: int) -> tuple[()]:
    del batch_size
    return ()

  def decode_stream(self, state: Any, latents: jax.Array) -> tuple:
    return latents, state
