"""Hierarchical denoising as a pipeline: one stage per denoising step.

D(b, j) runs at tick 2b + j and C(b, j) one tick later, so in the steady state
every stage makes exactly one network pass a tick, a finished block leaves the
last stage every second tick, the first one after S ticks and all B after
2B + S - 2 (HiAR, arXiv:2603.08703). Only the block's latents hop to the next
stage; each stage's past stays where it is.

One function, `_tick`, says what a stage does. It is mapped over the stages
that a device owns, and two executors differ only in how latents hop: on one
device by a roll of the stage axis, over a mesh axis `stage` by a collective
permute of the last local stage's latents. Other mesh axes are left to GSPMD.

The paper's fused form makes C(b, j) and D(b + 1, j) one pass of twice the
tokens: `fused=True`. D(b, j) then runs at tick b + j.
"""

# B batch, f frames per block, S stages (= denoising steps), L local stages,
# M prompts in the bank, N layers, h w latent rows and columns, C channels

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from hiar_jax import rollout
from hiar_jax.denoiser import Denoiser
from hiar_jax.models.kv_cache import KV, KVCache
from hiar_jax.models.transformer import TextKV
from hiar_jax.rollout import RolloutConfig, Sampler

STAGE = 'stage'


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
class Pipeline:
  """The stages of one network and config.

  Attributes:
    denoiser: network.
    config: how blocks are denoised; the context must be 'matched' or 'clean'.
    fused: one pass of commit and next denoise instead of two that alternate.
    batched: on one device, all stages as one batch; False runs them one after
      the other in the least memory.
    mesh: with an axis `stage` whose size divides the number of steps; None
      runs all stages on one device.

  Raises:
    ValueError: if the stages do not divide over the mesh, or the context has
      no pipeline.
  """

  denoiser: Denoiser
  config: RolloutConfig
  fused: bool = False
  batched: bool = True
  mesh: Mesh | None = None

  def __post_init__(self):
    if self.config.context == 'shared':
      raise ValueError("context 'shared' has no stage-wise pipeline")
    if self.mesh is not None:
      if STAGE not in self.mesh.shape:
        raise ValueError(f'mesh axes {self.mesh.axis_names} lack {STAGE!r}')
      if self.config.num_steps % self.mesh.shape[STAGE]:
        raise ValueError(
          f'{self.config.num_steps} stages do not divide over '
          f'{self.mesh.shape[STAGE]} devices'
        )

  @property
  def ticks_per_block(self) -> int:
    return 1 if self.fused else 2

  def finish_tick(self, block: int) -> int:
    """The tick, from 0, at which a block leaves the last stage."""
    return self.ticks_per_block * block + self.config.num_steps - 1

  def num_ticks(self, num_blocks: int) -> int:
    """Ticks until all blocks have left: 2B + S - 2 (fused: B + S - 1)."""
    return self.finish_tick(num_blocks - 1) + 1

  def init_state(
    self,
    params: dict,
    text: TextKV,
    initial: jax.Array | None = None,
    origin: int = 0,
  ) -> PipelineState:
    """Empty stages, or stages whose pasts hold given clean frames.

    Args:
      params: of the network.
      text: the prompts, [N, B, ...].
      initial: clean latents [B, F, h, w, C] that come first.
      origin: position of the first frame.
    """
    sampler = Sampler(self.denoiser, params, text, self.config, origin)
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

  def run(
    self,
    params: dict,
    bank: TextKV,
    slots_tS: jax.Array,
    keys_B: jax.Array,
    state: PipelineState,
  ) -> tuple[PipelineState, jax.Array]:
    """Runs some ticks.

    Args:
      params: of the network.
      bank: prompts, [M, N, B, ...].
      slots_tS: int32, the prompt in the bank that each stage uses at each of
        the ticks to run; their number is that of the ticks.
      keys_B: one noise key per sample, see `rollout.named_noise`.
      state: of the stages.

    Returns:
      The state after them, and what the last stage of every device denoised
      at each tick, [num_ticks, devices, B, f, h, w, C]. Block b of the video
      is entry [finish_tick(b), -1]; the others are of no meaning.
    """
    num_stages = self.config.num_steps
    if self.mesh is None:
      stages = jnp.arange(num_stages)
      state, sent = self._run_local(
        params, bank, slots_tS, keys_B, state, stages, _roll
      )
      return state, sent

    per_device = num_stages // self.mesh.shape[STAGE]

    def on_device(params, bank, slots, keys, state):
      first = jax.lax.axis_index(STAGE) * per_device
      stages = first + jnp.arange(per_device)
      return self._run_local(
        params, bank, slots, keys, state, stages, self._hop
      )

    split, whole = PartitionSpec(STAGE), PartitionSpec()
    state_spec = PipelineState(whole, split, split, split)
    state, sent = jax.shard_map(
      on_device,
      mesh=self.mesh,
      in_specs=(
        whole,
        whole,
        PartitionSpec(None, STAGE),
        whole,
        state_spec,
      ),
      out_specs=(state_spec, PartitionSpec(None, STAGE)),
      axis_names={STAGE},
      # Pallas kernels do not say over which axes their results vary.
      check_vma=False,
    )(params, bank, slots_tS, keys_B, state)
    return state, sent

  def _hop(self, sent: jax.Array) -> jax.Array:
    """Latents [L, ...] one stage on, the last local one to the next device."""
    size = self.mesh.shape[STAGE]
    ring = [(i, (i + 1) % size) for i in range(size)]
    arrived = jax.lax.ppermute(sent[-1:], STAGE, ring)
    return jnp.concatenate([arrived, sent[:-1]])

  def _run_local(self, params, bank, slots_tS, keys_B, state, stages, hop):
    tick = self._fused_tick if self.fused else self._tick

    def one_tick(state, slots):
      def one_stage(args):
        return tick(params, bank, keys_B, state.tick, *args)

      args = (stages, slots, state.hold, state.inbox, state.past)
      over_stages = jax.vmap(one_stage)
      if not self.batched:
        over_stages = functools.partial(jax.lax.map, one_stage)
      hold, sent, past = over_stages(args)
      state = PipelineState(state.tick + 1, hold, hop(sent), past)
      return state, sent[-1:]

    return jax.lax.scan(one_tick, state, slots_tS)

  def _stage(self, params, bank, keys_B, slot):
    text = jax.tree.map(lambda a: a[slot], bank)
    sampler = Sampler(self.denoiser, params, text, self.config)
    noise = rollout.named_noise(
      keys_B, self.config.block_shape(self.denoiser.config)
    )
    return sampler, noise

  def _context_level(self, sampler, step_next):
    """Level at which a block is committed, as the network is told it."""
    level = sampler.levels[step_next]
    if self.config.context == 'clean':
      level = jnp.zeros_like(level)
    return jnp.where(level == 0, self.config.context_level, level)

  def _tick(self, params, bank, keys_B, tick, stage, slot, hold, inbox, past):
    """What one stage does in one tick: D if tick - stage is even, else C.

    Before its first block a stage works on whatever its buffers hold; that
    reaches neither its past (`live`) nor a later stage's block (parity).
    """
    sampler, noise = self._stage(params, bank, keys_B, slot)
    age = tick - stage
    block = jnp.maximum(age, 0) // 2
    is_denoise = age % 2 == 0
    arrived = jnp.where(stage == 0, noise(0, block), inbox)
    x = jnp.where(is_denoise, arrived, hold)
    level = jnp.where(
      is_denoise,
      sampler.levels[stage],
      self._context_level(sampler, stage + 1),
    )
    flow, kv = self.denoiser.flow(params, x, level, sampler.text, past=past)
    sent, x0 = sampler.advance(x, flow, noise, stage, block)
    context, _ = rollout.context_of(sampler, sent, x0, stage + 1)
    hold = jnp.where(is_denoise, context, hold)
    past = past.write(kv, live=~is_denoise & (age >= 0))
    return hold, sent, past

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
      past,
      has_commit,
    )
    sent, x0 = sampler.advance(arrived, flow[:, size:], noise, stage, block)
    hold, _ = rollout.context_of(sampler, sent, x0, stage + 1)
    first = jax.tree.map(lambda a: a[:, :, : a.shape[2] // 2], kv)
    return hold, sent, past.write(first, live=has_commit)

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


def _roll(sent: jax.Array) -> jax.Array:
  return jnp.roll(sent, 1, axis=0)


def single_prompt(
  text: TextKV, num_ticks: int, num_stages: int
) -> tuple[TextKV, jax.Array]:
  """A bank of one prompt that every stage uses at every tick."""
  bank = jax.tree.map(lambda a: a[None], text)
  return bank, jnp.zeros((num_ticks, num_stages), jnp.int32)


def pipelined(
  pipeline: Pipeline,
  params: dict,
  text: TextKV,
  keys_B: jax.Array,
  num_blocks: int,
  initial: jax.Array | None = None,
) -> jax.Array:
  """All blocks of a video through the pipeline: equals rollout.step_first.

  Args:
    pipeline: stages.
    params: of the network.
    text: the prompts, [N, B, ...].
    keys_B: one noise key per sample.
    num_blocks: blocks to make.
    initial: clean latents that come first.

  Returns:
    [B, F, h, w, C], given frames included.
  """
  state = pipeline.init_state(params, text, initial)
  bank, slots = single_prompt(
    text, pipeline.num_ticks(num_blocks), pipeline.config.num_steps
  )
  _, sent = pipeline.run(params, bank, slots, keys_B, state)
  finished = [pipeline.finish_tick(b) for b in range(num_blocks)]
  video = rollout.join_blocks(sent[np.array(finished), -1])
  return video if initial is None else jnp.concatenate([initial, video], 1)
