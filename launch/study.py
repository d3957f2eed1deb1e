"""Trains the arms of a study, measures their videos, writes what came out.

  hiar-jax study --config=study

One command from nothing to the report: what the arms start from is made if it
is not there; then every arm is trained with every seed, in the order of the
config, and its videos of every length are measured. report.html, report.json,
tables.md and curves.svg in the folder of the study are of whatever is complete,
and the report says what is missing. Kill it and start it again: it goes on.

The arms are in the config; so is what they are trained on: the study itself
knows no world, see `open_identities` in evaluation/measures.py.
"""

import json
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags
from PIL import Image

from hiar_jax.evaluation import (
  measures,
  statistics,
  study,
  study_page,
)
from hiar_jax.runtime import config_flag, errors, files
from hiar_jax.sampling import (
  choices,
  held_out,
  loading,
  seeds,
  video_pipeline,
)
from hiar_jax.sampling import teacher as sampling_teacher
from hiar_jax.training import inputs
from hiar_jax.training import loop as training_loop
from hiar_jax.training.network_files import WEIGHTS

_CONFIG = config_flag.define(required=True)
_ARMS = flags.DEFINE_list('arms', [], 'of these alone; default: all')
_SEEDS = flags.DEFINE_list('seeds', [], 'of these alone; default: all')
_REPORT = flags.DEFINE_bool('report', False, 'of what there is; train nothing')

_LOSSES = ('reverse_kl', 'forward_kl', 'critic', 'dmd_gradient')
# Of the pictures in the report.
_PICTURE_SCENES, _PICTURE_FRAMES = 3, 10


def main(argv):
  del argv
  config = _CONFIG.value
  jobs = list(_jobs(config))
  if not _REPORT.value:
    for command, product in config.before:
      if not product or not pathlib.Path(product).exists():
        _run(command)
    for arm, seed in jobs:
      weights = _weights(config, arm, seed)
      missing = {
        kind: path
        for kind in _kinds(config).values()
        if _suits(config, arm, kind)
        and not (
          path := _measured(config) / f'{arm}-{seed}-{kind}.json'
        ).exists()
      }
      for kind, path in missing.items():
        _measure(config, arm, seed, kind, weights, path)
      if missing:
        _report(config, jobs)
        # Each arm has programs of its own.
        jax.clear_caches()
  _report(config, jobs)
  print((pathlib.Path(config.dir) / 'tables.md').read_text())


# --- What there is to do.


def _jobs(config: ml_collections.ConfigDict) -> Iterator[tuple[str, int]]:
  """Arms and seeds, the first seed of all arms before the second of any."""
  unknown = {*config.order, *_ARMS.value} - {*config.arms}
  if unknown:
    raise ValueError(f'{sorted(unknown)} are not arms: {sorted(config.arms)}')
  wanted = set(map(int, _SEEDS.value)) or {*config.seeds}
  for count, seed in enumerate(config.seeds):
    for arm in config.order:
      has = config.arms[arm].get('seeds', len(config.seeds)) > count
      if has and seed in wanted and arm in (_ARMS.value or config.order):
        yield arm, seed


def _kinds(config: ml_collections.ConfigDict) -> dict[str, study.Kind]:
  """Kinds of videos by what the report calls them."""
  once = config.lengths[0]
  kinds = {
    f'{blocks / once:g} x the training length': study.Kind(blocks, 0)
    for blocks in config.lengths
  }
  for given, blocks in config.given:
    name = f'{blocks / once:g} x, gone on from {given} true block'
    kinds[name] = study.Kind(blocks, given)
  return kinds


def _suits(config, arm: str, kind: study.Kind) -> bool:
  """The teacher makes videos of the training's length, and from nothing."""
  if config.arms[arm].get('run') != 'teacher':
    return True
  return kind == study.Kind(config.lengths[0], 0)


def _run(command: str) -> None:
  """`hiar-jax COMMAND` in a process of its own, which SIGTERM reaches."""
  print(f'hiar-jax {command}', flush=True)
  process = subprocess.Popen(
    [sys.executable, '-m', 'hiar_jax', *shlex.split(command)]
  )
  before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
  try:
    status = process.wait()
  finally:
    signal.signal(signal.SIGTERM, before)
  if status in (143, -signal.SIGTERM):
    sys.exit(143)
  if status:
    raise ValueError(f'`hiar-jax {command}` ended with status {status}')


# --- Training.


def _weights(config, arm: str, seed: int) -> pathlib.Path | None:
  """Of an arm, which is trained if need be; None for that without a network."""
  own = config.arms[arm]
  if 'train' in own:
    train = arm_config(config, arm, seed)
    path = pathlib.Path(train.workdir) / WEIGHTS
    if not path.exists():
      print(f'arm {arm} seed {seed}: {own.says}', flush=True)
      training_loop.train(train)
    return path
  if own.get('run') == 'codec':
    return None
  if other := own.get('weights'):
    return _weights(config, other, seed)
  teacher = own.run == 'teacher'
  return pathlib.Path(
    config.train.teacher_weights if teacher else config.train.student_weights
  )


def arm_config(
  config: ml_collections.ConfigDict, arm: str, seed: int
) -> ml_collections.ConfigDict:
  """The training config of an arm.

  Raises:
    KeyError, TypeError: naming a change of a value that there is not.
  """
  train = config.train.copy_and_resolve_references()
  train.lock()
  for change in config.arms[arm].train:
    train.update(_plain(change))
  train.seed = seed
  train.workdir = str(pathlib.Path(config.dir) / f'{arm}-{seed}')
  return train


def _plain(section: Any) -> Any:
  return section.to_dict() if hasattr(section, 'to_dict') else section


# --- Measuring.


def _measure(config, arm, seed, kind, weights, path) -> None:
  start = time.monotonic()
  known = measures.open_identities(config.train)
  prompts = known.prompts(config.scenes)
  pipeline = _pipeline(config, arm, weights)
  parts = config.parts * (1 if kind.blocks == config.lengths[0] else 3)
  frames = kind.blocks * pipeline.rollout.frames_per_block
  stride = pipeline.codec.temporal_stride
  given = kind.given * pipeline.rollout.frames_per_block
  given = 1 + (given - 1) * stride if given else 0
  count = 1 + (frames - 1) * stride
  rows, shown = [], []
  label = f'{arm} seed {seed}, {kind.blocks} blocks, {kind.given} given'
  print(f'{label}: {len(prompts)} videos', flush=True)
  made = _videos(config, arm, known, prompts, pipeline, kind, count, given)
  for number, video in enumerate(made):
    numbers, curves = known.identity(video, number, parts=parts, given=given)
    summary = statistics.summarise(statistics.measure(video))
    rows.append(
      {
        'number': number,
        'identity': numbers,
        'statistics': {
          name: value
          for name, value in vars(summary).items()
          if isinstance(value, float)
        },
        'curves': curves,
      }
    )
    if number < _PICTURE_SCENES:
      shown.append(video)
  picture = path.parent / 'frames' / f'{path.stem}.png'
  picture.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(_sheet(shown)).save(picture)
  study.write(
    path,
    arm=arm,
    seed=seed,
    kind=kind,
    videos=rows,
    seconds=round(time.monotonic() - start, 1),
  )


def _pipeline(config, arm, weights) -> video_pipeline.VideoPipeline:
  own = config.arms[arm]
  train = config.train
  if 'train' in own:
    train = arm_config(config, arm, 0)
  elif other := own.get('weights'):
    train = arm_config(config, other, 0)
  pipeline = loading.from_config(
    train.to_dict(),
    # The codec's row needs a network of no matter which weights.
    weights=weights or config.train.student_weights,
    codec=train.codec.path,
  )
  order, _, context = own.get('run', '').partition(':')
  if order in ('', 'codec', 'teacher'):
    return pipeline
  return choices.apply(pipeline, order=order, context=context or None)


def _videos(config, arm, known, prompts, pipeline, kind, count, given):
  """The arm's videos, one after the other."""
  run = config.arms[arm].get('run')
  true = None
  if run == 'codec' or given:
    true = known.true_videos(len(prompts), count)
  if run == 'codec':
    for video in true:
      yield pipeline.decode(pipeline.encode(video))[0]
  elif run == 'teacher':
    yield from _teacher_videos(config, pipeline, prompts, kind)
  else:
    yield from held_out.videos(
      pipeline,
      prompts,
      num_blocks=kind.blocks,
      seed=config.seed,
      given_VFHWC=true[:, :given] if given else None,
    )


def _teacher_videos(config, pipeline, prompts, kind):
  settings = config.train.trajectories
  solver = sampling_teacher.SamplingConfig(
    solver='euler',
    num_steps=settings.num_steps,
    shift=settings.shift,
    guidance=settings.guidance,
  )
  states = pipeline.encoder.encode(prompts)
  negative = inputs.negative_states(config.train, pipeline.encoder)
  for start in range(0, len(prompts), video_pipeline.MAX_BATCH):
    rows = np.arange(start, min(start + video_pipeline.MAX_BATCH, len(prompts)))
    latents = sampling_teacher.sample(
      *(pipeline.denoiser, pipeline.params, solver),
      seeds.sample_keys(np.uint32(config.seed), rows, 0 * rows),
      states[rows],
      negative,
      num_frames=kind.blocks * pipeline.rollout.frames_per_block,
    )
    yield from pipeline.decode(np.asarray(latents))


def _sheet(videos):
  """Some frames of each video, a row each, first and last included."""
  rows = []
  for video in videos:
    index = np.linspace(0, len(video) - 1, _PICTURE_FRAMES).round().astype(int)
    rows.append(np.concatenate([*video[index]], 1))
  return np.concatenate(rows).repeat(2, 0).repeat(2, 1)


# --- The report.


def _measured(config) -> pathlib.Path:
  return pathlib.Path(config.dir) / 'measured'


def _report(config, jobs) -> None:
  folder = pathlib.Path(config.dir)
  folder.mkdir(parents=True, exist_ok=True)
  measured = study.Measured(_measured(config))
  kinds = _kinds(config)
  columns = [study.Column(*column) for column in config.columns]
  missing = study.missing(
    measured,
    [
      (arm, seed, kind)
      for arm, seed in jobs
      for kind in kinds.values()
      if _suits(config, arm, kind)
    ],
  )
  arms = list(config.order)
  tables = ['# The study, in numbers', '']
  if missing:
    tables += [f'Not there yet: {", ".join(missing)}.', '']
  for name, kind in kinds.items():
    tables += [
      f'## {name}',
      '',
      study.table(measured, arms, kind, columns, config.against),
      '',
    ]
  curves = dict(config.curves)
  whole = study.as_json(
    measured, arms, [*kinds.values()], columns, [*curves], config.against
  )
  whole |= {'missing': missing, 'paper': _plain_items(config.paper)}
  with files.whole_file(folder / 'tables.md') as partial:
    partial.write_text('\n'.join(tables))
  with files.whole_file(folder / 'report.json') as partial:
    partial.write_text(json.dumps(whole, allow_nan=False))
  with files.whole_file(folder / 'report.html') as partial:
    study_page.write(
      partial,
      title='The study',
      measured=measured,
      says={arm: config.arms[arm].says for arm in arms},
      kinds=kinds,
      columns=columns,
      curves=curves,
      groups=config.charts,
      against=config.against,
      paper=_plain_items(config.paper),
      losses=_losses(config, arms),
      pictures=_pictures(config, arms, kinds),
      missing=missing,
    )
  shown = config.picture
  drawn = study_page.picture(
    *(measured, study.Kind(*shown.kind), shown.arms),
    {name: curves[name] for name in shown.curves},
    {arm: f'{arm}: {config.arms[arm].says}' for arm in shown.arms},
  )
  if drawn:
    with files.whole_file(folder / 'curves.svg') as partial:
      partial.write_text(drawn)


def _plain_items(pairs) -> dict[str, Mapping[str, float]]:
  return {name: _plain(numbers) for name, numbers in pairs}


def _losses(config, arms):
  found = {}
  for arm in arms:
    path = pathlib.Path(config.dir) / f'{arm}-{config.seeds[0]}/metrics.jsonl'
    if path.exists():
      found[arm] = study_page.losses_of(path, _LOSSES)
  return found


def _pictures(config, arms, kinds):
  longest = max(kinds.items(), key=lambda item: item[1].blocks)
  found = {}
  for arm in arms:
    path = (
      _measured(config) / 'frames' / f'{arm}-{config.seeds[0]}-{longest[1]}.png'
    )
    if path.exists():
      found[f'{arm}, {longest[0]}'] = path
  return found


if __name__ == '__main__':
  errors.run_main(main)
