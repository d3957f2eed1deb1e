"""Scores videos of the small world against their prompts.

  hiar-jax evaluate --config=bouncing --num_prompts 24

Held-out captions, each order or context in a row of its own; `ideal dB` is the
PSNR against the prompt's own object drawn where the video has it, and has the
codec's own loss as its ceiling ("codec": true videos, encoded and decoded).

The weights are those that come with the package, and --config.key=value changes
how they are run; or those of a folder, which has its own config: of --config
only the world is taken then.
"""

import json
import pathlib

import numpy as np
from absl import flags

from hiar_jax.data import bouncing
from hiar_jax.evaluation import bouncing as evaluation_bouncing
from hiar_jax.runtime import config_flag, errors
from hiar_jax.sampling import loading, video_pipeline
from hiar_jax.weights import student_files

_CONFIG = config_flag.define(required=True)
_NUM_PROMPTS = flags.DEFINE_integer(
  'num_prompts', 24, 'captions', lower_bound=1
)
_NUM_BLOCKS = flags.DEFINE_integer('num_blocks', 28, 'length', lower_bound=1)
_SEED = flags.DEFINE_integer('seed', 0, 'names the noise', lower_bound=0)
_FOLDER = flags.DEFINE_string(
  'pipeline', None, 'a folder written by `hiar-jax export`'
)
_WAYS = flags.DEFINE_list(
  'ways',
  ['step_first', 'step_first:shared', 'block_first'],
  'rows of the table: an order, or an order and a context with a colon',
)
_OUT = flags.DEFINE_string('out', None, 'also writes the numbers as JSON')


def main(argv):
  del argv
  config = _CONFIG.value
  pipeline = _load(config)
  world = bouncing.WorldConfig(**config.world)
  latents = _NUM_BLOCKS.value * pipeline.rollout.frames_per_block
  frames = 1 + (latents - 1) * pipeline.codec.temporal_stride
  long = bouncing.WorldConfig(
    **(config.world.to_dict() | {'num_frames': frames})
  )
  chosen = evaluation_bouncing.held_out_scenes(long, _NUM_PROMPTS.value)
  prompts = [scene.caption for scene in chosen]
  rows = {}
  true = np.stack([bouncing.render(scene, long) for scene in chosen])
  coded = pipeline.decode(
    np.concatenate([pipeline.encode(video) for video in true])
  )
  rows['codec'] = evaluation_bouncing.evaluate_prompts(coded, prompts, world)
  for way in _WAYS.value:
    order, _, context = way.partition(':')
    videos = pipeline(
      prompts,
      num_blocks=_NUM_BLOCKS.value,
      seed=_SEED.value,
      order=order,
      context=context or None,
    )
    rows[way] = evaluation_bouncing.evaluate_prompts(
      [video.frames for video in videos], prompts, world
    )
  print(
    f'{len(prompts)} held-out captions, {frames} frames, seed {_SEED.value}'
  )
  print(evaluation_bouncing.format_table(rows))
  if _OUT.value:
    pathlib.Path(_OUT.value).write_text(json.dumps(rows, indent=2) + '\n')


def _load(config) -> video_pipeline.VideoPipeline:
  if _FOLDER.value is not None:
    config_flag.refuse_overrides_but('world')
    return loading.load(_FOLDER.value)
  # Order and context are those of --ways.
  reads = {*loading.READS, 'codec.path', 'world'} - {'generate'}
  config_flag.refuse_overrides_but(*reads)
  weights, codec = student_files.find(
    config, codec=config_flag.overrides().get('codec.path')
  )
  return loading.from_config(config.to_dict(), weights=weights, codec=codec)


if __name__ == '__main__':
  errors.run_main(main)
