"""Videos of the averaged student while it trains, and what they measure.

The same noise and prompts every time and in both orders, so that the files of
a folder differ by the training alone.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from hiar_jax.denoiser import Denoiser
from hiar_jax.evaluation import measures
from hiar_jax.models.config import WanConfig
from hiar_jax.runtime import contact_sheets
from hiar_jax.sampling import calls, streaming, video, video_pipeline
from hiar_jax.training import inputs, phase_parts
from hiar_jax.training.loop_config import LoopConfig

ORDERS = ('step_first', 'block_first')
_NUM_PROMPTS = 4
_MAX_WIDTH = 2048  # px, of the prompts side by side.


class Sampler:
  """Samples a phase's student into `workdir/samples`."""

  def __init__(self, config: ml_collections.ConfigDict, loop: LoopConfig):
    """Prepares what does not change.

    Args:
      config: of a phase that trains a causal student.
      loop: says which prompts and how many blocks.

    Raises:
      ValueError: if the phase has no student, or there are no such measures,
        or no states of the prompts.
    """
    if 'rollout' not in config or 'generate' not in config:
      raise ValueError(
        f'loop.sample_every={loop.sample_every}: phase {config.phase!r} trains '
        'no network that videos could be sampled from block by block'
      )
    self._measures = measures.open_measures(config)
    self._folder = pathlib.Path(config.workdir) / 'samples'
    encoder = inputs.open_text(config)
    self._prompts = self._choose_prompts(config, loop, encoder)
    streaming.check_prompts(self._prompts)
    self._request = calls.Request(
      num_blocks=loop.sample_blocks, seed=config.seed
    )
    # The parameters come later, and so does the order.
    self._pipeline = video_pipeline.VideoPipeline(
      name=config.name,
      denoiser=Denoiser(WanConfig(**config.model)),
      params={},
      encoder=encoder,
      codec=inputs.open_codec(config),
      rollout=phase_parts.rollout_config(config),
      schedule=config.schedule.to_dict(),
      **config.generate,
    )

  def sample(
    self, params: Any, iteration: int
  ) -> tuple[dict[str, float], dict[str, pathlib.Path]]:
    """Writes `0000200_step_first.mp4`, `.png` and the same of block_first.

    Args:
      params: averaged, of the student. Several processes all call this, and
        process 0 alone samples.
      iteration: names the files.

    Returns:
      What the config's measures say, such as 'step_first/motion', nothing if
      the videos are too short for them; and the contact sheets by order.
    """
    if jax.process_count() > 1:
      params = multihost_utils.process_allgather(params, tiled=True)
      if jax.process_index() != 0:
        return {}, {}
    params = jax.device_put(params, jax.local_devices()[0])
    self._folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, float] = {}
    sheets: dict[str, pathlib.Path] = {}
    for order in ORDERS:
      pipeline = dataclasses.replace(self._pipeline, params=params)
      latents = pipeline.sample(
        self._prompts,
        dataclasses.replace(self._request, order=order),
        progress=False,
      )
      frames = pipeline.decode(latents)
      path = self._folder / f'{iteration:07d}_{order}.mp4'
      # One picture of all prompts side by side, frame by frame.
      joined = np.concatenate(frames, axis=2)
      scale = video.watchable_scale(joined.shape[1])
      scale = max(1, min(scale, _MAX_WIDTH // joined.shape[2]))
      video.Video(joined, pipeline.fps).save(path, scale=scale)
      sheets[order] = path.with_suffix('.png')
      contact_sheets.write(
        sheets[order],
        frames,
        captions=self._prompts,
        scale=min(scale, 2),
      )
      measured = self._measures.measure(frames, self._prompts)
      values |= {f'{order}/{name}': v for name, v in measured.items()}
    return values, sheets

  def _choose_prompts(self, config, loop, encoder):
    """What the videos show; found out before the training that it stops."""
    prompts = loop.sample_prompts or self._measures.prompts(_NUM_PROMPTS)
    if not prompts:
      source = inputs.open_prompts(config)
      prompts = tuple(source[i] for i in range(min(_NUM_PROMPTS, len(source))))
    try:
      encoder.encode(prompts)
    except ValueError as error:
      raise ValueError(
        f'videos of loop.sample_prompts cannot be sampled: {error}'
      ) from None
    return tuple(prompts)
