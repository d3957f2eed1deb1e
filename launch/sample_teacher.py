"""Samples videos from the bidirectional teacher, with a contact sheet each.

  python launch/sample_teacher.py --config=configs/bouncing.py \
    --prompt "a large red disc drifting fast over dark blue" \
    --solver unipc --steps 24 --guidance 2 --out teacher.mp4

The whole video is denoised at once: this is what the student was distilled
from, many steps and twice the work for guidance. Several videos of the prompt
are sampled together and written as teacher-0.mp4, teacher-1.mp4, ...

The weights are those that training left at the config's teacher_weights, or
else those that come with the package.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
from absl import flags, logging
from ml_collections import config_flags

from hiar_jax import (
  errors,
  generate,
  metrics,
  sampling,
  solvers,
  teacher_sampling,
  video,
  video_io,
)

_CONFIG = config_flags.DEFINE_config_file('config', lock_config=True)
flags.mark_flag_as_required('config')
_PROMPT = flags.DEFINE_string('prompt', None, 'what the video shows')
flags.mark_flag_as_required('prompt')
_NEGATIVE_PROMPT = flags.DEFINE_string(
  'negative_prompt',
  None,
  "what guidance leads away from; default: the config's, or no condition",
)
_SOLVER = flags.DEFINE_enum(
  'solver', 'unipc', list(solvers.SOLVERS), 'of the ODE'
)
_STEPS = flags.DEFINE_integer(
  'steps', None, "of the solver; default: the config's trajectories'"
)
_GUIDANCE = flags.DEFINE_float(
  'guidance', None, "1 is none; default: the config's trajectories'"
)
_SHIFT = flags.DEFINE_float(
  'shift', None, "of the levels; default: the config's trajectories'"
)
_NUM_FRAMES = flags.DEFINE_integer(
  'num_frames', None, 'latent frames; default: those of training'
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

_ASSET = 'teacher.safetensors'


def main(argv: Sequence[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  config = _CONFIG.value
  for section in ('trajectories', 'generate'):
    if section not in config:
      raise ValueError(
        f'the {config.phase} config has no {section}; leave the phase away'
      )
  generate.check_prompts([_PROMPT.value])
  settings = config.trajectories
  solver = teacher_sampling.SamplingConfig(
    solver=_SOLVER.value,
    num_steps=_given(_STEPS, settings.num_steps),
    shift=_given(_SHIFT, settings.shift),
    guidance=_given(_GUIDANCE, settings.guidance),
  )
  num_frames = _given(_NUM_FRAMES, config.world.num_frames)
  if num_frames < 1:
    raise ValueError(f'num_frames={num_frames} is not at least 1')
  fps = _given(_FPS, config.generate.fps)
  paths = _paths(_NUM_VIDEOS.value, fps)
  weights, codec = _weights(config)
  # The teacher has the student's sizes, text and codec.
  pipeline = generate.from_config(
    config.to_dict(), weights=weights, codec=codec
  )
  negative = _given(_NEGATIVE_PROMPT, config.get('negative_prompt', ''))
  numbers = np.arange(len(paths))
  done = 0
  with metrics.Progress(
    solver.num_steps, label='sampling', unit='step'
  ) as progress:

    def report(steps: int) -> None:
      nonlocal done
      done += steps
      progress.update(done)

    latents = teacher_sampling.sample(
      pipeline.denoiser,
      pipeline.params,
      solver,
      sampling.sample_keys(np.uint32(_SEED.value), 0 * numbers, numbers),
      pipeline.encoder.encode([_PROMPT.value]).repeat(len(paths), 0),
      pipeline.encoder.encode([negative]),
      num_frames=num_frames,
      report=report,
    )
  for path, frames in zip(paths, pipeline.decode(latents)):
    made = video.Video(frames, fps, _PROMPT.value)
    made.save(path, scale=_SCALE.value)
    made.contact_sheet(path.with_suffix('.png'))
    print(f'wrote {path} and {path.with_suffix(".png").name}')


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


def _weights(config) -> tuple[pathlib.Path, pathlib.Path]:
  """The files of the weights and of the codec."""
  trained = pathlib.Path(_WEIGHTS.value or config.teacher_weights)
  if _WEIGHTS.value or trained.exists():
    return trained, pathlib.Path(config.codec.path)
  folder = generate.ASSETS / config.name
  if not (folder / _ASSET).exists():
    raise FileNotFoundError(
      f'no teacher at {trained}, and none of {config.name!r} comes with the '
      'package; give --weights'
    )
  return folder / _ASSET, folder / generate.CODEC_FILE


if __name__ == '__main__':
  errors.run_main(main)
