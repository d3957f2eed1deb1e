"""Hierarchical denoising as a pipeline: one stage per denoising step.

D(b, j) runs at tick 2b + j and C(b, j) one tick later, so in the steady state
every stage makes exactly one network pass a tick, a finished block leaves the
last stage every second tick, the first one after S ticks and all B after
2B + S - 2 (HiAR, arXiv:2603.08703). Only the block's latents hop to the next
stage; each stage's past stays where it is.

One function, `stage_tick`, says what a stage does; `executors` maps it over the
stages of one device or of a mesh.

The paper's fused form makes C(b, j) and D(b + 1, j) one pass of twice the
tokens: `fused=True`. D(b, j) then runs at tick b + j.
"""

# B batch, f frames per block, S stages (= denoising steps), L local stages,
# M prompts in the bank, N layers, h w latent rows and columns, C channels

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from hiar_jax import rollout
from hiar_jax.models.kv_cache import KV, KVCache, Picked
from hiar_jax.models.transformer import TextKV
from hiar_jax.rollout import Sampler
from hiar_jax.sampling.executors import NOTHING, Stages


@flax.struct.dataclass
class PipelineState:
  """What the stages hold between ticks; the leading axis is the stage.

  Attributes:
    tick: int32 scalar, ticks done.
    hold: the block that a stage has denoised and is to commit,
      [S, B, f, h, w, C].
    inbox: the block that the stage before it has sent.
    past: one past per stage.
  """

  tick: jax.Array
  hold: jax.Array
  inbox: jax.Array
  past: KVCache


@dataclasses.dataclass(frozen=True)
class Pipeline(Stages):
  """One stage per denoising step; a turn is a tick.

  Attributes:
    fused: one pass of commit and next denoise instead of two that alternate.
    batched: on one device, all stages as one batch; False runs them one after
      the other in the least memory.

  The others are those of `Stages`; the context must be 'matched' or 'clean'.

  Raises:
    ValueError: if the stages do not divide over the mesh, or by the context.
  """

  fused: bool = False
  batched: bool = True

  def __post_init__(self):
    if self.config.context == 'shared':
      raise ValueError("context 'shared' needs shared_pipeline.SharedPipeline")
    if self.config.context == 'input':
      raise ValueError("context 'input' has no pipeline")
    if self.fused and self.config.positions == 'bounded':
      raise ValueError("fused ticks have no positions 'bounded'")
    super().__post_init__()

  @property
  def num_stages(self) -> int:
    return self.config.num_steps

  @property
  def ticks_per_block(self) -> int:
    return 1 if self.fused else 2

  def finish_tick(self, block: int) -> int:
    """The tick, from 0, at which a block leaves the last stage."""
    return self.ticks_per_block * block + self.config.num_steps - 1

  def num_ticks(self, num_blocks: int) -> int:
    """Ticks until all blocks have left: 2B + S - 2 (fused: B + S - 1)."""
    return self.finish_tick(num_blocks - 1) + 1

  def finish_turn(self, block: int) -> int:
    return self.finish_tick(block)

  def blocks_at(self, turn: int) -> list[int]:
    stages = range(self.num_stages)
    return [(turn - stage) // self.ticks_per_block for stage in stages]

  def wanted(self, turn: int, num_blocks: int) -> list[bool]:
    if self.fused:
      return super().wanted(turn, num_blocks)
    # Nobody reads the last block's keys: its stages only denoise it.
    last = 2 * num_blocks - 2
    return [turn - stage <= last for stage in range(self.num_stages)]

  def init_state(
    self,
    params: dict,
    text: TextKV,
    initial: jax.Array | None = None,
    origin: int = 0,
  ) -> PipelineState:
    sampler = Sampler(
      self.denoiser, params, text, self.config, origin, self.in_place
    )
    block = (
      self.config.num_steps,
      sampler.batch,
      *self.config.block_shape(self.denoiser.config),
    )
    return PipelineState(
      tick=jnp.zeros((), jnp.int32),
      hold=jnp.zeros(block),
      inbox=jnp.zeros(block),
      past=rollout.stacked_pasts(sampler, initial),
    )

  def _run_local(self, params, bank, slots_tL, keys_B, state, stages):
    tick: Callable[..., Any] = (
      self._fused_tick if self.fused else self.stage_tick
    )

    def one_tick(state, slots):
      def one_stage(args, past):
        return tick(params, bank, keys_B, state.tick, *args, past)

      def entry(i):
        # Taken where it is read: before a branch, the past would be copied.
        past: Any = Picked(state.past, i)
        own = jax.tree.map(lambda a: a[i], args)
        if self.in_place:
          return own, lambda: jax.tree.map(lambda a: a[i], state.past)
        return own, past.cut_out if self.fused or one_alone else lambda: past

      one_alone = len(stages) == 1
      args = (stages, slots, state.hold, state.inbox)
      if one_alone:
        # A batch of one would be one more axis in the attention.
        alone = one_stage(*entry(0))
        results = jax.tree.map(lambda a: jnp.asarray(a)[None], alone)
      elif self.batched:
        batch = jax.vmap(lambda args, past: one_stage(args, lambda: past))
        results = batch(args, state.past)
      else:
        one_by_one = jnp.arange(len(stages))
        results = jax.lax.map(lambda i: one_stage(*entry(i)), one_by_one)
      hold, sent, kv, live = results
      if self.in_place:
        written, counts = jax.tree.map(lambda a: a[0], (kv, live))
        past = jax.tree.map(lambda a: a[0], state.past).write(written, counts)
        past = jax.tree.map(lambda a: a[None], past)
      else:
        past = state.past.write_each(kv, live)
      inbox = self._shift(sent, 1)
      return PipelineState(state.tick + 1, hold, inbox, past), sent[-1:]

    return jax.lax.scan(one_tick, state, slots_tL)

  def _context_level(self, sampler, step_next):
    """Level at which a block is committed, as the network is told it."""
    level = sampler.levels[step_next]
    if self.config.context == 'clean':
      level = jnp.zeros_like(level)
    return jnp.where(level == 0, self.config.context_level, level)

  @property
  def _branches(self) -> bool:
    """Whether a stage runs the code of D, C or none, and not a pass for both.

    A commit ends at the last layer's keys and values. Stages in one batch run
    the same code, and so must the devices that share a stage, because their
    collectives wait for each other.
    """
    if self.in_place:  # A branch would copy what it writes.
      return False
    alone = self.stages_per_device == 1 or not self.batched
    return alone and (not self.mesh or self.mesh.size == self.num_devices)

  def stage_tick(
    self,
    params: dict,
    bank: TextKV,
    keys_B: jax.Array,
    tick: jax.Array,
    stage: jax.Array,
    slot: jax.Array,
    hold: jax.Array,
    inbox: jax.Array,
    past: Callable[[], Any],
  ) -> tuple[jax.Array, jax.Array, KV, jax.Array]:
    """What one stage does in one tick: D if tick - stage is even, else C.

    Before its first block and after its last (`slot` NOTHING) a stage waits or,
    in a batch or in place, works on whatever its buffers hold; that reaches
    neither its past (`live`) nor a later stage's block (parity). `past()` gives
    the past.

    Returns:
      What it holds then, what it sends, the K/V of the pass, and `live`:
      whether they are to be written to the stage's past.
    """
    sampler, noise = self._stage(params, bank, keys_B, slot)
    age = tick - stage
    block = jnp.maximum(age, 0) // 2
    is_denoise = age % 2 == 0
    idle = (age < 0) | (slot == NOTHING)
    arrived = jnp.where(stage == 0, noise(0, block), inbox)
    context_level = self._context_level(sampler, stage + 1)

    def advance(x, flow):
      sent, x0 = sampler.advance(x, flow, noise, stage, block)
      return rollout.context_of(sampler, sent, x0, stage + 1)[0], sent

    def denoise():
      flow, kv = sampler.denoise(arrived, past(), stage)
      return *advance(arrived, flow), kv

    def commit():
      return hold, hold, sampler.commit_kv(hold, past(), context_level)

    def wait():
      return hold, hold, sampler.no_kv(hold, past())

    if self._branches:
      turn = jnp.where(idle, 2, jnp.where(is_denoise, 0, 1))
      context, sent, kv = jax.lax.switch(turn, (denoise, commit, wait))
    else:
      x = jnp.where(is_denoise, arrived, hold)
      level = jnp.where(is_denoise, sampler.levels[stage], context_level)
      flow, kv = self.denoiser.flow(params, x, level, sampler.text, past=past())
      context, sent = advance(x, flow)
    hold = jnp.where(is_denoise, context, hold)
    return hold, sent, kv, ~is_denoise & ~idle

  def _fused_tick(
    self, params, bank, keys_B, tick, stage, slot, hold, inbox, past
  ):
    """C(b - 1, j) and D(b, j) as one pass: the second half sees the first."""
    sampler, noise = self._stage(params, bank, keys_B, slot)
    block = jnp.maximum(tick - stage, 0)
    arrived = jnp.where(stage == 0, noise(0, block), inbox)
    has_commit = tick > stage
    size = self.config.frames_per_block
    levels = jnp.stack(
      [self._context_level(sampler, stage + 1), sampler.levels[stage]]
    )
    flow, kv = self._fused_flow(
      params,
      # Where there is nothing to commit yet, the first half is not seen; it
      # must still be finite, as 0 * NaN is not 0.
      jnp.where(has_commit, hold, 0.0),
      arrived,
      jnp.repeat(levels, size)[None],
      sampler.text,
      past(),
      has_commit,
    )
    sent, x0 = sampler.advance(arrived, flow[:, size:], noise, stage, block)
    hold, _ = rollout.context_of(sampler, sent, x0, stage + 1)
    first = jax.tree.map(lambda a: a[:, :, : a.shape[2] // 2], kv)
    return hold, sent, first, has_commit

  def _fused_flow(self, params, commit, denoise, sigma, text, past, has_commit):
    """One pass of [block to commit | block to denoise]."""
    size = self.config.frames_per_block
    frames = 2 * size
    # The pass reads the past before the first half is written to it: of a full
    # ring, the slots that C will overwrite are hidden from the second half.
    slot = jnp.arange(past.slots)
    ring = past.slots - past.sink
    valid = slot < past.frames
    coming = past.frames + jnp.arange(size)
    overwritten = jnp.where(
      coming < past.sink,
      coming,
      past.sink + (coming - past.sink) % jnp.maximum(ring, 1),
    )
    kept = valid & ~jnp.any(slot[:, None] == overwritten[None], axis=1)
    # With more frames than the ring holds, only the last ones stay in it.
    stays = jnp.arange(size) >= size - ring
    stays |= coming < past.sink
    own, none = jnp.ones((size, size), bool), jnp.zeros((size, size), bool)
    sees_commit = jnp.broadcast_to(has_commit & stays[None], (size, size))
    past_first = jnp.broadcast_to(valid[None], (size, past.slots))
    past_second = jnp.where(has_commit, kept, valid)[None]
    past_second = jnp.broadcast_to(past_second, (size, past.slots))
    mask = jnp.concatenate(
      [
        jnp.concatenate([own, none, past_first], 1),
        jnp.concatenate([sees_commit, own, past_second], 1),
      ]
    )
    first = past.frames
    start = jnp.where(has_commit, first, first - size)
    positions = past.origin + start + jnp.arange(frames)
    return self.denoiser.flow(
      params,
      jnp.concatenate([commit, denoise], 1),
      sigma,
      text,
      positions_F=positions,
      past=KV(past.k, past.v),
      frame_mask=mask,
    )


def single_prompt(
  text: TextKV, num_turns: int, num_stages: int
) -> tuple[TextKV, jax.Array]:
  """A bank of one prompt that every stage uses in every turn."""
  bank = jax.tree.map(lambda a: a[None], text)
  return bank, jnp.zeros((num_turns, num_stages), jnp.int32)


def pipelined(
  stages: Stages,
  params: dict,
  text: TextKV,
  keys_B: jax.Array,
  num_blocks: int,
  initial: jax.Array | None = None,
) -> jax.Array:
  """All blocks of a video through a pipeline: equals rollout.step_first.

  `text` are the prompts, [N, B, ...], `keys_B` noise keys, one per sample,
  `initial` clean latents that come first.

  Returns:
    [B, F, h, w, C], given frames included.
  """
  state = stages.init_state(params, text, initial)
  bank, slots = single_prompt(
    text, stages.num_turns(num_blocks), stages.num_stages
  )
  _, sent = stages.run(params, bank, slots, keys_B, state)
  turns = [stages.finish_turn(b) for b in range(num_blocks)]
  video = rollout.join_blocks(stages.finished(sent, turns))
  return video if initial is None else jnp.concatenate([initial, video], 1)
