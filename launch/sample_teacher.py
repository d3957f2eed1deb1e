"""Samples videos from the bidirectional teacher, with a contact sheet each.

  hiar-jax teacher --config=bouncing \
    --prompt "a large red disc drifting fast over dark blue" \
    --solver unipc --steps 24 --guidance 2 --out teacher.mp4

The whole video is denoised at once: this is what the student was distilled
from, many steps and twice the work for guidance. Several videos of the prompt
are sampled together and written as teacher-0.mp4, teacher-1.mp4, ...

The weights are those that training left at the config's teacher_weights, or
else those that come with the package. Wan2.1 itself is sampled as published by

  hiar-jax teacher --pipeline=Wan-AI/Wan2.1-T2V-1.3B \
    --guidance 6 --shift 8 --prompt "..." --out wan.mp4

where --pipeline is anything that `hiar_jax.load` takes.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
from absl import flags

from hiar_jax.runtime import config_flag, errors, metrics, video_io
from hiar_jax.sampling import (
  loading,
  seeds,
  solvers,
  streaming,
  video,
  video_pipeline,
)
from hiar_jax.sampling import teacher as sampling_teacher
from hiar_jax.training import phase_parts
from hiar_jax.weights import families, teacher_files

_CONFIG = config_flag.define()
_PIPELINE = flags.DEFINE_string(
  'pipeline', None, 'instead of --config: a name, folder or hub name to load'
)
_BASE = flags.DEFINE_string(
  'base', None, 'with --pipeline: weights that have the parts which it lacks'
)
_FAMILY = flags.DEFINE_enum(
  'family',
  None,
  list(families.FAMILIES),
  'with --pipeline: what the weights were trained for, where no name tells',
)
_PROMPT = flags.DEFINE_string('prompt', None, 'what the video shows')
flags.mark_flag_as_required('prompt')
_NEGATIVE_PROMPT = flags.DEFINE_string(
  'negative_prompt',
  None,
  'what guidance leads away from; default: that of Wan2.1 for its text '
  'encoder, else no condition',
)
_SOLVER = flags.DEFINE_enum(
  'solver', 'unipc', list(solvers.SOLVERS), 'of the ODE'
)
_STEPS = flags.DEFINE_integer(
  'steps', None, "of the solver; default: the config's trajectories', or 50"
)
_GUIDANCE = flags.DEFINE_float(
  'guidance', None, "1 is none; default: the config's trajectories', or 5"
)
_SHIFT = flags.DEFINE_float(
  'shift', None, "of the levels; default: the config's trajectories', or 5"
)
_NUM_FRAMES = flags.DEFINE_integer(
  'num_frames', None, 'latent frames; default: those of training, or 21'
)
_NUM_VIDEOS = flags.DEFINE_integer(
  'num_videos', 1, 'sampled together', lower_bound=1
)
_SEED = flags.DEFINE_integer('seed', 0, 'names the noise', lower_bound=0)
_WEIGHTS = flags.DEFINE_string('weights', None, 'a .safetensors file')
_OUT = flags.DEFINE_string('out', 'teacher.mp4', 'the file to write')
_FPS = flags.DEFINE_float('fps', None, "frames a second; default: the config's")
_SCALE = flags.DEFINE_integer(
  'scale', None, 'factor of enlargement; default: up to 512 px', lower_bound=1
)


def main(argv: Sequence[str]) -> None:
  del argv
  config = _CONFIG.value
  if (config is None) == (_PIPELINE.value is None):
    raise ValueError('give either --config or --pipeline')
  if config is None and _WEIGHTS.value:
    raise ValueError('--weights goes with --config')
  streaming.check_prompts([_PROMPT.value])
  defaults, num_frames = sampling_teacher.SamplingConfig(), 21
  if config is not None:
    defaults, num_frames = _defaults(config), phase_parts.latent_frames(config)
  solver = sampling_teacher.SamplingConfig(
    solver=_SOLVER.value,
    num_steps=_given(_STEPS, defaults.num_steps),
    shift=_given(_SHIFT, defaults.shift),
    guidance=_given(_GUIDANCE, defaults.guidance),
  )
  num_frames = _given(_NUM_FRAMES, num_frames)
  if num_frames < 1:
    raise ValueError(f'num_frames={num_frames} is not at least 1')
  paths = _paths(_NUM_VIDEOS.value, _given(_FPS, 1.0))
  pipeline = _load(config)
  negative = _NEGATIVE_PROMPT.value
  if negative is None:
    negative = pipeline.encoder.negative_prompt
  numbers = np.arange(len(paths))
  done = 0
  with metrics.Progress(
    solver.num_steps, label='sampling', unit='step'
  ) as progress:

    def report(steps: int) -> None:
      nonlocal done
      done += steps
      progress.update(done)

    latents = sampling_teacher.sample(
      pipeline.denoiser,
      pipeline.params,
      solver,
      seeds.sample_keys(np.uint32(_SEED.value), 0 * numbers, numbers),
      pipeline.encoder.encode([_PROMPT.value]).repeat(len(paths), 0),
      pipeline.encoder.encode([negative]),
      num_frames=num_frames,
      report=report,
    )
  fps = _given(_FPS, pipeline.fps)
  for path, frames in zip(paths, pipeline.decode(latents)):
    made = video.Video(frames, fps, _PROMPT.value)
    made.save(path, scale=_SCALE.value)
    made.contact_sheet(path.with_suffix('.png'))
    print(f'wrote {path} and {path.with_suffix(".png").name}')


_SAMPLER_KEYS = ('num_steps', 'shift', 'guidance', 'num_frames')


def _defaults(config) -> sampling_teacher.SamplingConfig:
  """How the config's trajectories are sampled, solver apart."""
  reads = {*loading.READS} - {'generate', 'rollout', 'schedule'}
  config_flag.refuse_overrides_but(
    *(
      *reads,
      'generate.fps',
      'teacher_weights',
      'codec.path',
    ),
    *(f'trajectories.{key}' for key in _SAMPLER_KEYS),
  )
  for section in ('trajectories', 'generate'):
    if section not in config:
      raise ValueError(
        f'the {config.phase} config has no {section}; leave the phase away'
      )
  return sampling_teacher.SamplingConfig(
    num_steps=config.trajectories.num_steps,
    shift=config.trajectories.shift,
    guidance=config.trajectories.guidance,
  )


def _load(config) -> video_pipeline.VideoPipeline:
  if config is None:
    return loading.load(_PIPELINE.value, base=_BASE.value, family=_FAMILY.value)
  for flag in (_BASE, _FAMILY):
    if flag.value is not None:
      raise ValueError(f'--{flag.name} goes with --pipeline')
  given = config_flag.overrides()
  weights, codec = teacher_files.find(
    config,
    _WEIGHTS.value or given.get('teacher_weights'),
    given.get('codec.path'),
  )
  # The teacher has the student's sizes, text and codec.
  return loading.from_config(config.to_dict(), weights=weights, codec=codec)


def _given(flag, default):
  return default if flag.value is None else flag.value


def _paths(count: int, fps: float) -> list[pathlib.Path]:
  """Where the videos go, once it is sure that they can go there."""
  out = pathlib.Path(_OUT.value)
  paths = [out]
  if count > 1:
    paths = [out.with_stem(f'{out.stem}-{i}') for i in range(count)]
  for path in paths:
    # Starts nothing before the first frame, but checks what it is given.
    video_io.VideoWriter(path, fps=fps, scale=_SCALE.value or 1)
    video_io.check_writable(path.with_suffix('.png'))
  return paths


if __name__ == '__main__':
  errors.run_main(main)
