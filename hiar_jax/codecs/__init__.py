"""Frames to latents and back, behind one seam.

A codec is a pytree, so it goes through `jax.jit` as an argument, and has

  spatial_stride, temporal_stride, channels
  encode(video) -> latents                    [-1, 1] -> about unit variance
  decode(latents) -> video                    clipped to [-1, 1]
  init_decode_state(batch_size) -> state      an explicit pytree
  decode_stream(state, latents) -> video, state

Feeding a latent sequence to `decode_stream` in pieces gives the frames that
`decode` gives at once.
"""
