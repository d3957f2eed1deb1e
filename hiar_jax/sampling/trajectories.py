"""The teacher's trajectories: sampled once, in files, for training to read.

Trajectory i is a pure function of (manifest, i): its noise is named by the seed
and i, its prompt is prompt i. So a run that was killed goes on with the files
that are missing, on any number of processes.
"""

# B batch, S student steps, F frames, h w latent rows and columns, C channels,
# L text tokens, D text width

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from hiar_jax.data import trajectory_files
from hiar_jax.denoiser import Denoiser
from hiar_jax.models import sharding
from hiar_jax.models.transformer import TextKV
from hiar_jax.runtime import distributed
from hiar_jax.sampling import solvers


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
  solver: str = 'euler',
) -> jax.Array:
  """Solves the teacher's probability-flow ODE.

  Args:
    denoiser: the teacher's network, bidirectional over all frames.
    params: its parameters.
    text: projected prompts.
    null_text: projected negative prompt, batch B or 1.
    noise_BFhwC: the start, unit normal.
    levels: falling, from `data.trajectories.solver_levels`.
    save_indices: rising positions in `levels`; the points there are kept.
    guidance: w of uncond + w (cond - uncond); 1 is no guidance.
    solver: one of solvers.SOLVERS.

  Returns:
    float32 [B, len(save_indices), F, h, w, C], noise first.
  """
  method = solvers.SOLVERS[solver]
  num_points = len(save_indices)
  # Slot num_points does not exist: what is written there is dropped.
  slots = np.full(len(levels), num_points, np.int32)
  slots[np.asarray(save_indices)] = np.arange(num_points)

  def flow(x, sigma):
    if guidance == 1:  # Half the work, which would be multiplied by 0.
      return denoiser.flow(params, x, sigma, text)[0]
    return denoiser.guided_flow(params, x, sigma, text, null_text, guidance)

  def step(carry, inputs):
    state, points = carry
    row, slot = inputs
    after = method.step(flow, state, row)
    points = points.at[slot].set(method.evaluated(state, after), mode='drop')
    return (after, points), None

  state = method.init(noise_BFhwC)
  points = jnp.zeros((num_points, *noise_BFhwC.shape), jnp.float32)
  (state, points), _ = jax.lax.scan(
    step, (state, points), (method.table(levels), slots[:-1])
  )
  points = points.at[slots[-1]].set(state.x, mode='drop')
  return jnp.moveaxis(points, 0, 1)


def make(
  directory: str | os.PathLike,
  manifest: trajectory_files.Manifest,
  denoiser: Denoiser,
  params: dict,
  prompts: Any,
  states: Any,
  negative_1LD: np.ndarray,
  *,
  batch_size: int,
  mesh: jax.sharding.Mesh | None = None,
  shard_index: int = 0,
  num_shards: int = 1,
  progress: Callable[[int], None] = lambda count: None,
  should_stop: Callable[[], bool] = lambda: False,
) -> bool:
  """Samples the trajectories that are missing.

  A resumed run writes the bytes that an uninterrupted one would have, given
  the same batch size and mesh (XLA may sum a larger batch in another order),
  on any number of processes.

  Args:
    directory: of the set; created if needed.
    manifest: from `data.trajectories.make_manifest`, of the same network.
    denoiser: the teacher's network.
    params: its parameters, in their places on the mesh.
    prompts: prompt i is that of trajectory i, see `data.prompts.Prompts`.
    states: text states of the prompts, see `training.inputs.States`.
    negative_1LD: those of the manifest's negative prompt.
    batch_size: trajectories sampled at once.
    mesh: over devices of this process; None: its first device. Over those of
      several processes these sample together, all call this alike, and process
      0 writes: so a teacher may be larger than what one host has room for.
    shard_index: this process, in [0, num_shards).
    num_shards: number of processes, which share the files among them and never
      speak with each other; 1 where they sample together.
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
  if mesh is not None:
    sharding.check_batch(batch_size, 1, mesh)
  todo = manifest.missing(
    directory, shard_index=shard_index, num_shards=num_shards
  )
  together = mesh is not None and mesh.is_multi_process
  if together:
    todo = _of_first_process(todo, manifest.num_files)
  manifest.settle(directory)
  share, shares = (0, 1) if mesh is None else sharding.batch_share(mesh)
  size = batch_size // shares
  sampler = sharding.under(
    mesh,
    functools.partial(
      _sample_indices,
      denoiser=denoiser,
      seed=manifest.seed,
      shape=manifest.latents_shape[1:],
      levels=manifest.levels,
      save_indices=tuple(map(manifest.levels.index, manifest.point_levels)),
      guidance=manifest.sampler['guidance'],
      solver=manifest.sampler['solver'],
    ),
  )
  for shard in todo:
    records = []
    indices = manifest.indices(shard)
    for start in range(0, len(indices), batch_size):
      if should_stop():
        return False
      rows = indices[start : start + batch_size]
      # One compiled program: a short batch repeats its last row.
      padded = [*rows, *[rows[-1]] * (batch_size - len(rows))]
      batch = jax.tree.map(
        lambda *arrays: np.stack(arrays),
        *(states[i] for i in padded[share * size :][:size]),
      )
      batch['number'] = np.asarray(padded[share * size :][:size], np.uint32)
      batch = states.finish(sharding.put_batch(batch, mesh))
      latents = sampler(params, batch['text'], negative_1LD, batch['number'])
      text = batch['text']
      if together:
        latents, text = sharding.whole((latents, text), mesh)
      latents, text = np.asarray(latents), np.asarray(text)
      for i, index in enumerate(rows):
        records.append(
          trajectory_files.pack(index, latents[i], text[i], prompts[index])
        )
      progress(len(rows))
    if not together or distributed.is_writer():
      trajectory_files.write_shard(manifest.path(directory, shard), records)
  return True


def _of_first_process(shards: list[int], num_files: int) -> list[int]:
  """What process 0 found: all have to do the same, whatever a disk tells."""
  wanted = np.zeros(num_files, bool)
  wanted[shards] = True
  agreed = multihost_utils.broadcast_one_to_all(wanted)
  return np.flatnonzero(agreed).tolist()


@functools.partial(
  jax.jit,
  static_argnames=(
    'denoiser',
    'seed',
    'shape',
    'levels',
    'save_indices',
    'guidance',
    'solver',
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
