"""Saved state of a run: orbax checkpoints, checked before they are read.

Every orbax call of the project is in this file and in `weights.orbax_weights`.
A checkpoint is one folder a step with the items `state` (any pytree:
parameters, optimiser states, step, typed PRNG keys), `data` (the grain
iterator, so that the next batch is the next batch, on any number of hosts),
`config` and `version` (JSON, compared when the run goes on) and, if the best
one is kept, `metrics`. Orbax writes into a temporary folder and renames it, so
a killed run leaves whole checkpoints only.

Orbax neither notices a flipped bit in an array nor names a truncated file. A
list of the files, `files.json`, is therefore committed with the checkpoint and
checked before anything is read.
"""

import dataclasses
import json
import math
import pathlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from hiar_jax.runtime import files as runtime_files
from hiar_jax.runtime import provenance
from hiar_jax.weights import networks

_FILE_LIST = 'files.json'
# As grain would name it for one process.
_ITERATOR_FILE = 'process_0-of-1.json'
# Larger files are checked by their size alone: a pod's checkpoint has hundreds
# of gigabytes, and every process checks before it reads.
_CHECKSUM_BYTES = 64 * 2**20


class IteratorHandler(ocp.CheckpointHandler):
  """One file for all processes, whose iterators have the same state.

  grain's own handler writes one for each, named by how many there are, and so
  finds none on another number of hosts.
  """

  def save(self, directory: pathlib.Path, args: 'IteratorArgs') -> None:
    if jax.process_index() == 0:
      state = json.dumps(args.iterator.get_state(), indent=4)
      (directory / _ITERATOR_FILE).write_text(state)

  def restore(
    self, directory: pathlib.Path, args: 'IteratorArgs'
  ) -> grain.DatasetIterator:
    state = json.loads((directory / _ITERATOR_FILE).read_text())
    args.iterator.set_state(state)
    return args.iterator


@ocp.args.register_with_handler(
  IteratorHandler, for_save=True, for_restore=True
)
@dataclasses.dataclass
class IteratorArgs(ocp.args.CheckpointArgs):
  """The iterator that is saved or moved."""

  iterator: grain.DatasetIterator


def make_manager(
  directory: str | pathlib.Path,
  *,
  max_to_keep: int | None = 3,
  keep_every: int | None = None,
  keep_best: str | None = None,
  best: str = 'min',
) -> ocp.CheckpointManager:
  """Opens, or creates, the checkpoints of one run.

  Args:
    directory: one run's own folder.
    max_to_keep: how many of the newest stay; None keeps all.
    keep_every: steps divisible by this stay as well.
    keep_best: the step with the best value of this metric stays as well; of
      equal ones the newest.
    best: 'min' or 'max', which value of it is the best.

  Returns:
    A manager for the functions below. A thread does the writing: the next
    save, `manager.wait_until_finished()` and `manager.close()` wait for it.

  Raises:
    NotADirectoryError: if a file is in the way.
  """
  policies = ocp.checkpoint_managers
  kept = [policies.LatestN(max_to_keep)]
  if keep_every:
    kept.append(policies.EveryNSteps(keep_every))
  rank = _rank_by(keep_best, best) if keep_best else None
  if rank is not None:
    kept.append(
      policies.BestN(
        get_metric_fn=rank, n=1, keep_checkpoints_without_metrics=False
      )
    )
  path = pathlib.Path(directory).expanduser().absolute()
  if path.exists() and not path.is_dir():
    raise NotADirectoryError(f'checkpoint directory {path} is a file')
  path.mkdir(parents=True, exist_ok=True)
  return ocp.CheckpointManager(
    path,
    # Named here so that a new process can read the saved shapes as well.
    item_handlers={
      'state': ocp.StandardCheckpointHandler(),
      'data': IteratorHandler(),
      'config': ocp.JsonCheckpointHandler(),
      'version': ocp.JsonCheckpointHandler(),
    },
    options=ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy(kept),
      # Without it orbax drops the metrics.
      best_fn=rank,
      cleanup_tmp_directories=True,
      # Called between the last write and the rename that commits.
      async_options=ocp.AsyncOptions(
        post_finalization_callback=lambda: _list_files(path)
      ),
    ),
  )


def _rank_by(metric: str, best: str) -> Callable[[Mapping], float]:
  """Larger is better; a checkpoint without the metric is worst."""
  if best not in ('min', 'max'):
    raise ValueError(f"best={best!r} is not 'min' or 'max'")

  def rank(values: Mapping[str, float]) -> float:
    if metric not in values:
      return -math.inf
    return values[metric] if best == 'max' else -values[metric]

  return rank


def save(
  manager: ocp.CheckpointManager,
  step: int,
  state: Any,
  data_iterator: grain.DatasetIterator,
  config: Mapping[str, Any],
  *,
  version: Mapping[str, str] | None = None,
  metrics: Mapping[str, Any] | None = None,
) -> None:
  """Saves everything that the run needs to go on, under the given step.

  The state is copied off the devices before this returns, so it may be donated
  to the next step. A step that is already saved is left as it is.

  Args:
    manager: from `make_manager`.
    step: completed iterations.
    state: pytree of arrays.
    data_iterator: a grain iterator, as it stands.
    config: JSON-like dict (`ConfigDict.to_dict()`).
    version: of the code, by name.
    metrics: that the best checkpoint is chosen by; what is no finite number is
      left out.
  """
  if step in manager.all_steps():
    return
  numbers = {
    name: float(value)
    for name, value in (metrics or {}).items()
    if isinstance(value, int | float) and math.isfinite(value)
  }
  manager.save(
    step,
    metrics=numbers,
    args=ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      data=IteratorArgs(data_iterator),
      config=ocp.args.JsonSave(provenance.jsonable(config)),
      version=ocp.args.JsonSave(dict(version or {})),
    ),
    # Without it orbax drops a step below the newest one, silently.
    force=True,
  )


def restore(
  manager: ocp.CheckpointManager,
  step: int,
  abstract_state: Any,
  data_iterator: grain.DatasetIterator | None = None,
) -> tuple[Any, grain.DatasetIterator | None, dict[str, Any]]:
  """Reads a checkpoint back, onto the shardings of `abstract_state`.

  Args:
    manager: from `make_manager`.
    step: a saved one, such as `latest_step(manager)`.
    abstract_state: pytree of jax.ShapeDtypeStruct (see `networks.abstract`) in
      the structure of the saved state. Arrays will do, they are only looked at.
    data_iterator: is moved to where the run was; None leaves it out.

  Returns:
    The state, the data iterator, the config.

  Raises:
    FileNotFoundError: if the step was never saved, or a file of it is gone.
    ValueError: if the checkpoint is damaged or has another structure.
  """
  folder = _checked_folder(manager, step)
  abstract_state = networks.abstract(abstract_state)
  saved = manager.item_metadata(step).state
  networks.check_structure(
    folder, networks.shapes(saved), networks.shapes(abstract_state)
  )
  items = {
    'state': ocp.args.StandardRestore(abstract_state),
    'config': ocp.args.JsonRestore(),
  }
  if data_iterator is not None:
    items['data'] = IteratorArgs(data_iterator)
  restored = manager.restore(step, args=ocp.args.Composite(**items))
  return restored.state, data_iterator, restored.config


def restore_config(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
  """Reads the config alone, for building the state that `restore` fills.

  Raises:
    FileNotFoundError, ValueError: as `restore`.
  """
  _checked_folder(manager, step)
  return manager.restore(
    step, args=ocp.args.Composite(config=ocp.args.JsonRestore())
  ).config


def restore_version(
  manager: ocp.CheckpointManager, step: int
) -> dict[str, str]:
  """Reads which code saved a checkpoint; {} if it does not say.

  Raises:
    FileNotFoundError, ValueError: as `restore`.
  """
  if not (_checked_folder(manager, step) / 'version').exists():
    return {}
  return manager.restore(
    step, args=ocp.args.Composite(version=ocp.args.JsonRestore())
  ).version


def latest_step(manager: ocp.CheckpointManager) -> int | None:
  """The newest whole checkpoint's step, None if there is none."""
  return manager.latest_step()


def _list_files(directory: pathlib.Path) -> None:
  """Adds the file list to the checkpoint that is about to be committed."""
  if jax.process_index() != 0:
    return
  for folder in directory.glob('*.orbax-checkpoint-tmp*'):
    files = {
      # The items' own files; orbax rewrites those beside them later.
      str(file.relative_to(folder)): _fingerprint(file)
      for file in sorted(folder.glob('*/**/*'))
      if file.is_file()
    }
    (folder / _FILE_LIST).write_text(json.dumps(files, indent=1))


def _fingerprint(path: pathlib.Path) -> list[int]:
  """[bytes, CRC-32], or [bytes] alone for a large file."""
  size = path.stat().st_size
  if size > _CHECKSUM_BYTES:
    return [size]
  return [size, zlib.crc32(path.read_bytes())]


def _checked_folder(manager: ocp.CheckpointManager, step: int) -> pathlib.Path:
  """The step's folder, once every file in it is as it was written."""
  directory = pathlib.Path(manager.directory)
  if step not in manager.all_steps():
    raise FileNotFoundError(
      f'no checkpoint of step {step} in {directory}; '
      f'saved steps are {sorted(manager.all_steps())}'
    )
  folder = directory / str(step)
  listing = folder / _FILE_LIST
  if not listing.exists():
    raise FileNotFoundError(f'checkpoint {folder} is incomplete: no {listing}')
  try:
    files = runtime_files.parse_json(listing.read_bytes())
  except ValueError as error:
    raise ValueError(
      f'checkpoint {folder} is damaged: {listing} is not JSON'
    ) from error
  for name, fingerprint in files.items():
    file = folder / name
    if not file.exists():
      raise FileNotFoundError(f'checkpoint {folder} is incomplete: no {file}')
    if _fingerprint(file) != fingerprint:
      raise ValueError(
        f'checkpoint {folder} is damaged: {file} is not what was written'
      )
  return folder
