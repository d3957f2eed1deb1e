"""How long an iteration of a training phase takes, also beside another version.

  python benchmarks/training.py --config=configs/bouncing.py:distill
  python benchmarks/training.py --config=configs/bouncing.py:distill \\
    --against=FOLDER     # a checkout of another commit, and its config:
    --against_config=FOLDER/configs/bouncing.py:distill

Each version is a process of its own; one after the other they compile, then
they take turns, a cycle of iterations each (one generator update and its critic
updates). Included: the data pipeline and all of the step. Not included:
compiling, checkpoints, metrics' lines. What earlier phases make is read from
where the config has it. With --compare it also tells how far the two versions'
networks are apart after the cycles that nobody timed: both start alike and see
the same batches and draws.
"""

import argparse
import importlib
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import numpy as np

_ROOT = pathlib.Path(__file__).parents[1]


def _load_config(path: str):
  file, _, phase = path.partition(':')
  spec = importlib.util.spec_from_file_location('benchmarked_config', file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(*([phase] if phase else []))


def _phases():
  """The module of the phases, also of versions from before the rooms."""
  package = importlib.import_module('hiar_jax')
  # By its folder: an editable installation answers for what it lacks.
  rooms = pathlib.Path(package.__file__).with_name('training').is_dir()
  name = 'hiar_jax.training.phases' if rooms else 'hiar_jax.phases'
  return importlib.import_module(name)


def _worker(path: str, compare: str | None) -> None:
  """Makes one cycle of iterations for each line of stdin."""
  import jax

  config = _load_config(path)
  phase = _phases().build(config)
  cycle = config.distill.generator_every if 'distill' in config else 1
  state, iteration = phase.state, 0

  def run():
    nonlocal state, iteration
    for _ in range(cycle):
      state, _ = phase.step(state, next(phase.batches), iteration)
      iteration += 1
    jax.block_until_ready(state)

  first = _arrays(phase.state)
  run()
  run()  # Whatever the first cycle's draw did not compile.
  if compare:
    arrays = _arrays(state)
    moved = {name: arrays[name] - first[name] for name in arrays}
    np.savez(compare, **moved)
  print(json.dumps({'cycle': cycle}), flush=True)
  for _ in sys.stdin:
    started = time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    print(json.dumps({'seconds': seconds}), flush=True)


def _arrays(state) -> dict[str, np.ndarray]:
  """What a state's networks and averages are; not the optimisers' own."""
  import jax

  return {
    name: np.array(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    if not (name := jax.tree_util.keystr(path)).endswith('iteration')
    and 'opt_state' not in name
  }


def _report_difference(files: list[str]) -> None:
  """How far two versions went apart, by network, beside how far they went."""
  this, against = (np.load(file) for file in files)
  if set(this) != set(against):
    raise SystemExit('the two versions have other parameters')
  networks = sorted({name.partition('[')[0] for name in this})
  for network in networks:
    names = [name for name in this if name.partition('[')[0] == network]
    apart = max(np.abs(this[n] - against[n]).max() for n in names)
    moved = max(np.abs(against[n]).max() for n in names)
    print(f'{network[1:]}: {apart:.1e} apart after moves of {moved:.1e}')


class _Version:
  """A checkout's process."""

  def __init__(
    self, folder: str | pathlib.Path, config: str, compare: str | None
  ):
    asked = [f'--compare={compare}'] if compare else []
    self._process = subprocess.Popen(
      [sys.executable, __file__, f'--config={config}', '--worker', *asked],
      env=os.environ | {'PYTHONPATH': str(pathlib.Path(folder).resolve())},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def read(self) -> dict:
    for line in self._process.stdout:
      if line.startswith('{'):
        return json.loads(line)
    raise SystemExit('a worker ended; its message is above')

  def repeat(self) -> float:
    self._process.stdin.write('\n')
    self._process.stdin.flush()
    return self.read()['seconds']

  def stop(self) -> None:
    self._process.stdin.close()
    self._process.wait(timeout=60)


def main() -> None:
  """Times both versions in turns and prints the ratio."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--config', required=True, help='FILE:PHASE')
  parser.add_argument('--against', help='a checkout of another version')
  parser.add_argument('--against_config', help='default: the same')
  parser.add_argument('--repetitions', type=int, default=9)
  parser.add_argument('--compare', help='a folder to keep the networks in')
  parser.add_argument('--worker', action='store_true', help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.worker:
    _worker(options.config, options.compare)
    return
  if options.repetitions < 1:
    parser.error('--repetitions is at least 1')
  sources = {'this': (_ROOT, options.config)}
  if options.against:
    if not (pathlib.Path(options.against) / 'hiar_jax').is_dir():
      parser.error(f'--against={options.against} has no folder hiar_jax')
    other = options.against_config or options.config
    sources['against'] = (options.against, other)
  versions, seconds = {}, {name: [] for name in sources}
  for name, (folder, config) in sources.items():
    compare = None
    if options.compare:
      compare = str(pathlib.Path(options.compare).resolve() / f'{name}.npz')
    versions[name] = _Version(folder, config, compare)
    cycle = versions[name].read()['cycle']
  for _ in range(options.repetitions):
    for name, version in versions.items():
      seconds[name].append(version.repeat() / cycle)
  for version in versions.values():
    version.stop()
  print(f'{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; ', end='')
  print(f'{options.repetitions} cycles of {cycle} iterations')
  for name, times in seconds.items():
    print(
      f'{name:8} {statistics.median(times):.3f} s an iteration '
      f'({min(times):.3f} to {max(times):.3f})'
    )
  if options.against:
    ratios = [a / b for a, b in zip(seconds['this'], seconds['against'])]
    print(f'this / against: {statistics.median(ratios):.3f}')
  if options.compare and options.against:
    folder = pathlib.Path(options.compare)
    _report_difference([folder / f'{name}.npz' for name in sources])


if __name__ == '__main__':
  main()
