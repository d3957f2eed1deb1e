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
with its own caches; without it the stand-in of torch_race_theirs.py: the same
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
import torch_race_size as size

_STEPS = (1000, 750, 500, 250)
# What of ours is beside what of theirs.
_CASES = {
  'step_first': 'step_first',
  'block_first': 'block_first',
  'stream_serial': 'step_first',
  'shared': 'step_first',
}


def _ours(options):
  """case -> latents [F, h, w, C]; writes what the other side needs."""
  import jax
  import jax.numpy as jnp
  import plain_codec

  from hiar_jax import noise_schedule, rollout
  from hiar_jax.codecs import pixels
  from hiar_jax.denoiser import Denoiser
  from hiar_jax.models.config import WanConfig
  from hiar_jax.sampling import calls, seeds, streaming
  from hiar_jax.weights import tables

  dim, ffn_dim, heads, layers, side = size.SIZES[options.size]
  model = WanConfig(
    dim=dim,
    ffn_dim=ffn_dim,
    num_heads=heads,
    num_layers=layers,
    unroll=layers,
    latent_height=side,
    latent_width=side,
    channels=size.CHANNELS,
    freq_dim=size.FREQ_DIM,
    text_dim=size.TEXT_DIM,
    text_len=size.TEXT_LEN,
  )
  denoiser, rng = Denoiser(model), np.random.default_rng(0)

  def draw(path, leaf):
    centre = 1.0 if 'norm' in jax.tree_util.keystr(path) else 0.0
    scale = 0.1 if leaf.ndim < 2 else leaf.shape[-2] ** -0.5
    return rng.normal(centre, scale, leaf.shape).astype(np.float32)

  params = jax.tree_util.tree_map_with_path(
    draw, jax.eval_shape(denoiser.init, jax.random.key(0))
  )
  states = rng.normal(size=(1, size.TEXT_LEN, size.TEXT_DIM)).astype(np.float32)
  keys = seeds.keys([0])

  def config(context):
    return rollout.RolloutConfig(
      levels=noise_schedule.warped_levels(_STEPS, 5.0),
      frames_per_block=size.FRAMES,
      window=size.WINDOW,
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

  pixels.from_float = lambda latents: latents
  codec = plain_codec.PlainCodec()

  def call(order, context='matched'):
    request = calls.Request(options.num_blocks, order=order)
    arguments = (denoiser, params, config(context), request, keys, states)
    return lambda: calls.sample(*arguments, None, lambda passes: None)[0]

  engine = streaming.Engine(denoiser, config('matched'), 'serial')

  def stream():
    with streaming.Stream(
      *(engine, params, codec, lambda prompts: states, ['x'], keys),
      num_blocks=options.num_blocks,
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


def _worker(options) -> None:
  """Makes a video for each line of stdin, which names the case."""
  # Before jax and torch are imported: they make a thread for each core.
  os.sched_setaffinity(0, {options.core})
  os.environ['OMP_NUM_THREADS'] = '1'
  flags = os.environ.get('XLA_FLAGS', '')
  os.environ['XLA_FLAGS'] = f'{flags} --xla_cpu_multi_thread_eigen=false'
  os.environ['JAX_PLATFORMS'] = 'cpu'
  if options.worker == 'ours':
    cases = _ours(options)
  else:
    import torch_race_theirs

    cases = torch_race_theirs.orders(options)
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
  """Races both sides in pairs and prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--official', help='a checkout of the public code')
  parser.add_argument('--size', choices=size.SIZES, default='small')
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
