"""Curves of healthy and of sick distillations, in a small world of minutes.

  python tests/small_world_curves.py --out=/tmp/curves --plot=docs/training.png

trains a teacher, samples its trajectories, starts a student and distils it
several times, healthy and with one number wrong, and plots what each run wrote
to its metrics.jsonl. Started again, it goes on.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import ml_collections
import numpy as np

from hiar_jax.configs import bouncing_linear
from hiar_jax.training.network_files import WEIGHTS

_ROOT = pathlib.Path(__file__).parents[1]
# A distillation -> what its config has instead.
RUNS = {
  'healthy': {},
  'critic too slow': {'critic_optimiser.learning_rate': 2e-7},
  'student too fast': {'optimiser.learning_rate': 5e-3},
}
# Of the metrics -> what the plot calls it.
SHOWN = {
  'critic': "critic's loss",
  'dmd_gradient': 'gradient of the reverse KL',
  'forward_kl': 'forward KL',
  'student_grad_norm': "norm of the student's gradient",
}
_FRAMES = 9


def get_config(arguments: str) -> ml_collections.ConfigDict:
  """'phase,root', or 'run,root' with a run of RUNS, from the command line."""
  name, root = arguments.split(',')
  root = pathlib.Path(root)
  phase = 'distill' if name in RUNS else name
  c = bouncing_linear.get_config(phase)
  c.workdir = str(root / name.replace(' ', '_'))
  c.world = dict(height=32, width=32, num_frames=_FRAMES)
  c.codec.update(path=str(root / 'codec.npz'), num_videos=64)
  c.model.update(
    dim=64,
    ffn_dim=256,
    num_layers=2,
    unroll=2,
    latent_height=4,
    latent_width=4,
  )
  c.log_every, c.checkpoint_every = 6, 100
  if phase == 'teacher':
    c.iterations = 400
    return c
  c.rollout.window = _FRAMES
  c.teacher_weights = str(root / 'teacher' / WEIGHTS)
  c.trajectories.update(
    dir=str(root / 'trajectories'), num=96, num_frames=_FRAMES
  )
  if phase == 'student_start':
    c.iterations = 200
    return c
  c.student_weights = str(root / 'student_start' / WEIGHTS)
  c.rollout_blocks = (_FRAMES // 3, _FRAMES // 3)
  # Fewer and smaller programs to compile.
  c.distill.forward_kl_steps = c.model.unroll = 1
  c.iterations = 180
  for key, value in RUNS[name].items():
    section, _, field = key.partition('.')
    c[section][field] = value
  return c


def run(command: str, name: str, root: pathlib.Path) -> None:
  """`hiar-jax COMMAND` on a config of this file."""
  config = f'--config={pathlib.Path(__file__).resolve()}:{name},{root}'
  subprocess.run(
    [sys.executable, '-m', 'hiar_jax', command, config], cwd=_ROOT, check=True
  )


def curves(workdir: pathlib.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Of each metric that is shown: iterations and values."""
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').open()]
  found = {}
  for name in SHOWN:
    rows = [(line['step'], line[name]) for line in lines if name in line]
    found[name] = tuple(np.array(rows).T)
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--out', required=True, type=pathlib.Path)
  parser.add_argument('--plot', type=pathlib.Path)
  options = parser.parse_args()
  root = options.out.resolve()
  run('train', 'teacher', root)
  run('trajectories', 'student_start', root)
  run('train', 'student_start', root)
  found = {}
  for name in RUNS:
    run('train', name, root)
    found[name] = curves(root / name.replace(' ', '_'))
  for name, of_run in found.items():
    ends = ', '.join(
      f'{metric} {values[:3].mean():.3g} to {values[-3:].mean():.3g}'
      for metric, (_, values) in of_run.items()
    )
    print(f'{name}: {ends}')
  if options.plot:
    plot(options.plot, found)


def plot(path, found) -> None:
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  figure, grid = pyplot.subplots(2, 2, figsize=(8, 5), dpi=90, sharex=True)
  for axes, (metric, label) in zip(grid.flat, SHOWN.items(), strict=True):
    for (name, of_run), style in zip(found.items(), ('C0-', 'C3--', 'C1:')):
      axes.plot(*of_run[metric], style, linewidth=1.2, label=name)
    axes.set_title(label, fontsize=9)
    axes.set_yscale('log')
  grid[0, 0].legend(frameon=False, fontsize=8)
  for axes in grid[1]:
    axes.set_xlabel('iteration')
  figure.tight_layout()
  figure.savefig(path)


if __name__ == '__main__':
  main()
