"""Everything that a run writes about itself, by one process.

  metrics.jsonl   what training computed; the same for a run that was cut
  speed.jsonl     what the machine made of it: speed and peaks of memory
  tensorboard/    both, with the sheets of the samples, if asked for
  wandb/          the same for Weights & Biases, if asked for

and a progress bar, or lines, on stderr.
"""

import contextlib
import hashlib
import importlib
import math
import pathlib
import threading
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Self

import jax
import numpy as np
from PIL import Image

from hiar_jax.runtime import follower, metrics, profiling
from hiar_jax.training import loop_config

METRICS = 'metrics.jsonl'
SPEED = 'speed.jsonl'
# Seconds that the end waits for iterations under way: after an error the device
# may hang.
_PATIENCE = 1.0


class RunLog:
  """The files and services of one run; a context. Other processes' are mute."""

  def __init__(
    self,
    workdir: str | pathlib.Path,
    config: Mapping[str, Any],
    loop: loop_config.LoopConfig,
    *,
    restored_step: int,
    flops: float | None = None,
    peak: float | None = None,
    videos: float | None = None,
    tokens: float | None = None,
  ):
    """Opens everything.

    Args:
      workdir: of the run.
      config: of the training; has 'name', 'phase' and 'iterations'.
      loop: says which services.
      restored_step: iterations done; what was written beyond them is dropped.
      flops: of an iteration, see profiling.Speed.
      peak: of all devices, see there.
      videos: of an iteration, see there.
      tokens: likewise.

    Raises:
      ValueError: if the package of a service is not installed.
      OSError: if the workdir cannot be written.
    """
    workdir = pathlib.Path(workdir)
    self._stack = contextlib.ExitStack()
    self._files: list[metrics.MetricsFile] = []
    self._services: list[TensorBoard | WeightsAndBiases] = []
    self._progress: metrics.Progress | None = None
    self._follower: follower.Follower | None = None
    # The bar is moved by the loop and by the thread that follows the device.
    self._lock, self._shown = threading.Lock(), restored_step
    self._speed = profiling.Speed(
      restored_step, flops, peak, videos=videos, tokens=tokens
    )
    if jax.process_index() != 0:
      return
    with contextlib.ExitStack() as stack:
      for name in (METRICS, SPEED):
        file = metrics.MetricsFile(workdir / name, restored_step=restored_step)
        self._files.append(stack.enter_context(file))
      if loop.tensorboard:
        board = TensorBoard(workdir / 'tensorboard', restored_step)
        self._services.append(stack.enter_context(board))
      if loop.wandb:
        run = WeightsAndBiases(workdir, config)
        self._services.append(stack.enter_context(run))
      self._progress = stack.enter_context(
        metrics.Progress(
          config['iterations'], start=restored_step, label=config['phase']
        )
      )
      self._follower = follower.Follower(self._finished)
      self._follower.start()
      stack.callback(self._stop_following)
      self._stack = stack.pop_all()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error: Any) -> None:
    self._stack.__exit__(*error)

  def progress(self, step: int, values: Any) -> None:
    """Moves the bar once an iteration that was started has finished.

    Args:
      step: its number, from 1.
      values: arrays that are ready then, and not donated.
    """
    if self._follower is not None:
      self._follower.step(step, values)

  def _finished(self, step: int) -> None:
    self._show(step, None)

  def _stop_following(self) -> None:
    assert self._follower is not None
    self._follower.close(_PATIENCE)
    with self._lock:  # What finishes later meets a bar that is closed.
      self._progress = None

  def _show(self, step: int, values: Mapping[str, float] | None) -> None:
    with self._lock:
      if self._progress is None or (values is None and step <= self._shown):
        return
      self._shown = max(step, self._shown)
      self._progress.update(self._shown, values)

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Writes one line of metrics and one of speed, and shows the scalars."""
    if self._progress is None:
      return
    speed = self._speed.look(step)
    for file, line in zip(self._files, (values, speed), strict=True):
      file.write(step, line)
    scalars = {k: v for k, v in values.items() if not isinstance(v, list)}
    for service in self._services:
      service.write(step, scalars | {f'speed/{k}': v for k, v in speed.items()})
    # Most updates are not skipped, and a line is short.
    shown = {k: v for k, v in scalars.items() if v or 'skipped' not in k}
    self._show(step, shown)

  def sheet(self, step: int, name: str, path: pathlib.Path) -> None:
    """Shows a picture that lies in a file."""
    for service in self._services:
      service.sheet(step, name, path)


class TensorBoard:
  """An event file of scalars and pictures, written without TensorFlow."""

  def __init__(self, directory: pathlib.Path, restored_step: int):
    module = _import('tensorboardX', 'tensorboard')
    self._writer = module.SummaryWriter(
      str(directory),
      # Events of a run that was cut, beyond its checkpoint, are hidden.
      purge_step=restored_step + 1 if restored_step else None,
    )

  def write(self, step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
      if math.isfinite(value):
        self._writer.add_scalar(name, value, step)
    self._writer.flush()

  def sheet(self, step: int, name: str, path: pathlib.Path) -> None:
    with Image.open(path) as image:
      pixels = np.asarray(image.convert('RGB'))
    self._writer.add_image(name, pixels, step, dataformats='HWC')

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *unused_error: object) -> None:
    self._writer.close()


class WeightsAndBiases:
  """A run of wandb that goes on when the training does."""

  def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any]):
    self._wandb = _import('wandb', 'wandb')
    workdir.mkdir(parents=True, exist_ok=True)
    path = str(workdir.absolute())
    self._run = self._wandb.init(
      project=config['name'],
      name=workdir.name,
      id=hashlib.sha256(path.encode()).hexdigest()[:16],
      resume='allow',
      dir=path,
      config=dict(config),
    )

  def write(self, step: int, values: Mapping[str, float]) -> None:
    finite = {k: v for k, v in values.items() if math.isfinite(v)}
    self._run.log(finite, step=step)

  def sheet(self, step: int, name: str, path: pathlib.Path) -> None:
    self._run.log({name: self._wandb.Image(str(path))}, step=step)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, error_type: Any, *unused: Any) -> None:
    self._run.finish(exit_code=0 if error_type is None else 1)


def _import(module: str, extra: str) -> ModuleType:
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as error:
    raise ValueError(
      f'config.loop.{extra}=True needs the package {module!r}: '
      f"pip install 'hiar_jax[{extra}]'"
    ) from error
