"""Stages that work in turns, on one device or over the devices of a mesh.

What a stage does is mapped over the stages that a device owns, and two
executors differ only in how latents hop: on one device by a roll of the stage
axis, over a mesh axis `stage` by a collective permute of the last local stage's
latents. Other mesh axes are left to GSPMD. `pipeline` and `shared_pipeline` say
what a stage does.
"""

# B batch, f frames per block, S stages (= denoising steps), L local stages,
# M prompts in the bank, N layers, h w latent rows and columns, C channels

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from hiar_jax import rollout
from hiar_jax.denoiser import Denoiser
from hiar_jax.models.transformer import TextKV
from hiar_jax.rollout import RolloutConfig, Sampler

STAGE = 'stage'
# In place of a prompt's slot: there is nothing to do for the stage.
NOTHING = -1


@dataclasses.dataclass(frozen=True)
class Stages(abc.ABC):
  """Stages of a network that work in turns, on one device or over a mesh.

  A turn is what every stage does between two hops of latents.

  Attributes:
    denoiser: network.
    config: how blocks are denoised.
    mesh: with an axis `stage` whose size divides the number of stages; None
      runs all of them on one device.
    in_place: the pasts are written by the passes, see models/window.py; for
      stages of which every device has one.

  Raises:
    ValueError: if the stages do not divide over the mesh.
  """

  denoiser: Denoiser
  config: RolloutConfig
  mesh: Mesh | None = None
  in_place: bool = False

  def __post_init__(self):
    if self.num_stages % self.num_devices:
      raise ValueError(
        f'{self.num_stages} stages do not divide over '
        f'{self.num_devices} devices'
      )

  @property
  @abc.abstractmethod
  def num_stages(self) -> int:
    """Stages, over all devices."""

  @property
  def exit_stage(self) -> int:
    """The stage that finishes a block."""
    return self.num_stages - 1

  @abc.abstractmethod
  def finish_turn(self, block: int) -> int:
    """The turn, from 0, in which a block is finished."""

  @abc.abstractmethod
  def blocks_at(self, turn: int) -> list[int]:
    """The block of each stage in a turn; negative before its first one."""

  def turns_of(self, block: int) -> range:
    """Those in which a block is finished after the one before it."""
    first = self.finish_turn(block - 1) + 1 if block else 0
    return range(first, self.finish_turn(block) + 1)

  def wanted(self, turn: int, num_blocks: int) -> list[bool]:
    """Whether any of so many blocks needs what a stage does in a turn."""
    return [block < num_blocks for block in self.blocks_at(turn)]

  @abc.abstractmethod
  def init_state(
    self,
    params: dict,
    text: TextKV,
    initial: jax.Array | None = None,
    origin: int = 0,
  ) -> Any:
    """Empty stages, or stages whose pasts hold given clean frames.

    Args:
      params: of the network.
      text: the prompts, [N, B, ...].
      initial: clean latents [B, F, h, w, C] that come first.
      origin: position of the first frame.

    Returns:
      A pytree; scalars are the same for all stages, the leading axis of all
      other arrays is the stage.
    """

  @abc.abstractmethod
  def _run_local(self, params, bank, slots_tL, keys_B, state, stages):
    """`run` for the stages named in `stages`, int32 [L].

    The second result is of `self.exit_stage`, or of the local stage in its
    place, [num_turns, 1, B, f, h, w, C].
    """

  @property
  def num_devices(self) -> int:
    if self.mesh is None:
      return 1
    if STAGE not in self.mesh.shape:
      raise ValueError(f'mesh axes {self.mesh.axis_names} lack {STAGE!r}')
    return self.mesh.shape[STAGE]

  @property
  def stages_per_device(self) -> int:
    return self.num_stages // self.num_devices

  def num_turns(self, num_blocks: int) -> int:
    """Turns until all blocks are finished."""
    return self.finish_turn(num_blocks - 1) + 1

  def run(
    self,
    params: dict,
    bank: TextKV,
    slots_tS: jax.Array,
    keys_B: jax.Array,
    state: Any,
  ) -> tuple[Any, jax.Array]:
    """Runs some turns.

    Args:
      params: of the network.
      bank: prompts, [M, N, B, ...].
      slots_tS: int32, the prompt in the bank that each stage uses in each of
        the turns to run, or NOTHING; their number is that of the turns.
      keys_B: one noise key per sample, see `rollout.named_noise`.
      state: of the stages, from `init_state`.

    Returns:
      The state after them, and what every device sent on in each turn,
      [num_turns, devices, B, f, h, w, C]; `finished` finds the blocks in it.
    """
    if self.mesh is None:
      stages = jnp.arange(self.num_stages)
      return self._run_local(params, bank, slots_tS, keys_B, state, stages)

    def on_device(params, bank, slots_tL, keys_B, state):
      first = jax.lax.axis_index(STAGE) * self.stages_per_device
      stages = first + jnp.arange(self.stages_per_device)
      return self._run_local(params, bank, slots_tL, keys_B, state, stages)

    whole, in_turns = PartitionSpec(), PartitionSpec(None, STAGE)
    state_specs = self.state_specs(state)
    return jax.shard_map(
      on_device,
      mesh=self.mesh,
      in_specs=(whole, whole, in_turns, whole, state_specs),
      out_specs=(state_specs, in_turns),
      axis_names={STAGE},
      # Pallas kernels do not say over which axes their results vary.
      check_vma=False,
    )(params, bank, slots_tS, keys_B, state)

  def state_specs(self, state: Any) -> Any:
    """How a state lies on the mesh: a stage's part with its stage."""
    return jax.tree.map(
      lambda a: PartitionSpec(STAGE) if a.ndim else PartitionSpec(), state
    )

  def finished(self, sent: jax.Array, turns: int | Sequence[int]) -> jax.Array:
    """What was finished in the given of the turns that `run` ran.

    Args:
      sent: second result of `run`.
      turns: one, or several; entries of `sent`.

    Returns:
      Blocks [B, f, h, w, C], or [b, B, f, h, w, C] for several turns.
    """
    return sent[np.array(turns), self.exit_stage // self.stages_per_device]

  def _shift(self, tree: Any, by: int) -> Any:
    """Arrays [L, ...] to the next stage (by=1) or the one before (by=-1).

    Only what changes the device crosses a link. What arrives at the first
    (last) stage, which has none before (after) it, is of no meaning.
    """
    size = self.num_devices
    if size == 1:
      return jax.tree.map(lambda a: jnp.roll(a, by, axis=0), tree)
    links = [(i, i + by) for i in range(size) if 0 <= i + by < size]

    def shift(a):
      edge = a[-1:] if by == 1 else a[:1]
      arrived = jax.lax.ppermute(edge, STAGE, links)
      parts = [arrived, a[:-1]] if by == 1 else [a[1:], arrived]
      return jnp.concatenate(parts)

    return jax.tree.map(shift, tree)

  def _stage(self, params, bank, keys_B, slot):
    """The verbs and the noise of a stage that uses a prompt of the bank."""
    text = jax.tree.map(lambda a: a[slot], bank)
    sampler = Sampler(self.denoiser, params, text, self.config)
    noise = rollout.named_noise(
      keys_B, self.config.block_shape(self.denoiser.config)
    )
    return sampler, noise
