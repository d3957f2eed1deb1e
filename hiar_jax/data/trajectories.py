"""Teacher ODE trajectories: sampled once, stored, read back by training.

The forward KL and the student's start regress points of the teacher's
probability-flow ODE. Trajectory i is a pure function of (manifest, i): its
noise is named by the seed and i, its prompt is prompt i. So a run that was
killed goes on with the files that are missing, on any number of processes.

B batch, S student steps, F frames, h w latent rows and columns, C channels,
L text tokens, D text width.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hiar_jax import noise_schedule
from hiar_jax.data import bouncing, trajectory_files
from hiar_jax.denoiser import Denoiser
from hiar_jax.models.transformer import TextKV
from hiar_jax.runtime import provenance

POINTS = ('student', 'indices')
# Closer levels are one level: a step between them would move nothing.
_SAME_LEVEL = 1e-6


@dataclasses.dataclass(frozen=True)
class TrajectoryConfig:
  """How the teacher's ODE is solved and which of its points are kept.

  Attributes:
    num_steps: Euler steps of the teacher's own schedule.
    shift: of that schedule.
    guidance: w of uncond + w (cond - uncond); 1 is no guidance.
    points: 'student' keeps the points at the student's levels, which are
      inserted between the teacher's; 'indices' keeps fixed steps of the
      teacher's schedule, the public code's form, whose levels are the
      student's at the first point only.
    indices: for 'indices', the kept steps, from 0 to num_steps.
  """

  num_steps: int = 48
  shift: float = 8.0
  guidance: float = 6.0
  points: str = 'student'
  indices: tuple[int, ...] = (0, 12, 24, 36, 48)

  def __post_init__(self):
    if self.num_steps < 1:
      raise ValueError(f'num_steps={self.num_steps} is not at least 1')
    if self.points not in POINTS:
      raise ValueError(f'points={self.points!r} is not one of {POINTS}')
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


def sample(
  denoiser: Denoiser,
  params: dict,
  text: TextKV,
  null_text: TextKV,
  noise_BFhwC: jax.Array,
  *,
  levels: Sequence[float],
  save_indices: Sequence[int],
  guidance: float,
) -> jax.Array:
  """Solves the teacher's probability-flow ODE by Euler steps.

  Args:
    denoiser: the teacher's network, bidirectional over all frames.
    params: its parameters.
    text: projected prompts.
    null_text: projected empty prompt, batch B or 1.
    noise_BFhwC: the start, unit normal.
    levels: falling, from `solver_levels`.
    save_indices: rising positions in `levels`; the points there are kept.
    guidance: w of uncond + w (cond - uncond).

  Returns:
    float32 [B, len(save_indices), F, h, w, C], noise first.
  """
  levels = np.asarray(levels, np.float32)
  num_points = len(save_indices)
  # Slot num_points does not exist: what is written there is dropped.
  slots = np.full(len(levels), num_points, np.int32)
  slots[np.asarray(save_indices)] = np.arange(num_points)

  def step(carry, inputs):
    x, points = carry
    sigma, sigma_next, slot = inputs
    flow = denoiser.guided_flow(params, x, sigma, text, null_text, guidance)
    x = noise_schedule.euler_step(x, flow, sigma, sigma_next)
    return (x, points.at[slot].set(x, mode='drop')), None

  x = noise_BFhwC.astype(jnp.float32)
  points = jnp.zeros((num_points, *x.shape), jnp.float32)
  points = points.at[slots[0]].set(x, mode='drop')
  (_, points), _ = jax.lax.scan(
    step, (x, points), (levels[:-1], levels[1:], slots[1:])
  )
  return jnp.moveaxis(points, 0, 1)


def make_manifest(
  config: TrajectoryConfig,
  student_levels: Sequence[float],
  denoiser: Denoiser,
  params: dict,
  prompts: bouncing.BouncingPrompts,
  *,
  num: int,
  shard_size: int,
  seed: int,
  num_frames: int,
) -> trajectory_files.Manifest:
  """The manifest of a set of trajectories that is about to be made.

  Args:
    config: of the sampler.
    student_levels: the student's S + 1 levels.
    denoiser: the teacher's network.
    params: its parameters.
    prompts: prompt i is that of trajectory i.
    num: number of trajectories.
    shard_size: trajectories in a file; a file is kept in memory until it is
      whole.
    seed: of the noise.
    num_frames: latent frames F.

  Raises:
    ValueError: if there are more trajectories than prompts, or a value is out
      of range.
  """
  if num > len(prompts):
    raise ValueError(f'num={num} is more than the {len(prompts)} prompts')
  levels, kept = solver_levels(config, student_levels)
  size = denoiser.config
  prompt_settings = dataclasses.asdict(prompts)
  # More prompts than are used change nothing.
  prompt_settings.pop('length')
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
      size.latent_height,
      size.latent_width,
      size.channels,
    ),
    prompts={'source': type(prompts).__name__} | prompt_settings,
    model=dataclasses.asdict(size),
    weights_sha256=weights_sha256(params),
  )


def weights_sha256(params: Any) -> str:
  """Checksum of a parameter tree: names, shapes, dtypes and values."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    array = np.asarray(leaf)
    name = jax.tree_util.keystr(path)
    digest.update(f'{name} {array.shape} {array.dtype}\n'.encode())
    digest.update(array.tobytes())
  return digest.hexdigest()


def make(
  directory: str | os.PathLike,
  manifest: trajectory_files.Manifest,
  denoiser: Denoiser,
  params: dict,
  prompts: bouncing.BouncingPrompts,
  *,
  batch_size: int,
  shard_index: int = 0,
  num_shards: int = 1,
  devices: Sequence[jax.Device] | None = None,
  progress: Callable[[int], None] = lambda count: None,
  should_stop: Callable[[], bool] = lambda: False,
) -> bool:
  """Samples the trajectories that are missing.

  A resumed run writes the bytes that an uninterrupted one would have, given
  the same batch size and devices (XLA may sum a larger batch in another order),
  on any number of processes.

  Args:
    directory: of the set; created if needed.
    manifest: from `make_manifest`, with the same network and prompts.
    denoiser: the teacher's network.
    params: its parameters.
    prompts: as in the manifest.
    batch_size: trajectories sampled at once.
    shard_index: this process, in [0, num_shards).
    num_shards: number of processes, which share the files among them and never
      speak with each other.
    devices: of this process, that share every batch; None is the first one.
    progress: called with the number of trajectories just sampled.
    should_stop: asked before every batch; True drops the file under way.

  Returns:
    Whether all were made, and none was stopped.

  Raises:
    ValueError: if the folder has another manifest's trajectories (naming the
      fields that differ), an argument is out of range, or the teacher gives
      values that are not finite in float16.
  """
  if batch_size < 1:
    raise ValueError(f'batch_size={batch_size} is not at least 1')
  devices = jax.local_devices()[:1] if devices is None else devices
  if batch_size % len(devices):
    raise ValueError(
      f'batch_size={batch_size} is not a multiple of {len(devices)} devices'
    )
  todo = manifest.missing(
    directory, shard_index=shard_index, num_shards=num_shards
  )
  manifest.settle(directory)
  sampler = functools.partial(
    _sample_indices,
    denoiser=denoiser,
    seed=manifest.seed,
    shape=manifest.latents_shape[1:],
    levels=manifest.levels,
    save_indices=tuple(map(manifest.levels.index, manifest.point_levels)),
    guidance=manifest.sampler['guidance'],
  )
  null_states = prompts.encoder.encode([''])
  mesh = Mesh(np.array(devices), ('data',), axis_types=(AxisType.Auto,))
  by_row = NamedSharding(mesh, PartitionSpec('data'))
  params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
  for shard in todo:
    records = []
    indices = manifest.indices(shard)
    for start in range(0, len(indices), batch_size):
      if should_stop():
        return False
      rows = indices[start : start + batch_size]
      # One compiled program: a short batch repeats its last row.
      padded = [*rows, *[rows[-1]] * (batch_size - len(rows))]
      captions = [prompts.scene(i).caption for i in padded]
      states = prompts.encoder.encode(captions)
      rows_states, rows_indices = jax.device_put(
        (states, np.asarray(padded, np.uint32)), by_row
      )
      latents = np.asarray(
        sampler(params, rows_states, null_states, rows_indices)
      )
      for i, index in enumerate(rows):
        records.append(
          trajectory_files.pack(index, latents[i], states[i], captions[i])
        )
      progress(len(rows))
    trajectory_files.write_shard(manifest.path(directory, shard), records)
  return True


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
  ) -> None:
    """Opens a complete set.

    Args:
      directory: written by `make`.
      levels: of the points that training will use, see `point_levels`.
      sampler: that training expects them to come from; None takes any.

    Raises:
      FileNotFoundError: if there are no trajectories, or some are missing.
      ValueError: if the points lie at other levels, come from another sampler
        (naming what differs), or the set is damaged.
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
    return {
      'latents': record['latents'].astype(np.float32),
      'text': record['text'],
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


@functools.partial(
  jax.jit,
  static_argnames=(
    'denoiser',
    'seed',
    'shape',
    'levels',
    'save_indices',
    'guidance',
  ),
)
def _sample_indices(
  params: dict,
  states_BLD: jax.Array,
  null_states_1LD: jax.Array,
  indices_B: jax.Array,
  *,
  denoiser: Denoiser,
  seed: int,
  shape: tuple[int, ...],
  **settings: Any,
) -> jax.Array:
  """Trajectories `indices_B`, float16, each from its own noise."""
  key = jax.random.key(seed)
  noise = jax.vmap(
    lambda index: jax.random.normal(jax.random.fold_in(key, index), shape)
  )(indices_B)
  points = sample(
    denoiser,
    params,
    denoiser.project_text(params, states_BLD),
    denoiser.project_text(params, null_states_1LD),
    noise,
    **settings,
  )
  return points.astype(jnp.float16)


def _rises(values: Sequence[float]) -> bool:
  return bool(np.all(np.diff(values) > 0))


def _short(levels: Sequence[float]) -> tuple[float, ...]:
  return tuple(round(float(level), 6) for level in levels)
