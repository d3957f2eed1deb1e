"""Scores the teacher's own videos against held-out prompts.

  hiar-jax evaluate teacher --config=bouncing

Videos of the training's length, sampled like the trajectories. What the teacher
gets wrong, no student learns from it. The columns are those of `hiar-jax
evaluate`.
"""

import numpy as np
from absl import flags

from hiar_jax.evaluation import measures
from hiar_jax.runtime import config_flag, errors
from hiar_jax.sampling import loading, seeds
from hiar_jax.sampling import teacher as sampling_teacher
from hiar_jax.training import phase_parts
from hiar_jax.weights import teacher_files

_CONFIG = config_flag.define(required=True)
_NUM_PROMPTS = flags.DEFINE_integer(
  'num_prompts', 24, 'held-out ones', lower_bound=1
)
_WEIGHTS = flags.DEFINE_string(
  'weights', None, "a .safetensors file; default: the config's teacher"
)
_SEED = flags.DEFINE_integer('seed', 0, 'names the noise', lower_bound=0)
# Of videos sampled together.
_BATCH = 8


def main(argv):
  del argv
  config = _CONFIG.value
  if 'trajectories' not in config:
    raise ValueError(f'the {config.phase} config has no trajectories')
  measured = measures.open_scores(config)
  reads = {*loading.READS} - {'generate', 'rollout', 'schedule'}
  config_flag.refuse_overrides_but(
    *(*reads, 'measures', 'teacher_weights', 'codec.path', *measured.reads),
    *(f'trajectories.{key}' for key in ('num_steps', 'shift', 'guidance')),
  )
  given = config_flag.overrides()
  weights, codec = teacher_files.find(
    config,
    _WEIGHTS.value or given.get('teacher_weights'),
    given.get('codec.path'),
  )
  pipeline = loading.from_config(config.to_dict(), weights=weights, codec=codec)
  settings = config.trajectories
  solver = sampling_teacher.SamplingConfig(
    solver='euler',
    num_steps=settings.num_steps,
    shift=settings.shift,
    guidance=settings.guidance,
  )
  prompts = measured.prompts(_NUM_PROMPTS.value)
  true = measured.true_videos(len(prompts), None)
  rows = {
    'codec': pipeline.decode(
      np.concatenate([pipeline.encode(video) for video in true])
    ),
    'teacher': [],
  }
  for start in range(0, len(prompts), _BATCH):
    batch = prompts[start : start + _BATCH]
    numbers = np.arange(start, start + len(batch))
    latents = sampling_teacher.sample(
      pipeline.denoiser,
      pipeline.params,
      solver,
      seeds.sample_keys(np.uint32(_SEED.value), numbers, 0 * numbers),
      pipeline.encoder.encode(batch),
      pipeline.encoder.encode(['']),
      num_frames=phase_parts.latent_frames(config),
    )
    rows['teacher'].extend(pipeline.decode(latents))
  scores = {
    name: measured.score(videos, prompts) for name, videos in rows.items()
  }
  print(
    f'{len(prompts)} held-out captions, {true.shape[1]} frames, '
    f'seed {_SEED.value}'
  )
  print(measured.table(scores))


if __name__ == '__main__':
  errors.run_main(main)
