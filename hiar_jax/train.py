"""The host loop of all training phases.

A phase is its first state, its step and its data. The loop restores the last
checkpoint if there is one, trains to `config.iterations`, saves as it goes and
exports the averaged weights at the end. Killed at any moment and started
again, it ends with bit-equal parameters: keys are made from (seed, iteration)
and the data iterator is saved with the state.
"""

from collections.abc import Callable
import dataclasses
import pathlib
import time
from typing import Any

from absl import logging
import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from hiar_jax import checkpoint
from hiar_jax import codecs
from hiar_jax import data
from hiar_jax import text
from hiar_jax import train_state
from hiar_jax import train_step
from hiar_jax import worlds
from hiar_jax.denoiser import Denoiser
from hiar_jax.models.config import WanConfig

WEIGHTS = 'weights.safetensors'


@dataclasses.dataclass(frozen=True)
class Phase:
  """What the loop runs.

  Attributes:
    state: first state.
    step: (state, batch, iteration) -> (state, metrics).
    batches: endless checkpointable iterator.
    weights: picks the tree to export from the last state.
  """

  state: Any
  step: Callable[[Any, dict, int], tuple[Any, dict]]
  batches: grain.DatasetIterator
  weights: Callable[[Any], Any]


def world_codec(config: ml_collections.ConfigDict) -> codecs.LinearCodec:
  """The small world's codec: read if it was fitted before, else fitted."""
  path = pathlib.Path(config.codec.path)
  if not path.exists():
    codec = codecs.fit_linear_codec(
      worlds.WorldConfig(**config.world),
      num_videos=config.codec.num_videos,
      channels=config.codec.channels,
      seed=config.codec.seed,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    codecs.save_linear_codec(codec, path)
  return codecs.load_linear_codec(path)


def _teacher(config: ml_collections.ConfigDict) -> Phase:
  denoiser = Denoiser(WanConfig(**config.model))
  optimiser = train_state.make_optimiser(
    train_state.OptimiserConfig(**config.optimiser), config.iterations
  )
  codec = world_codec(config)
  step = train_step.teacher_step(
    denoiser,
    optimiser,
    timestep_shift=config.timestep_shift,
    ema_decay=config.ema_decay,
  )
  key = jax.random.key(config.seed)

  def jitted(state, batch, iteration):
    latents = codec.encode(codecs.pixels_to_float(batch['video']))
    batch = {'latents': latents, 'text': batch['text']}
    return step(state, batch, jax.random.fold_in(key, iteration))

  source = data.BouncingVideos(
    worlds.WorldConfig(**config.world),
    text.WordHashEncoder(**config.text),
    seed=config.world_seed,
    caption_dropout=config.caption_dropout,
  )
  params = denoiser.init(key)
  return Phase(
    state=train_state.RegressionState(
      iteration=jnp.zeros((), jnp.int32),
      net=train_state.init_net(params, optimiser),
      ema=train_state.copy(params),
    ),
    step=jax.jit(jitted, donate_argnums=0),
    batches=data.video_batches(
      source, batch_size=config.batch_size, seed=config.seed
    ),
    weights=lambda state: state.ema,
  )


_PHASES = {'teacher': _teacher}


def train(config: ml_collections.ConfigDict) -> None:
  """Runs one phase to its end, from its last checkpoint if there is one.

  Raises:
    ValueError: if the phase is unknown or the run was made by another config.
  """
  if config.phase not in _PHASES:
    raise ValueError(
      f'phase {config.phase!r} is not one of {sorted(_PHASES)}'
    )
  workdir = pathlib.Path(config.workdir)
  phase = _PHASES[config.phase](config)
  state, batches = phase.state, phase.batches
  manager = checkpoint.make_manager(workdir / 'checkpoints')
  iteration = checkpoint.latest_step(manager) or 0
  if iteration:
    state, batches, saved = checkpoint.restore(
      manager, iteration, checkpoint.abstract(state), batches
    )
    changed = checkpoint.config_differences(
      saved, config.to_dict(), ignore=('workdir', 'log_every')
    )
    if changed:
      raise ValueError(
        f'{workdir} was made by another config: ' + '; '.join(changed)
      )
    logging.info('resumed at iteration %d', iteration)
  pending, start, start_iteration = [], time.time(), iteration
  while iteration < config.iterations:
    state, metrics = phase.step(state, next(batches), iteration)
    iteration += 1
    pending.append(metrics)
    if iteration % config.log_every == 0 or iteration == config.iterations:
      means = {
        name: float(np.mean([m[name] for m in pending if name in m]))
        for name in sorted(set().union(*pending))
      }
      pending = []
      rate = (time.time() - start) / (iteration - start_iteration)
      print(
        iteration,
        ' '.join(f'{k} {v:.4f}' for k, v in means.items()),
        f'{rate:.2f} s/it',
        flush=True,
      )
    if (
      iteration % config.checkpoint_every == 0 or iteration == config.iterations
    ):
      checkpoint.save(manager, iteration, state, batches, config.to_dict())
  manager.wait_until_finished()
  manager.close()
  checkpoint.save_weights(workdir / WEIGHTS, phase.weights(state))
