"""Teacher ODE trajectories: which points they have, and how they are read.

The forward KL and the student's start regress points of the teacher's
probability-flow ODE, which `sampling.trajectories` makes.

S student steps, F frames, h w latent rows and columns, C channels, L text
tokens, D text width.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
import safetensors
import safetensors.numpy
from jax.experimental import multihost_utils

from hiar_jax import noise_schedule
from hiar_jax.data import trajectory_files
from hiar_jax.models.config import WanConfig
from hiar_jax.runtime import provenance

POINTS = ('student', 'indices')
SOLVERS = ('euler', 'unipc')
# Closer levels are one level: a step between them would move nothing.
_SAME_LEVEL = 1e-6
# What they are told apart by -> what it is called.
_MEANING = {
  'negative_prompt': 'negative prompt',
  'text': 'text encoder',
  'teacher': 'teacher',
}


@dataclasses.dataclass(frozen=True)
class TrajectoryConfig:
  """How the teacher's ODE is solved and which of its points are kept.

  Attributes:
    num_steps: steps of the teacher's own schedule.
    shift: of that schedule.
    guidance: w of uncond + w (cond - uncond); 1 is no guidance.
    points: 'student' keeps the points at the student's levels, which are
      inserted between the teacher's; 'indices' keeps fixed steps of the
      teacher's schedule, the public code's form, whose levels are the
      student's at the first point only.
    indices: for 'indices', the kept steps, from 0 to num_steps.
    solver: one of SOLVERS. UniPC's points are corrected ones.
  """

  num_steps: int = 48
  shift: float = 8.0
  guidance: float = 6.0
  points: str = 'student'
  indices: tuple[int, ...] = (0, 12, 24, 36, 48)
  solver: str = 'euler'

  def __post_init__(self):
    if self.num_steps < 1:
      raise ValueError(f'num_steps={self.num_steps} is not at least 1')
    for name, allowed in (('points', POINTS), ('solver', SOLVERS)):
      if getattr(self, name) not in allowed:
        raise ValueError(
          f'{name}={getattr(self, name)!r} is not one of {allowed}'
        )
    if self.points == 'indices':
      ends = self.indices[:1] + self.indices[-1:]
      if ends != (0, self.num_steps) or not _rises(self.indices):
        raise ValueError(
          f'indices={self.indices} must rise from 0 to '
          f'num_steps={self.num_steps}'
        )


def solver_levels(
  config: TrajectoryConfig, student_levels: Sequence[float]
) -> tuple[tuple[float, ...], tuple[int, ...]]:
  """The levels that the ODE is stepped through, and which of them are kept.

  Args:
    config: of the sampler.
    student_levels: the student's S + 1 levels, falling to 0.

  Returns:
    Falling levels from 1 to 0, and the S + 1 positions in them to keep.

  Raises:
    ValueError: if the student's levels do not fall from at most 1 to 0, or
      are not as many as the fixed indices.
  """
  student = np.asarray(student_levels, np.float64)
  if (
    len(student) < 2
    or not _rises(-student)
    or student[0] > 1
    or student[-1] != 0
  ):
    raise ValueError(
      f'student levels {tuple(student_levels)} must fall from at most 1 to 0'
    )
  levels = noise_schedule.sampling_sigmas(config.num_steps, config.shift)
  if config.points == 'indices':
    if len(config.indices) != len(student):
      raise ValueError(
        f'{len(config.indices)} indices {config.indices} for '
        f'{len(student)} student levels'
      )
    return tuple(levels.tolist()), tuple(config.indices)
  distance = np.abs(levels[:, None] - student).min(axis=1)
  merged = np.concatenate([levels[distance > _SAME_LEVEL], student])
  merged = np.sort(merged)[::-1]
  kept = np.searchsorted(-merged, -student)
  return tuple(merged.tolist()), tuple(kept.tolist())


def point_levels(
  config: TrajectoryConfig, student_levels: Sequence[float]
) -> tuple[float, ...]:
  """Levels of the S + 1 stored points: the student's, unless by index."""
  levels, kept = solver_levels(config, student_levels)
  return tuple(levels[i] for i in kept)


def make_manifest(
  config: TrajectoryConfig,
  student_levels: Sequence[float],
  model: WanConfig,
  params: dict,
  *,
  prompts: Mapping[str, Any],
  num_prompts: int,
  num: int,
  shard_size: int,
  seed: int,
  num_frames: int,
  negative_prompt: str = '',
  text: str = '',
  teacher: str = '',
) -> trajectory_files.Manifest:
  """The manifest of a set of trajectories that is about to be made.

  Args:
    config: of the sampler.
    student_levels: the student's S + 1 levels.
    model: of the teacher's network.
    params: its parameters.
    prompts: where they are from; prompt i is that of trajectory i.
    num_prompts: how many there are.
    num: number of trajectories.
    shard_size: trajectories in a file; a file is kept in memory until it is
      whole.
    seed: of the noise.
    num_frames: latent frames F.
    negative_prompt: what guidance leads away from.
    text: identity of the text encoder.
    teacher: digest of the file that the parameters are from.

  Raises:
    ValueError: if there are more trajectories than prompts, or a value is out
      of range.
  """
  if num > num_prompts:
    raise ValueError(f'num={num} is more than the {num_prompts} prompts')
  levels, kept = solver_levels(config, student_levels)
  return trajectory_files.Manifest(
    num=num,
    shard_size=shard_size,
    seed=seed,
    sampler=dataclasses.asdict(config),
    levels=levels,
    point_levels=tuple(levels[i] for i in kept),
    latents_shape=(
      len(kept),
      num_frames,
      model.latent_height,
      model.latent_width,
      model.channels,
    ),
    prompts=dict(prompts),
    model=dataclasses.asdict(model),
    weights_sha256=weights_sha256(params),
    negative_prompt=negative_prompt,
    text=text,
    teacher=teacher,
  )


def weights_sha256(params: Any) -> str:
  """Checksum of a parameter tree: names, shapes, dtypes and values.

  Of arrays that are divided over processes, all of these call it.
  """
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      # One at a time, or a host would have to hold all of them.
      leaf = multihost_utils.process_allgather(leaf, tiled=True)
    array = np.asarray(leaf)
    name = jax.tree_util.keystr(path)
    digest.update(f'{name} {array.shape} {array.dtype}\n'.encode())
    digest.update(array.tobytes())
  return digest.hexdigest()


class TrajectorySource:
  """Stored trajectories; a grain RandomAccessDataSource.

  Attributes:
    manifest: of the folder.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    levels: Sequence[float],
    sampler: TrajectoryConfig | None = None,
    *,
    made_with: Mapping[str, str] | None = None,
  ) -> None:
    """Opens a complete set.

    Args:
      directory: written by `make`.
      levels: of the points that training will use, see `point_levels`.
      sampler: that training expects them to come from; None takes any.
      made_with: `negative_prompt`, `text` and `teacher` of the manifest that
        training expects. An empty one is not known, and so is not compared.

    Raises:
      FileNotFoundError: if there are no trajectories, or some are missing.
      ValueError: if the points lie at other levels, come from another sampler,
        negative prompt, text encoder or teacher (naming what differs), or the
        set is damaged.
    """
    self.manifest = trajectory_files.Manifest.read(directory)
    stored = self.manifest.point_levels
    if len(stored) != len(levels) or not np.allclose(
      stored, levels, rtol=0, atol=_SAME_LEVEL
    ):
      raise ValueError(
        f'trajectories in {directory} have their points at levels '
        f'{_short(stored)}, training needs them at {_short(levels)}'
      )
    if sampler is not None:
      changed = provenance.config_differences(
        self.manifest.sampler, dataclasses.asdict(sampler)
      )
      if changed:
        raise ValueError(
          f'trajectories in {directory} were sampled otherwise than training '
          f'expects: {"; ".join(changed)}'
        )
    for name, wanted in (made_with or {}).items():
      # Sets from before these were noted have none.
      found = getattr(self.manifest, name)
      if found and wanted and found != wanted:
        raise ValueError(
          f'trajectories in {directory} are of another {_MEANING[name]} than '
          f'training has: {found!r}, not {wanted!r}'
        )
    self.manifest.check_complete(directory)
    self._directory = directory
    try:
      self._records = grain.sources.ArrayRecordDataSource(
        [
          str(self.manifest.path(directory, shard))
          for shard in range(self.manifest.num_files)
        ]
      )
    except RuntimeError as error:
      raise ValueError(
        f'trajectories in {directory} are damaged: {error}'
      ) from error
    if len(self._records) != len(self):
      raise ValueError(
        f'trajectories in {directory} are damaged: {len(self._records)} '
        f'records for {len(self)} trajectories'
      )

  def __len__(self) -> int:
    return self.manifest.num

  def __repr__(self) -> str:
    return f'TrajectorySource({str(self._directory)!r}, {len(self)})'

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Reads one: `latents` [S + 1, F, h, w, C], `text` [L, D], float32."""
    record = self._unpacked(index)
    text = record['text']
    # Rows of padding are not stored.
    missing = self.manifest.model['text_len'] - len(text)
    return {
      'latents': record['latents'].astype(np.float32),
      'text': np.pad(text, ((0, missing), (0, 0))),
    }

  def caption(self, index: int) -> str:
    """What the trajectory was prompted with."""
    return self._unpacked(index)['caption'].tobytes().decode()

  def _unpacked(self, index: int) -> dict[str, np.ndarray]:
    try:
      return safetensors.numpy.load(self._records[index])
    except (RuntimeError, safetensors.SafetensorError) as error:
      raise ValueError(
        f'trajectory {index} in {self._directory} is damaged: {error}'
      ) from error


def _rises(values: Sequence[float] | np.ndarray) -> bool:
  return bool(np.all(np.diff(values) > 0))


def _short(levels: Sequence[float]) -> tuple[float, ...]:
  return tuple(round(float(level), 6) for level in levels)
