"""The host loop of all training phases.

It restores the last checkpoint if there is one, trains to
`config.iterations`, saves as it goes and exports the averaged weights at the
end. Killed at any moment and started again, it ends with bit-equal parameters:
keys are made from (seed, iteration), and the data iterator is saved with the
state.
"""

import contextlib
import pathlib

import ml_collections
import numpy as np

from hiar_jax import checkpoint, metrics, phases

WEIGHTS = 'weights.safetensors'
# What may differ between a run and its continuation.
_FREE_KEYS = ('workdir', 'log_every', 'checkpoint_every')


def train(config: ml_collections.ConfigDict) -> pathlib.Path:
  """Runs one phase to its end, from its last checkpoint if there is one.

  Returns:
    The exported weights.

  Raises:
    ValueError: if a value does not fit, the run was made by another config, or
      the loss is not finite (the last checkpoint stays as it was).
    FileNotFoundError: if the phase's inputs are missing.
  """
  workdir = pathlib.Path(config.workdir)
  phase = phases.build(config)
  # Closing waits for the checkpoint that is being written, also after an error.
  with contextlib.closing(
    checkpoint.make_manager(workdir / 'checkpoints')
  ) as manager:
    state = _run(config, phase, manager, workdir)
  weights = workdir / WEIGHTS
  checkpoint.save_weights(weights, phase.weights(state))
  print(f'wrote {weights}', flush=True)
  return weights


def _run(config, phase, manager, workdir):
  """From the last checkpoint to the last iteration: the last state."""
  state, batches = phase.state, phase.batches
  iteration = checkpoint.latest_step(manager) or 0
  if iteration:
    saved = checkpoint.restore_config(manager, iteration)
    changed = checkpoint.config_differences(
      saved, config.to_dict(), ignore=_FREE_KEYS
    )
    if changed:
      raise ValueError(
        f'{workdir} was made by another config: ' + '; '.join(changed)
      )
    state, batches, _ = checkpoint.restore(
      manager, iteration, checkpoint.abstract(state), batches
    )
    print(f'{workdir}: goes on after iteration {iteration}', flush=True)
  means = metrics.RunningMeans()
  with (
    metrics.MetricsFile(
      workdir / 'metrics.jsonl', restored_step=iteration
    ) as log,
    metrics.Progress(
      config.iterations, start=iteration, label=config.phase
    ) as progress,
  ):
    while iteration < config.iterations:
      state, values = phase.step(state, next(batches), iteration)
      iteration += 1
      means.add(values)
      last = iteration == config.iterations
      save = last or iteration % config.checkpoint_every == 0
      values = None
      if save or iteration % config.log_every == 0:
        values = means.pop()
        _check_finite(values, iteration, workdir)
        log.write(iteration, values)
      progress.update(iteration, values)
      if save:
        checkpoint.save(manager, iteration, state, batches, config.to_dict())
  return state


def _check_finite(values, iteration, workdir):
  for name, value in values.items():
    if not np.isfinite(value):
      raise ValueError(
        f'{name} is {value} before iteration {iteration}; {workdir} keeps its '
        'last checkpoint'
      )
