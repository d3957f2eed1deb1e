"""The small world's teacher, from its own source and from files of it.

  python tests/small_world_files.py --out=/tmp/files --plot=docs/files.png

writes videos of the small world as mp4 with a list of captions, encodes both by
the programs that anyone's videos go through, trains the same teacher from the
source and from the files, with several seeds each, and prints and plots the
losses. There are two sets of files: as cameras write them, with the colours at
half the resolution ('files'), and without loss ('lossless'), which have to
agree with the source within the noise of the seeds. Takes minutes on one
processor; started again, it goes on.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import av
import ml_collections
import numpy as np

from hiar_jax.codecs import pixels
from hiar_jax.configs import bouncing_linear
from hiar_jax.data import bouncing
from hiar_jax.data import videos as data_videos
from hiar_jax.runtime import files, video_io
from hiar_jax.training import inputs

WAYS = ('source', 'files', 'lossless')
_STYLES = dict(source='C0-', files='C3--', lossless='k.')
FPS = 16
NUM = 256
_ROOT = pathlib.Path(__file__).parents[1]


def get_config(arguments: str) -> ml_collections.ConfigDict:
  """'way,seed,root,num,iterations' from the command line."""
  way, seed, root, num, iterations = arguments.split(',')
  root, num, iterations = pathlib.Path(root), int(num), int(iterations)
  c = bouncing_linear.get_config('teacher')
  c.workdir = str(root / f'{way}_{seed}')
  c.seed = int(seed)
  c.world = dict(height=32, width=32, num_frames=9)
  c.videos = dict(source='bouncing', length=num)
  c.codec.update(path=str(root / 'codec.npz'), num_videos=64)
  c.model.update(
    dim=64,
    ffn_dim=256,
    num_layers=2,
    unroll=2,
    latent_height=4,
    latent_width=4,
  )
  c.iterations, c.log_every, c.checkpoint_every = iterations, 10, 100
  if way != 'source':
    c.videos = dict(
      source='folder',
      path=str(root / way / 'videos'),
      fps=FPS,
      num_frames=9,
      height=32,
      width=32,
    )
    c.latents = dict(
      dir=str(root / way / 'latents'), num=0, shard_size=64, batch_size=8
    )
    c.states = dict(
      dir=str(root / way / 'states'), num=0, shard_size=64, batch_size=8
    )
  return c


def write_videos(config: ml_collections.ConfigDict, root: pathlib.Path):
  """The scenes of a config's world as both sets of files."""
  for way, write in (('files', video_io.write_video), ('lossless', _write_rgb)):
    _write_videos(config, root / way / 'videos', write)


def _write_rgb(path: pathlib.Path, frames: np.ndarray, *, fps: int) -> None:
  """H.264 of red, green and blue, whose frames are these bit by bit."""
  with (
    files.whole_file(path) as partial,
    av.open(partial, 'w', format='mp4') as file,
  ):
    stream = file.add_stream('libx264rgb', rate=fps, options={'crf': '0'})
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = 'rgb24'
    for frame in frames:
      picture = av.VideoFrame.from_ndarray(frame, format='rgb24')
      file.mux(stream.encode(picture))
    file.mux(stream.encode())


def _write_videos(config, folder, write):
  folder.mkdir(parents=True, exist_ok=True)
  options = config.videos.to_dict()
  options.pop('source')
  scenes = bouncing.open_videos(options, config)
  lines = []
  for index in range(len(scenes)):
    path = folder / f'{index:05d}.mp4'
    if not path.exists():
      write(path, scenes[index], fps=FPS)
    line = {'file': path.name, 'caption': scenes.captions[index]}
    lines.append(json.dumps(line) + '\n')
  with files.whole_file(folder / data_videos.CAPTIONS) as partial:
    partial.write_text(''.join(lines))


def run(command: str, arguments: str) -> None:
  """`hiar-jax COMMAND` on a config of this file."""
  config = f'--config={pathlib.Path(__file__).resolve()}:{arguments}'
  subprocess.run(
    [sys.executable, '-m', 'hiar_jax', *command.split(), config],
    cwd=_ROOT,
    check=True,
  )


def losses(workdir: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  """Iterations and the mean loss of those since the one before."""
  lines = map(json.loads, (workdir / 'metrics.jsonl').open())
  rows = [(line['step'], line['loss']) for line in lines if 'loss' in line]
  return tuple(np.array(rows).T)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--out', required=True, type=pathlib.Path)
  parser.add_argument('--plot', type=pathlib.Path)
  parser.add_argument('--num', type=int, default=NUM)
  parser.add_argument('--iterations', type=int, default=400)
  parser.add_argument('--seeds', type=int, default=3)
  options = parser.parse_args()
  root, seeds = options.out.resolve(), range(options.seeds)

  def arguments(way, seed):
    return f'{way},{seed},{root},{options.num},{options.iterations}'

  write_videos(get_config(arguments('source', 0)), root)
  for way in WAYS[1:]:
    run('encode videos', arguments(way, 0))
    run('encode prompts', arguments(way, 0))
  curves = {}
  for way in WAYS:
    for seed in seeds:
      run('train', arguments(way, seed))
      steps, curve = losses(root / f'{way}_{seed}')
      curves.setdefault(way, []).append(curve)
  report(steps, {way: np.array(found) for way, found in curves.items()})
  for way in WAYS:
    config = get_config(arguments(way, 0))
    print(f'{way:8} variance of the latents {variance(config):.4f}')
  if options.plot:
    plot(options.plot, steps, curves)


def variance(config) -> float:
  """Of all latents that the teacher is trained on."""
  if 'latents' in config:
    source = inputs.open_latents(config)
    return float(np.var([source[i] for i in range(len(source))]))
  videos, codec = inputs.open_bare_videos(config), inputs.open_codec(config)
  frames = np.stack([videos[i] for i in range(len(videos))])
  return float(np.var(codec.encode(pixels.to_float(frames))))


def report(steps, curves) -> None:
  """Last quarter of the curves: what differs by the way and by the seed."""
  last = steps > steps[-1] * 3 / 4
  means = {way: found[:, last].mean(1) for way, found in curves.items()}
  for way, found in means.items():
    print(f'{way:8}', *(f'{loss:.4f}' for loss in found))
  for way in WAYS[1:]:
    same_seed = np.abs(means[way] - means['source']).max()
    print(f'{way:8} largest difference from source, same seed {same_seed:.4f}')
  among_seeds = np.ptp(means['source'])
  print(f'source   largest difference among its seeds       {among_seeds:.4f}')


def plot(path, steps, curves) -> None:
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(5, 3), dpi=90)
  for way, style in _STYLES.items():
    for seed, curve in enumerate(curves[way]):
      label = f'{way}, {len(curves[way])} seeds' if seed == 0 else None
      axes.plot(steps, curve, style, linewidth=0.9, markersize=3, label=label)
  axes.set_xlabel('iteration')
  axes.set_ylabel("teacher's loss")
  axes.set_yscale('log')
  axes.legend(frameon=False)
  figure.tight_layout()
  figure.savefig(path)


if __name__ == '__main__':
  main()
