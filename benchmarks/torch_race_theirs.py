"""The side of torch_race.py that is PyTorch's.

A network, official or the stand-in, and the public sampler's loops.
"""

import pathlib
import sys

import numpy as np
import torch
import torch_race_size as size


def orders(options):
  """order -> latents [F, h, w, C]."""
  torch.set_num_threads(1)
  torch.set_grad_enabled(False)
  stored = np.load(pathlib.Path(options.folder) / 'inputs.npz')
  weights = {
    name[2:]: torch.from_numpy(stored[name])
    for name in stored.files
    if name.startswith('w/')
  }
  states = torch.from_numpy(stored['states'])
  levels = [float(level) for level in stored['levels']]
  # [level, block, f, h, w, C] to [level, block, 1, f, C, h, w].
  noise = torch.from_numpy(stored['noise']).permute(0, 1, 2, 5, 3, 4)[
    :, :, None
  ]
  make = _Official if options.official else _StandIn
  network = make(options, weights, states, noise.shape[1] * size.FRAMES)
  steps, blocks = range(len(levels) - 1), range(options.num_blocks)

  def denoise(x, step, block):
    sigma = levels[step]
    x0 = x - sigma * network.flow(x, sigma, block * size.FRAMES)
    if step == steps[-1]:
      return x0
    eps, after = noise[step + 1, block], levels[step + 1]
    return (1 - after) * x0 + after * eps

  def block_first():
    network.begin()
    made = []
    for block in blocks:
      x = noise[0, block]
      for step in steps:
        x = denoise(x, step, block)
      network.flow(x, 0.0, block * size.FRAMES)
      made.append(x)
    return made

  def step_first():
    x = [noise[0, block] for block in blocks]
    for step in steps:
      network.begin()
      for block in blocks:
        x[block] = denoise(x[block], step, block)
        network.flow(x[block], levels[step + 1], block * size.FRAMES)
    return x

  def latents(made):
    return torch.cat(made, 1)[0].permute(0, 2, 3, 1).numpy()

  return {
    'block_first': lambda: latents(block_first()),
    'step_first': lambda: latents(step_first()),
  }


class _Official:
  """`CausalWanModel` of a checkout, and its caches."""

  def __init__(self, options, weights, states, num_frames):
    sys.path.insert(0, str(pathlib.Path(options.official).resolve()))
    from wan.modules import attention, causal_model, model

    def attend(q, k, v, *unused, **unused_too):
      # Theirs rounds to bfloat16; and is flash attention where that is there.
      q, k, v = (x.transpose(1, 2) for x in (q, k, v))
      out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
      return out.transpose(1, 2).contiguous()

    for module in (attention, causal_model, model):
      for name in ('attention', 'flash_attention'):
        if hasattr(module, name) and callable(getattr(module, name)):
          setattr(module, name, attend)
    dim, ffn_dim, heads, layers, side = size.SIZES[options.size]
    self._tokens = (side // 2) ** 2
    self._network = causal_model.CausalWanModel(
      text_len=size.TEXT_LEN,
      in_dim=size.CHANNELS,
      out_dim=size.CHANNELS,
      dim=dim,
      ffn_dim=ffn_dim,
      freq_dim=size.FREQ_DIM,
      text_dim=size.TEXT_DIM,
      num_heads=heads,
      num_layers=layers,
      local_attn_size=size.WINDOW,
      eps=size.EPS,
    ).eval()
    self._network.load_state_dict(weights)
    self._network.num_frame_per_block = size.FRAMES
    for block in self._network.blocks:
      # It takes a frame to have 1,560 tokens.
      block.self_attn.max_attention_size = size.WINDOW * self._tokens
    self._states, self._heads = list(states), (heads, dim // heads)

  def begin(self):
    """Empties the caches."""

    def keys(size):
      shape = (1, size, *self._heads)
      return {'k': torch.zeros(shape), 'v': torch.zeros(shape)}

    def ends():
      zero = lambda: torch.zeros(1, dtype=torch.long)
      return {'global_end_index': zero(), 'local_end_index': zero()}

    layers = range(len(self._network.blocks))
    self._past = [keys(size.WINDOW * self._tokens) | ends() for _ in layers]
    self._text = [keys(size.TEXT_LEN) | {'is_init': False} for _ in layers]

  def flow(self, x_BFChw, sigma, first):
    """Of a block whose first frame is `first`; its keys go to the cache."""
    out = self._network(
      x_BFChw.transpose(1, 2),
      t=torch.full((1, size.FRAMES), 1000.0 * sigma),
      context=self._states,
      seq_len=size.FRAMES * self._tokens,
      kv_cache=self._past,
      crossattn_cache=self._text,
      current_start=first * self._tokens,
    )
    return out.transpose(1, 2)


class _StandIn:
  """The network in plain torch; its caches are as long as the video."""

  def __init__(self, options, weights, states, num_frames):
    self._w, self._size = weights, size.SIZES[options.size]
    self._rows = self._size[-1] // 2
    self._num_frames, self._context = num_frames, states
    width = self._size[0] // self._size[2]
    pairs = width // 2
    parts = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    self._frequencies = [
      10000.0 ** (-torch.arange(part, dtype=torch.float64) / part)
      for part in parts
    ]
    self._past = []

  def _linear(self, name, x):
    weight, bias = self._w[f'{name}.weight'], self._w[f'{name}.bias']
    return torch.nn.functional.linear(x, weight, bias)

  def _rms(self, name, x):
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + size.EPS)
    return x * scale * self._w[f'{name}.weight']

  def _norm(self, x, *affine):
    return torch.nn.functional.layer_norm(
      x, x.shape[-1:], *affine, eps=size.EPS
    )

  def _heads(self, x):
    return x.unflatten(-1, (self._size[2], -1))

  def _attend(self, q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)

  def _rotation(self, first):
    of_frame, of_row, of_column = self._frequencies
    frames = torch.arange(first, first + size.FRAMES)[:, None] * of_frame
    side = torch.arange(self._rows)[:, None]
    shape = (size.FRAMES, self._rows, self._rows, -1)
    angles = torch.cat(
      [
        frames[:, None, None].expand(shape),
        (side * of_row)[None, :, None].expand(shape),
        (side * of_column)[None, None].expand(shape),
      ],
      -1,
    ).flatten(0, 2)
    return torch.polar(torch.ones_like(angles), angles)[:, None]

  def _rotate(self, x, rotation):
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).float()

  def begin(self):
    """Empties the caches, and projects the text for every layer."""
    dim, _, heads, layers, _ = self._size
    tokens = self._num_frames * self._rows**2
    shape = (1, tokens, heads, dim // heads)
    self._past = [
      (torch.zeros(shape), torch.zeros(shape)) for _ in range(layers)
    ]
    text = torch.nn.functional.gelu(
      self._linear('text_embedding.0', self._context), approximate='tanh'
    )
    text = self._linear('text_embedding.2', text)
    self._text = []
    for i in range(layers):
      name = f'blocks.{i}.cross_attn'
      k = self._rms(f'{name}.norm_k', self._linear(f'{name}.k', text))
      v = self._linear(f'{name}.v', text)
      self._text.append((self._heads(k), self._heads(v)))

  def flow(self, x_BFChw, sigma, first):
    """Of a block whose first frame is `first`; its keys go to the cache."""
    functional = torch.nn.functional
    dim, _, _, layers, _ = self._size
    frames, rows = x_BFChw.shape[1], self._rows
    x = functional.conv2d(
      x_BFChw[0],
      self._w['patch_embedding.weight'][:, :, 0],
      self._w['patch_embedding.bias'],
      stride=2,
    )
    x = x.flatten(2).transpose(1, 2).reshape(1, -1, dim)
    half = size.FREQ_DIM // 2
    angles = (
      1000.0
      * sigma
      * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    )
    time_in = torch.cat([angles.cos(), angles.sin()]).float()
    time_in = time_in.expand(1, frames, -1)
    e = functional.silu(self._linear('time_embedding.0', time_in))
    e = self._linear('time_embedding.2', e)
    e0 = self._linear('time_projection.1', functional.silu(e))
    e0 = e0.unflatten(-1, (6, dim))
    rotation = self._rotation(first)
    start = first * rows**2
    end = start + x.shape[1]
    by_frame = lambda y: y.unflatten(1, (frames, -1))
    for i in range(layers):
      name = f'blocks.{i}'
      parts = self._w[f'{name}.modulation'][:, None] + e0
      shift1, scale1, gate1, shift2, scale2, gate2 = parts.chunk(6, 2)
      y = (by_frame(self._norm(x)) * (1 + scale1) + shift1).flatten(1, 2)
      own = f'{name}.self_attn'
      q = self._rms(f'{own}.norm_q', self._linear(f'{own}.q', y))
      k = self._rms(f'{own}.norm_k', self._linear(f'{own}.k', y))
      past_k, past_v = self._past[i]
      past_k[:, start:end] = self._rotate(self._heads(k), rotation)
      past_v[:, start:end] = self._heads(self._linear(f'{own}.v', y))
      q = self._rotate(self._heads(q), rotation)
      seen = slice(max(0, end - size.WINDOW * rows**2), end)
      y = self._attend(q, past_k[:, seen], past_v[:, seen])
      y = self._linear(f'{own}.o', y)
      x = x + (by_frame(y) * gate1).flatten(1, 2)
      affine = (self._w[f'{name}.norm3.{part}'] for part in ('weight', 'bias'))
      cross = f'{name}.cross_attn'
      q = self._linear(f'{cross}.q', self._norm(x, *affine))
      q = self._heads(self._rms(f'{cross}.norm_q', q))
      x = x + self._linear(f'{cross}.o', self._attend(q, *self._text[i]))
      y = (by_frame(self._norm(x)) * (1 + scale2) + shift2).flatten(1, 2)
      y = functional.gelu(self._linear(f'{name}.ffn.0', y), approximate='tanh')
      y = self._linear(f'{name}.ffn.2', y)
      x = x + (by_frame(y) * gate2).flatten(1, 2)
    parts = self._w['head.modulation'][:, None] + e[:, :, None]
    shift, scale = parts.chunk(2, 2)
    y = (by_frame(self._norm(x)) * (1 + scale) + shift).flatten(1, 2)
    y = self._linear('head.head', y)
    y = y.reshape(frames, rows, rows, 2, 2, size.CHANNELS)
    y = y.permute(0, 5, 1, 3, 2, 4)
    return y.reshape(1, frames, size.CHANNELS, 2 * rows, 2 * rows)
