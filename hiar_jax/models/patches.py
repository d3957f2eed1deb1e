"""Latents as tokens, and tokens as latents."""

# B batch, F frames, T tokens, h w rows and columns, C channels, p numbers of a
# patch

import jax


def patchify(x_BFhwC: jax.Array, patch: tuple[int, int]) -> jax.Array:
  """Latents to tokens in (frame, row, column) order, [B, T, ph*pw*C]."""
  batch, frames, height, width, channels = x_BFhwC.shape
  ph, pw = patch
  x = x_BFhwC.reshape(
    batch, frames, height // ph, ph, width // pw, pw, channels
  )
  x = x.transpose(0, 1, 2, 4, 3, 5, 6)
  return x.reshape(batch, -1, ph * pw * channels)


def unpatchify(x_BFhwp: jax.Array, patch: tuple[int, int]) -> jax.Array:
  """Tokens [B, F, h, w, ph*pw*C] to latents [B, F, h*ph, w*pw, C]."""
  batch, frames, rows, columns, _ = x_BFhwp.shape
  ph, pw = patch
  x = x_BFhwp.reshape(batch, frames, rows, columns, ph, pw, -1)
  x = x.transpose(0, 1, 2, 4, 3, 5, 6)
  return x.reshape(batch, frames, rows * ph, columns * pw, -1)
