"""Videos of held-out scenes, from their prompts or from true first frames.

Unlike a call of a pipeline, each video may have given frames of its own.
"""

# V videos, F frames, H W height and width

from collections.abc import Iterator, Sequence

import numpy as np

from hiar_jax.sampling import calls, seeds
from hiar_jax.sampling.video_pipeline import MAX_BATCH, VideoPipeline


def videos(
  pipeline: VideoPipeline,
  prompts: Sequence[str],
  *,
  num_blocks: int,
  seed: int,
  given_VFHWC: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
  """Makes a video of each prompt: uint8 [F, H, W, 3], one after the other.

  Args:
    pipeline: that makes them, in its own order and context.
    prompts: V.
    num_blocks: of a video, given frames included.
    seed: names the noise.
    given_VFHWC: frames that each begins with, whole blocks; None: none.

  Raises:
    ValueError: if the given frames are no whole blocks, or leave none to make.
  """
  size = pipeline.rollout.frames_per_block
  initial = None
  if given_VFHWC is not None:
    initial = np.concatenate([pipeline.encode(v) for v in given_VFHWC])
    if initial.shape[1] % size or initial.shape[1] >= num_blocks * size:
      raise ValueError(
        f'{initial.shape[1]} given latent frames are not whole blocks of '
        f'{size}, fewer than {num_blocks}'
      )
    num_blocks -= initial.shape[1] // size
  request = calls.Request(
    num_blocks=num_blocks, seed=seed, order=pipeline.order
  )
  states = pipeline.encoder.encode(prompts)
  seeds_V = seeds.of_videos(seed, len(prompts))
  for start in range(0, len(prompts), MAX_BATCH):
    # One program for all: a short batch repeats its last video.
    rows = np.arange(start, start + MAX_BATCH).clip(max=len(prompts) - 1)
    latents = calls.sample(
      *(pipeline.denoiser, pipeline.params, pipeline.rollout, request),
      seeds.keys([seeds_V[i] for i in rows]),
      states[rows],
      None if initial is None else initial[rows],
      lambda passes: None,
    )
    yield from pipeline.decode(latents)[: len(prompts) - start]
