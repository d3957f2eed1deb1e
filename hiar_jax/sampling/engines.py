"""The programs of a stream, by its mode and its devices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from hiar_jax import rollout
from hiar_jax.denoiser import Denoiser
from hiar_jax.models.transformer import TextKV
from hiar_jax.sampling import executors, meshes, pipeline, shared_pipeline

MODES = ('batched', 'serial', 'shared', 'block_first')


@dataclasses.dataclass(frozen=True)
class Engine:
  """The programs of a stream: how to start and how to make the next block.

  Attributes:
    denoiser: network.
    config: how blocks are denoised; with context 'shared' the mode must be
      'shared' as well.
    mode: 'batched': the stages of the pipeline as one batch (fastest where
      memory allows); 'serial': stage after stage (least memory); both are
      hierarchical denoising and agree. 'shared': shared context, a method of
      its own in S + 1 passes a block instead of 2S. 'block_first': each block
      through all steps, with one past, for weights that were trained so.
    mesh: runs the stages on the devices of its axis `stage`, of this process
      or of several; None: one device. Block-first has no stages.
    in_place: passes write the keys of their blocks where they read those of
      all, see models/window.py and `in_place_refusal`.

  Raises:
    ValueError: if mode, context and mesh do not go together, or in place is
      not to be had.
  """

  denoiser: Denoiser
  config: rollout.RolloutConfig
  mode: str = 'batched'
  mesh: Any = None
  in_place: bool = False

  def __post_init__(self):
    if self.mode not in MODES:
      raise ValueError(f'stream mode {self.mode!r} is not one of {MODES}')
    if (self.mode == 'shared') != (self.config.context == 'shared'):
      raise ValueError(
        f'stream mode {self.mode!r} does not go with context '
        f'{self.config.context!r}: both or neither must be shared'
      )
    if self.mode == 'block_first' and (
      self.mesh is not None
      and (
        self.mesh.shape[executors.STAGE] > 1 or not meshes.divides(self.mesh)
      )
    ):
      raise ValueError(
        "stream mode 'block_first' makes one block after the other and has no "
        'stages: a mesh may divide its passes over tensor and context alone'
      )
    meshes.check_model(self.denoiser.config, self.mesh)
    if self.mode != 'block_first' and self.config.first_levels:
      raise ValueError(
        f'stream mode {self.mode!r} has the same levels for all blocks; '
        "levels of a first block's own go with 'block_first'"
      )
    _ = self.stages  # Its own checks: the mesh.
    if self.in_place and (refused := self.in_place_refusal):
      raise ValueError(f'no passes in place: {refused}')

  @property
  def in_place_refusal(self) -> str:
    """Why passes cannot write a window in place; '' if they can."""
    config, mesh = self.config, self.mesh
    if not self.denoiser.config.is_unrolled:
      return 'its layers are not apart'
    if config.past_dtype is not None:
      return f'its past is held as {config.past_dtype}'
    if config.sink and config.positions == 'bounded':
      return 'its sink is read at other positions than it was written'
    if mesh is None:
      batched = self.mode == 'batched'
      return 'the stages of a batch share their passes' if batched else ''
    if meshes.num_parts(mesh) > 1:
      return 'devices share a pass'
    if self.num_pasts > mesh.size:
      return 'a device has several pasts'
    return ''

  def written_in_place(self) -> 'Engine':
    """The same blocks, made in place by a network of layers that lie apart.

    As it is where passes cannot, see `in_place_refusal`.
    """
    model = self.denoiser.config
    apart = dataclasses.replace(
      self,
      denoiser=Denoiser(dataclasses.replace(model, unroll=model.num_layers)),
    )
    if apart.in_place_refusal:
      return self
    return dataclasses.replace(apart, in_place=True)

  @property
  def by_pass(self) -> bool:
    """Whether its passes are programs of their own, see `passes`."""
    return self.in_place and self.mesh is None

  @property
  def num_pasts(self) -> int:
    """Over all devices."""
    if isinstance(self.stages, shared_pipeline.SharedPipeline):
      return self.stages.passes * self.stages.num_stages
    return 1 if self.mode == 'block_first' else self.config.num_steps

  @property
  def stages(self) -> executors.Stages | None:
    """The pipeline; None for what is a loop on one device."""
    if self.mode == 'block_first':
      return None
    if self.mode != 'shared':
      return pipeline.Pipeline(
        self.denoiser,
        self.config,
        batched=self.mode == 'batched',
        mesh=self.mesh,
        in_place=self.in_place,
      )
    if self.mesh is None:
      return None
    return shared_pipeline.SharedPipeline(
      self.denoiser, self.config, mesh=self.mesh
    )

  @property
  def bank_size(self) -> int:
    """Prompts that may be in flight: one for each block that is."""
    return self.config.num_steps // 2 + 2

  def turns(self, block: int) -> list[list[int]]:
    """The turns in which a block is finished after the one before it.

    Returns:
      For each turn the block of every stage, the first stage's first; negative
      where a stage has none yet.
    """
    stages = self.stages
    if stages is None:
      return [[block]]
    return [stages.blocks_at(turn) for turn in stages.turns_of(block)]

  def wanted(self, block: int, num_blocks: int) -> np.ndarray:
    """Whether the work of `turns` is for any of so many blocks: [turns, S]."""
    stages = self.stages
    if stages is None:
      return np.ones((1, 1), bool)
    turns = stages.turns_of(block)
    return np.array([stages.wanted(turn, num_blocks) for turn in turns])

  def place(self, tree: Any) -> Any:
    """Puts arrays on all devices of the mesh, once and for all.

    Under several processes a program takes no arrays of one of them.
    """
    if self.mesh is None:
      return tree
    everywhere = NamedSharding(self.mesh, PartitionSpec())

    def one(a):
      if getattr(a, 'sharding', None) == everywhere:
        return a
      if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        return jax.device_put(np.asarray(a), everywhere)
      data = jax.device_put(np.asarray(jax.random.key_data(a)), everywhere)
      return jax.random.wrap_key_data(data, impl=jax.random.key_impl(a))

    return jax.tree.map(one, tree)

  def sampler(
    self, params: dict, text: TextKV, origin: Any = 0
  ) -> rollout.Sampler:
    return rollout.Sampler(
      self.denoiser, params, text, self.config, origin, self.in_place
    )
