"""The tiny video autoencoder "taew2_1", which stands in for Wan2.1's VAE.

22 MB instead of 508, no attention, no 3-D convolutions: every layer sees its
own frame, and a "memory block" the frame before as well, so that a stream holds
one frame a memory block. Published with TAEHV (github.com/madebyollin/taehv,
MIT) and distilled from the VAE, whose latents it takes as the network makes
them, without their mean and std. What it makes is close to the VAE's frames,
not the same.

Parameters are a dict of the published names, with kernels [rows, columns, in,
out]; `weights.tiny_vae_files` reads them.
"""

# B batch, F frames, H rows, W columns, C channels

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

Params = Mapping[str, jax.Array]
# What each memory block has seen last, [B, 1, H, W, C] by the block's name.
State = dict[str, jax.Array]

SPACE_FACTOR, TIME_FACTOR = 8, 4
CHANNELS = 16
# Frames at the beginning of what is decoded that are no frames of the video.
LEAD = TIME_FACTOR - 1

# (kind, its numbers) of each layer, whose place in the list is its name.
_ENCODER: tuple[tuple[Any, ...], ...] = (
  *(('conv', 64), ('relu',)),
  *(('pool', 2), ('conv', 64, 2), *[('memory',)] * 3),
  *(('pool', 2), ('conv', 64, 2), *[('memory',)] * 3),
  *(('pool', 1), ('conv', 64, 2), *[('memory',)] * 3),
  ('conv', CHANNELS),
)
_DECODER: tuple[tuple[Any, ...], ...] = (
  *(('squash',), ('conv', 256), ('relu',)),
  *([('memory',)] * 3 + [('enlarge',), ('grow', 1), ('conv', 128)]),
  *([('memory',)] * 3 + [('enlarge',), ('grow', 2), ('conv', 64)]),
  *([('memory',)] * 3 + [('enlarge',), ('grow', 2), ('conv', 64)]),
  *(('relu',), ('conv', 3)),
)


def shapes() -> dict[str, tuple[int, ...]]:
  """Published names and their shapes in torch, [out, in, rows, columns]."""
  wanted: dict[str, tuple[int, ...]] = {}
  for part, layers, width in (
    ('encoder', _ENCODER, 3),
    ('decoder', _DECODER, CHANNELS),
  ):
    for i, (kind, *numbers) in enumerate(layers):
      name = f'{part}.{i}'
      if kind == 'conv':
        wanted[f'{name}.weight'] = (numbers[0], width, 3, 3)
        # Only the first and the last of a part have one.
        if width in (3, CHANNELS) or numbers[0] in (3, CHANNELS):
          wanted[f'{name}.bias'] = (numbers[0],)
        width = numbers[0]
      elif kind == 'pool':
        wanted[f'{name}.conv.weight'] = (width, numbers[0] * width, 1, 1)
      elif kind == 'grow':
        wanted[f'{name}.conv.weight'] = (numbers[0] * width, width, 1, 1)
      elif kind == 'memory':
        for at, inputs in ((0, 2 * width), (2, width), (4, width)):
          wanted[f'{name}.conv.{at}.weight'] = (width, inputs, 3, 3)
          wanted[f'{name}.conv.{at}.bias'] = (width,)
  return wanted


def encode(params: Params, video_BFHWC: jax.Array) -> jax.Array:
  """Latents of frames.

  Args:
    params: of the encoder at least.
    video_BFHWC: RGB in [0, 1]; its end is filled up to a multiple of 4 frames
      with its last one. H and W are multiples of 8.

  Returns:
    [B, ceil(F / 4), H / 8, W / 8, 16], as the network takes them.
  """
  missing = -video_BFHWC.shape[1] % TIME_FACTOR
  last = jnp.repeat(video_BFHWC[:, -1:], missing, 1)
  x = jnp.concatenate([video_BFHWC, last], 1)
  return _run(params, 'encoder', _ENCODER, x, None)[0]


def decode(
  params: Params, latents_BFHWC: jax.Array, state: State | None = None
) -> tuple[jax.Array, State]:
  """Frames of the next latents.

  Args:
    params: of the decoder at least.
    latents_BFHWC: as the network makes them.
    state: after the latents before; None: a video starts here.

  Returns:
    RGB [B, 4 F, 8 H, 8 W, 3], about [0, 1] and not clipped, and the state after
    them. At the start of a video the first LEAD frames are to be dropped.
  """
  return _run(params, 'decoder', _DECODER, latents_BFHWC, state)


def _run(params, part, layers, x, state):
  new_state: State = {}
  for i, (kind, *numbers) in enumerate(layers):
    name = f'{part}.{i}'
    if kind == 'conv':
      stride = numbers[1] if len(numbers) > 1 else 1
      x = _conv(params, name, x, stride)
    elif kind == 'relu':
      x = jax.nn.relu(x)
    elif kind == 'squash':
      x = 3 * jnp.tanh(x / 3)
    elif kind == 'enlarge':
      x = jnp.repeat(jnp.repeat(x, 2, 2), 2, 3)
    elif kind == 'pool':
      x = _conv(params, f'{name}.conv', _stack(x, numbers[0]))
    elif kind == 'grow':
      x = _unstack(_conv(params, f'{name}.conv', x), numbers[0])
    else:
      before = jnp.zeros_like(x[:, :1]) if state is None else state[name]
      new_state[name] = x[:, -1:]
      x = _memory(params, name, x, jnp.concatenate([before, x[:, :-1]], 1))
  return x, new_state


def _memory(params, name, x, before):
  y = jnp.concatenate([x, before], -1)
  for at in (0, 2, 4):
    y = _conv(params, f'{name}.conv.{at}', y)
    y = jax.nn.relu(y) if at < 4 else y
  return jax.nn.relu(y + x)


def _stack(x_BFHWC, by):
  """Frames in groups onto the channels, the earliest first."""
  b, f, h, w, c = x_BFHWC.shape
  x = x_BFHWC.reshape(b, f // by, by, h, w, c)
  return jnp.moveaxis(x, 2, 4).reshape(b, f // by, h, w, by * c)


def _unstack(x_BFHWC, by):
  b, f, h, w, c = x_BFHWC.shape
  x = jnp.moveaxis(x_BFHWC.reshape(b, f, h, w, by, c // by), 4, 2)
  return x.reshape(b, f * by, h, w, c // by)


def _conv(params, name, x_BFHWC, stride=1):
  kernel = params[f'{name}.weight']
  pad = kernel.shape[0] // 2
  y = jax.lax.conv_general_dilated(
    x_BFHWC.reshape(-1, *x_BFHWC.shape[2:]),
    kernel.astype(x_BFHWC.dtype),
    window_strides=(stride, stride),
    padding=((pad, pad), (pad, pad)),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  y = y.reshape(*x_BFHWC.shape[:2], *y.shape[1:])
  if f'{name}.bias' in params:
    y = y + params[f'{name}.bias'].astype(y.dtype).reshape(1, 1, 1, 1, -1)
  return y
