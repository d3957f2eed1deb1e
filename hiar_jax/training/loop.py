"""The host loop of all training phases.

It restores the last checkpoint if there is one, trains to
`config.iterations`, saves as it goes and exports the averaged weights at the
end. Killed at any moment and started again, it ends with bit-equal parameters:
keys are made from (seed, iteration), and the data iterator is saved with the
state. SIGTERM, Ctrl-C and the preemption notice of a pod are answered with a
checkpoint of the iteration that is under way.
"""

import contextlib
import pathlib
import sys

import jax
import ml_collections

from hiar_jax.models import flops
from hiar_jax.runtime import profiling, provenance, stopping, watchdog
from hiar_jax.training import (
  adapters,
  checkpoint,
  continuation,
  guards,
  phases,
  run_log,
  samples,
)
from hiar_jax.training.loop_config import LoopConfig
from hiar_jax.training.network_files import WEIGHTS
from hiar_jax.weights import networks


def train(
  config: ml_collections.ConfigDict,
  *,
  profile: tuple[int, int] | None = None,
  step_timeout: float | None = None,
  allow_config_change: bool = False,
) -> pathlib.Path:
  """Runs one phase to its end, from its last checkpoint if there is one.

  Args:
    config: of the phase; its section `loop`, which may be missing, is a
      `LoopConfig`.
    profile: first iteration (from 1) and number of iterations to trace with
      jax.profiler into `workdir/profile`.
    step_timeout: seconds without a finished iteration after which the process
      dumps all stacks and exits, see `watchdog`.
    allow_config_change: go on although the config changes what is learnt; the
      checkpoints from then on say so.

  Returns:
    The exported weights.

  Raises:
    ValueError: if a value does not fit, the run was made by another config, a
      value is not finite although its update was applied (the last checkpoint
      stays as it was), or `loop.max_skipped` updates in a row were not finite
      (the state is saved).
    FileNotFoundError: if the phase's inputs are missing.
    SystemExit: with status 143 after SIGTERM; the state is saved.
    KeyboardInterrupt: after Ctrl-C; the state is saved.
  """
  workdir = pathlib.Path(config.workdir)
  loop = LoopConfig(**config.get('loop', {}))
  trace = profiling.TraceWindow(workdir / 'profile', profile)
  phase = phases.build(config)
  # Closing waits for the checkpoint that is being written, also after an error.
  with contextlib.closing(
    checkpoint.make_manager(
      workdir / 'checkpoints',
      max_to_keep=loop.keep_last,
      keep_every=loop.keep_every,
      keep_best=loop.keep_best,
      best=loop.best,
    )
  ) as manager:
    state, batches, iteration, kept = _restore(
      config, phase, manager, allow_config_change
    )
    with (
      run_log.RunLog(
        *(workdir, config.to_dict(), loop),
        restored_step=iteration,
        flops=phase.flops,
        peak=flops.peak(jax.devices()),
        videos=config.batch_size,
        tokens=phase.tokens,
      ) as log,
      watchdog.Watchdog(step_timeout, start=iteration) as dog,
      trace,
      stopping.StopSignals() as stop,
    ):
      book = _Book(config, kept, loop, phase, manager, log, dog)
      while iteration < config.iterations:
        batch = dict(next(batches))
        elements = batch.pop('index', None)
        trace.before(iteration + 1, state)
        state, values = phase.step(state, batch, iteration)
        iteration += 1
        dog.step(iteration, values)
        trace.after(iteration, state)
        stops = stop.requested(iteration)
        book.add(iteration, elements, values)
        book.settle(iteration, state, batches, must_save=stops)
        if stops:
          stop.leave()
  weights = workdir / WEIGHTS
  # Collecting them from all processes takes all processes.
  params = phase.weights(state)
  if jax.process_index() == 0:
    networks.save_weights(weights, params)
    print(f'wrote {weights}', flush=True)
  if phase.save_adapters is not None:
    phase.save_adapters(state, workdir / adapters.FILE)
  return weights


def _restore(config, phase, manager, allow_change):
  """State, data iterator, iterations done, and what checkpoints keep."""
  iteration = checkpoint.latest_step(manager) or 0
  if not iteration:
    return (
      *(phase.state, phase.batches, 0),
      continuation.record(config.to_dict()),
    )
  saved = checkpoint.restore_config(manager, iteration)
  kept = continuation.record(config.to_dict(), saved)
  changed = continuation.differences(saved, kept)
  if changed and not allow_change:
    raise ValueError(
      f'{config.workdir} was made by another config: {"; ".join(changed)}. '
      '--allow_config_change goes on with this one; another --config.workdir '
      'begins anew'
    )
  if changed:
    kept = continuation.note_change(kept, iteration, changed)
    print(
      f'warning: goes on with another config: {"; ".join(changed)}',
      file=sys.stderr,
      flush=True,
    )
  changed = provenance.config_differences(
    checkpoint.restore_version(manager, iteration), provenance.code_version()
  )
  if changed:
    print(
      f'warning: the code is not what saved iteration {iteration}: '
      + '; '.join(changed),
      file=sys.stderr,
      flush=True,
    )
  state, batches, _ = checkpoint.restore(
    manager, iteration, networks.abstract(phase.state), phase.batches
  )
  print(f'{config.workdir}: goes on after iteration {iteration}', flush=True)
  return state, batches, iteration, kept


class _Book:
  """What is due after some iterations: a line, samples, a checkpoint."""

  def __init__(self, config, kept, loop, phase, manager, log, dog):
    self._config, self._kept = config, kept
    self._loop, self._phase = loop, phase
    self._manager, self._log, self._dog = manager, log, dog
    self._guard = guards.Guard(loop.max_skipped)
    self._version = provenance.code_version()
    self._sampler = samples.Sampler(config, loop) if loop.sample_every else None

  def add(self, iteration, elements, values):
    """Notes an iteration; does not wait for it."""
    self._guard.add(iteration, elements, values)
    self._log.progress(iteration, values)

  def settle(self, iteration, state, batches, *, must_save):
    """Does what is due after it."""
    config, every = self._config, self._loop.sample_every
    save = (
      must_save
      or iteration == config.iterations
      or iteration % config.checkpoint_every == 0
    )
    sampler = self._sampler
    if sampler is not None and iteration % every:
      sampler = None
    if not (save or sampler or iteration % config.log_every == 0):
      return
    try:
      report = self._guard.report()
    except ValueError as error:
      raise ValueError(
        f'{error}; {config.workdir} keeps its last checkpoint'
      ) from None
    values = report.values
    if sampler is not None:
      values |= self._sample(sampler, iteration, state)
    self._log.write(iteration, values)
    if save or report.exhausted:
      checkpoint.save(
        self._manager,
        iteration,
        state,
        batches,
        self._kept,
        version=self._version,
        metrics=values,
      )
    if report.exhausted:
      raise ValueError(
        f'{report.exhausted}; {config.workdir} has a checkpoint of iteration '
        f'{iteration}'
      )

  def _sample(self, sampler, iteration, state):
    with self._dog.paused():
      values, sheets = sampler.sample(self._phase.weights(state), iteration)
    for name, path in sheets.items():
      self._log.sheet(iteration, f'samples/{name}', path)
    return values
