"""Scores a pipeline's videos against held-out prompts.

  hiar-jax evaluate --config=bouncing --num_prompts 24

Each order or context has a row of its own; the row "codec" is that of true
videos, encoded and decoded, a ceiling for the others. What the columns are says
the module of hiar_jax/evaluation that `measures` names; it must know prompts
with their videos, see `open_scores` there.

The weights are those that come with the package, and --config.key=value changes
how they are run; or those of a folder, which has its own config: of --config
only what the measures read is taken then.
"""

import json
import pathlib
from collections.abc import Sequence

import numpy as np
from absl import flags

from hiar_jax.evaluation import measures
from hiar_jax.runtime import config_flag, errors
from hiar_jax.sampling import choice_flags, loading, video_pipeline
from hiar_jax.weights import student_files

_CONFIG = config_flag.define(required=True)
_NUM_PROMPTS = flags.DEFINE_integer(
  'num_prompts', 24, 'held-out ones', lower_bound=1
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
_HELD = choice_flags.HeldFlags()
_OUT = flags.DEFINE_string('out', None, 'also writes the numbers as JSON')


def main(argv):
  del argv
  config = _CONFIG.value
  scores = measures.open_scores(config)
  pipeline = _load(config, scores.reads)
  latents = _NUM_BLOCKS.value * pipeline.rollout.frames_per_block
  frames = 1 + (latents - 1) * pipeline.codec.temporal_stride
  prompts = scores.prompts(_NUM_PROMPTS.value)
  true = scores.true_videos(len(prompts), frames)
  coded = pipeline.decode(
    np.concatenate([pipeline.encode(video) for video in true])
  )
  rows = {'codec': scores.score(coded, prompts)}
  for way in _WAYS.value:
    order, _, context = way.partition(':')
    videos = pipeline(
      prompts,
      num_blocks=_NUM_BLOCKS.value,
      seed=_SEED.value,
      order=order,
      context=context or None,
      **_HELD.past,
    )
    rows[way] = scores.score([video.frames for video in videos], prompts)
  print(
    f'{len(prompts)} held-out captions, {frames} frames, seed {_SEED.value}'
  )
  print(scores.table(rows))
  if _OUT.value:
    pathlib.Path(_OUT.value).write_text(json.dumps(rows, indent=2) + '\n')


def _load(config, reads: Sequence[str]) -> video_pipeline.VideoPipeline:
  if _FOLDER.value is not None:
    config_flag.refuse_overrides_but('measures', *reads)
    return loading.load(_FOLDER.value, **_HELD.weights)
  # Order and context are those of --ways.
  own = {*loading.READS, 'codec.path', 'measures'} - {'generate'}
  config_flag.refuse_overrides_but(*own, *reads)
  weights, codec = student_files.find(
    config, codec=config_flag.overrides().get('codec.path')
  )
  return loading.from_config(
    config.to_dict(), weights=weights, codec=codec, **_HELD.weights
  )


if __name__ == '__main__':
  errors.run_main(main)
