"""Makes the same video by this library and by PyTorch, in turns on one core.

  PYTHONPATH=FOLDER_WITH_TORCH python benchmarks/torch_race.py
  python benchmarks/torch_race.py --official PATH   # a checkout of public HiAR

Each side is a process pinned to the same core, with one thread. Both get the
same random weights, text states and noise. One after the other they start and
compile; then they take turns, a video each, so that whatever else the machine
does strikes both; told are medians, and of the ratios of neighbours. Latents of
both are compared. `cpu` are seconds of processor time, for machines that do
other work besides; `wall` are those of the clock.

With --official the network is `CausalWanModel` of that checkout, in float32,
with its own caches; without it a stand-in that is written out below: the same
passes in plain torch, over the frames that there are, rotations in complex
float64 as there. The stand-in embeds its text once and not in every pass. The
loops over blocks and steps are those of the public sampler, which commits the
last block as well; noise is drawn beforehand.

Included on our side: noise, projecting the text, writing of the past, the
host's loop. Not included on either: compiling, text encoder, codec, files.
"""

import argparse
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

_ROOT = pathlib.Path(__file__).parents[1]
_SIZES = {
  # dim, ffn_dim, heads, layers, latent side
  'tiny': (24, 48, 2, 1, 4),
  'small': (192, 768, 6, 6, 16),
}
_FRAMES, _CHANNELS, _WINDOW = 3, 16, 21  # Of a block; of a latent; in frames.
_FREQ_DIM, _TEXT_LEN, _TEXT_DIM, _EPS = 256, 16, 64, 1e-6
_STEPS = (1000, 750, 500, 250)
# What of ours is beside what of theirs.
_CASES = {
  'step_first': 'step_first',
  'block_first': 'block_first',
  'stream_serial': 'step_first',
  'shared': 'step_first',
}


# --- Ours.


def _ours(options):
  """case -> latents [F, h, w, C]; writes what the other side needs."""
  import jax
  import jax.numpy as jnp

  from hiar_jax import noise_schedule, rollout
  from hiar_jax.codecs import pixels
  from hiar_jax.denoiser import Denoiser
  from hiar_jax.models.config import WanConfig
  from hiar_jax.sampling import calls, seeds, streaming
  from hiar_jax.weights import tables

  dim, ffn_dim, heads, layers, side = _SIZES[options.size]
  model = WanConfig(
    dim=dim,
    ffn_dim=ffn_dim,
    num_heads=heads,
    num_layers=layers,
    unroll=layers,
    latent_height=side,
    latent_width=side,
    channels=_CHANNELS,
    freq_dim=_FREQ_DIM,
    text_dim=_TEXT_DIM,
    text_len=_TEXT_LEN,
  )
  denoiser, rng = Denoiser(model), np.random.default_rng(0)

  def draw(path, leaf):
    centre = 1.0 if 'norm' in jax.tree_util.keystr(path) else 0.0
    scale = 0.1 if leaf.ndim < 2 else leaf.shape[-2] ** -0.5
    return rng.normal(centre, scale, leaf.shape).astype(np.float32)

  params = jax.tree_util.tree_map_with_path(
    draw, jax.eval_shape(denoiser.init, jax.random.key(0))
  )
  states = rng.normal(size=(1, _TEXT_LEN, _TEXT_DIM)).astype(np.float32)
  keys = seeds.keys([0])

  def config(context):
    return rollout.RolloutConfig(
      levels=noise_schedule.warped_levels(_STEPS, 5.0),
      frames_per_block=_FRAMES,
      window=_WINDOW,
      context=context,
    )

  levels = config('matched').levels
  noise = rollout.named_noise(keys, config('matched').block_shape(model))
  bank = jax.vmap(jax.vmap(noise, (None, 0)), (0, None))(
    jnp.arange(len(levels)), jnp.arange(options.num_blocks)
  )
  flat = tables.flatten(params)
  weights = {
    name: slot.to_foreign(
      flat[slot.path] if slot.index is None else flat[slot.path][slot.index]
    )
    for name, slot in tables.slots(
      {path: array.shape for path, array in flat.items()}, tables.WAN_RULES
    ).items()
  }
  np.savez(
    pathlib.Path(options.folder) / 'inputs.npz',
    states=states,
    levels=np.float32(levels),
    noise=np.asarray(bank)[:, :, 0],
    **{f'w/{name}': array for name, array in weights.items()},
  )
  print(f'{sum(a.size for a in weights.values()) / 1e6:.2f} M parameters')
  params = denoiser.unstack_layers(jax.tree.map(jnp.asarray, params))

  class Plain:
    """Hands latents out as they are."""

    def init_decode_state(self, batch_size):
      return ()

    def decode_stream(self, state, latents):
      return latents, state

  jax.tree_util.register_static(Plain)
  pixels.from_float = lambda latents: latents
  codec = Plain()

  def call(order, context='matched'):
    request = calls.Request(options.num_blocks, order=order)
    arguments = (denoiser, params, config(context), request, keys, states)
    return lambda: calls.sample(*arguments, None, lambda passes: None)[0]

  engine = streaming.Engine(denoiser, config('matched'), 'serial')

  def stream():
    with streaming.Stream(
      *(engine, params, codec, lambda prompts: states, ['x'], keys)
    ) as blocks:
      blocks.ahead = 0
      return np.concatenate(
        [next(blocks)[0] for _ in range(options.num_blocks)]
      )

  return {
    'step_first': call('step_first'),
    'block_first': call('block_first'),
    'shared': call('step_first', 'shared'),
    'stream_serial': stream,
  }


# --- Theirs.


def _theirs(options):
  """order -> latents [F, h, w, C]."""
  import torch

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
  network = make(options, weights, states, noise.shape[1] * _FRAMES)
  steps, blocks = range(len(levels) - 1), range(options.num_blocks)

  def denoise(x, step, block):
    sigma = levels[step]
    x0 = x - sigma * network.flow(x, sigma, block * _FRAMES)
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
      network.flow(x, 0.0, block * _FRAMES)
      made.append(x)
    return made

  def step_first():
    x = [noise[0, block] for block in blocks]
    for step in steps:
      network.begin()
      for block in blocks:
        x[block] = denoise(x[block], step, block)
        network.flow(x[block], levels[step + 1], block * _FRAMES)
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
    import torch

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
    dim, ffn_dim, heads, layers, side = _SIZES[options.size]
    self._tokens = (side // 2) ** 2
    self._network = causal_model.CausalWanModel(
      text_len=_TEXT_LEN,
      in_dim=_CHANNELS,
      out_dim=_CHANNELS,
      dim=dim,
      ffn_dim=ffn_dim,
      freq_dim=_FREQ_DIM,
      text_dim=_TEXT_DIM,
      num_heads=heads,
      num_layers=layers,
      local_attn_size=_WINDOW,
      eps=_EPS,
    ).eval()
    self._network.load_state_dict(weights)
    self._network.num_frame_per_block = _FRAMES
    for block in self._network.blocks:
      # It takes a frame to have 1,560 tokens.
      block.self_attn.max_attention_size = _WINDOW * self._tokens
    self._states, self._heads = list(states), (heads, dim // heads)

  def begin(self):
    """Empties the caches."""
    import torch

    def keys(size):
      shape = (1, size, *self._heads)
      return {'k': torch.zeros(shape), 'v': torch.zeros(shape)}

    def ends():
      zero = lambda: torch.zeros(1, dtype=torch.long)
      return {'global_end_index': zero(), 'local_end_index': zero()}

    layers = range(len(self._network.blocks))
    self._past = [keys(_WINDOW * self._tokens) | ends() for _ in layers]
    self._text = [keys(_TEXT_LEN) | {'is_init': False} for _ in layers]

  def flow(self, x_BFChw, sigma, first):
    """Of a block whose first frame is `first`; its keys go to the cache."""
    import torch

    out = self._network(
      x_BFChw.transpose(1, 2),
      t=torch.full((1, _FRAMES), 1000.0 * sigma),
      context=self._states,
      seq_len=_FRAMES * self._tokens,
      kv_cache=self._past,
      crossattn_cache=self._text,
      current_start=first * self._tokens,
    )
    return out.transpose(1, 2)


class _StandIn:
  """The network in plain torch; its caches are as long as the video."""

  def __init__(self, options, weights, states, num_frames):
    import torch

    self._w, self._size = weights, _SIZES[options.size]
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
    import torch

    weight, bias = self._w[f'{name}.weight'], self._w[f'{name}.bias']
    return torch.nn.functional.linear(x, weight, bias)

  def _rms(self, name, x):
    import torch

    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + _EPS)
    return x * scale * self._w[f'{name}.weight']

  def _norm(self, x, *affine):
    import torch

    return torch.nn.functional.layer_norm(x, x.shape[-1:], *affine, eps=_EPS)

  def _heads(self, x):
    return x.unflatten(-1, (self._size[2], -1))

  def _attend(self, q, k, v):
    import torch

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)

  def _rotation(self, first):
    import torch

    of_frame, of_row, of_column = self._frequencies
    frames = torch.arange(first, first + _FRAMES)[:, None] * of_frame
    side = torch.arange(self._rows)[:, None]
    shape = (_FRAMES, self._rows, self._rows, -1)
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
    import torch

    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).float()

  def begin(self):
    """Empties the caches, and projects the text for every layer."""
    import torch

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
    import torch

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
    half = _FREQ_DIM // 2
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
      seen = slice(max(0, end - _WINDOW * rows**2), end)
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
    y = y.reshape(frames, rows, rows, 2, 2, _CHANNELS)
    y = y.permute(0, 5, 1, 3, 2, 4)
    return y.reshape(1, frames, _CHANNELS, 2 * rows, 2 * rows)


# --- The race.


def _worker(options) -> None:
  """Makes a video for each line of stdin, which names the case."""
  # Before jax and torch are imported: they make a thread for each core.
  os.sched_setaffinity(0, {options.core})
  os.environ['OMP_NUM_THREADS'] = '1'
  flags = os.environ.get('XLA_FLAGS', '')
  os.environ['XLA_FLAGS'] = f'{flags} --xla_cpu_multi_thread_eigen=false'
  os.environ['JAX_PLATFORMS'] = 'cpu'
  cases = {'ours': _ours, 'theirs': _theirs}[options.worker](options)
  folder = pathlib.Path(options.folder)
  for name in options.names.split(','):
    for _ in range(2):  # Compiles; and what only a second time does.
      latents = cases[name]()
    np.save(folder / f'{options.worker}_{name}.npy', latents)
  print('ready', flush=True)
  for line in sys.stdin:
    wall, cpu = time.perf_counter(), time.process_time()
    cases[line.strip()]()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(json.dumps({'wall': wall, 'cpu': cpu}), flush=True)


class _Side:
  """The process of a side."""

  def __init__(self, which: str, names, options, folder: str):
    asked = ['--official', options.official] if options.official else []
    self._process = subprocess.Popen(
      [
        *(sys.executable, __file__, *asked, f'--size={options.size}'),
        *(f'--num_blocks={options.num_blocks}', f'--core={options.core}'),
        *(f'--folder={folder}', f'--worker={which}'),
        f'--names={",".join(names)}',
      ],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    for line in self._process.stdout:
      if line.strip() == 'ready':
        return
      print(line.rstrip(), flush=True)
    raise SystemExit(f'the worker {which!r} ended; its message is above')

  def make(self, name: str) -> dict[str, float]:
    """Seconds of a video."""
    self._process.stdin.write(f'{name}\n')
    self._process.stdin.flush()
    return json.loads(self._process.stdout.readline())

  def stop(self) -> None:
    self._process.stdin.close()
    self._process.wait(timeout=60)


def _row(name: str, pairs: list, folder: pathlib.Path, clock: str) -> str:
  """A line of the table: medians, the median of ratios, latents compared."""
  other = _CASES[name]
  ours, theirs = ([seconds[clock] for seconds in side] for side in zip(*pairs))
  ratio = statistics.median(b / a for a, b in zip(ours, theirs))
  apart = '-'
  if name != 'shared':  # A method of its own.
    a, b = (
      np.load(folder / file)
      for file in (f'ours_{name}.npy', f'theirs_{other}.npy')
    )
    apart = f'{np.abs(a - b).max():.1e} of {np.abs(b).max():.1f}'
    if not math.isfinite(np.abs(a - b).max()):
      raise SystemExit(f'{name}: latents are not finite')
  return (
    f'| {name} | {other} | {statistics.median(ours):.3f} | '
    f'{statistics.median(theirs):.3f} | {ratio:.2f} | {apart} |'
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--official', help='a checkout of the public code')
  parser.add_argument('--size', choices=_SIZES, default='small')
  parser.add_argument('--num_blocks', type=int, default=7)
  parser.add_argument('--repetitions', type=int, default=7)
  parser.add_argument('--cases', default=','.join(_CASES), help='by comma')
  parser.add_argument('--core', type=int, default=0)
  for hidden in ('--worker', '--folder', '--names'):
    parser.add_argument(hidden, help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.worker:
    _worker(options)
    return
  names = options.cases.split(',')
  for name in names:
    if name not in _CASES:
      parser.error(f'case {name!r} is not one of {", ".join(_CASES)}')
  if min(options.num_blocks, options.repetitions) < 1:
    parser.error('--num_blocks and --repetitions are at least 1')
  if (
    options.official
    and not (
      pathlib.Path(options.official) / 'wan/modules/causal_model.py'
    ).is_file()
  ):
    parser.error(
      f'--official={options.official} has no wan/modules/causal_model.py'
    )
  pairs: dict[str, list] = {name: [] for name in names}
  with tempfile.TemporaryDirectory() as folder:
    sides = [_Side('ours', names, options, folder)]
    others = sorted({_CASES[name] for name in names})
    sides.append(_Side('theirs', others, options, folder))
    for _ in range(options.repetitions):
      for name in names:
        ours = sides[0].make(name)
        pairs[name].append((ours, sides[1].make(_CASES[name])))
    for side in sides:
      side.stop()
    who = 'the public code' if options.official else 'a stand-in of our own'
    print(
      f'size {options.size}, {options.num_blocks} blocks, '
      f'{options.repetitions} pairs, core {options.core}, load '
      f'{os.getloadavg()[0]:.1f}; torch: {who}'
    )
    for clock in ('wall', 'cpu'):
      print(f'\n| ours | torch | ours, {clock} s | torch, {clock} s |', end='')
      print(' torch / ours | latents apart |\n|---|---|---|---|---|---|')
      for name in names:
        print(_row(name, pairs[name], pathlib.Path(folder), clock))


if __name__ == '__main__':
  main()
