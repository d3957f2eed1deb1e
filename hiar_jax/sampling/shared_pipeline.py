"""The pipeline of the shared context: two steps share a stage.

With the shared context a block makes S + 1 passes (see
`rollout.shared_context`): D(b, 0) ... D(b, S - 1), and the commit of the
finished block, which is one more pass at level 0, in everything like D(b, S).
D(b, j) runs at tick 2b + j, as in `pipeline`, but without the commits a step
is busy every second tick only. So two consecutive steps share a stage:

  tick      0      1      2      3      4      5
  stage 0   D(0,0) D(0,1) D(1,0) D(1,1) D(2,0) D(2,1)
  stage 1   .      .      D(0,2) D(0,3) D(1,2) D(1,3)
  stage 2   .      .      .      .      C(0)   -

that is, in a turn of two ticks a stage takes one block through both its
passes, and hands it on. With P passes a stage, D(b, j) runs at tick P b + j in
turns of P ticks, and ceil((S + 1) / P) stages suffice; P = S + 1 is the loop of
`rollout.shared_context`.

The K/V of D(b, j + 1) are what D(b + 1, j) reads, P - 1 >= 1 ticks later. They
stay in the stage but for those of its first pass, which hop one stage back:
one block's K/V a turn and link, beside its latents.
"""

# B batch, f frames per block, S denoising steps, P passes a stage, L local
# stages, N layers, h w latent rows and columns, C channels

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp

from hiar_jax.models.kv_cache import KVCache
from hiar_jax.models.transformer import TextKV
from hiar_jax.rollout import Sampler
from hiar_jax.sampling import executors


@flax.struct.dataclass
class SharedState:
  """What the stages hold between turns; the leading axis is the stage.

  Attributes:
    turn: int32 scalar, turns done.
    inbox: the block that the stage before has sent, [stages, B, f, h, w, C].
    pasts: one past for each of the P passes. Not a leading axis: a pass would
      copy its past out of it.
  """

  turn: jax.Array
  inbox: jax.Array
  pasts: tuple[KVCache, ...]


@dataclasses.dataclass(frozen=True)
class SharedPipeline(executors.Stages):
  """P passes of a block per stage; makes what rollout.shared_context makes.

  Attributes:
    passes: P, at least 2; 0: the fewest from 2 on whose stages divide over
      the devices. A stage holds P pasts, and the last one has idle passes
      unless P divides S + 1.

  The others are those of `executors.Stages`; the context must be 'shared'.

  Raises:
    ValueError: if the context is another one, or there are no such stages.
  """

  passes: int = 0

  def __post_init__(self):
    if self.config.context != 'shared':
      raise ValueError(
        f'context {self.config.context!r} needs pipeline.Pipeline'
      )
    most = self.config.num_steps + 1
    if not self.passes:
      fitting = [
        passes
        for passes in range(2, most + 1)
        if -(-most // passes) % self.num_devices == 0
      ]
      if not fitting:
        raise ValueError(
          f"context 'shared' in {self.config.num_steps} steps does not divide "
          f'over {self.num_devices} devices, only over one of '
          f'{_device_counts(most)}'
        )
      # The dataclass is frozen, and this is its only derived field.
      object.__setattr__(self, 'passes', fitting[0])
    if not 2 <= self.passes <= most:
      raise ValueError(f'passes={self.passes} is not in 2..{most}')
    super().__post_init__()

  @property
  def num_stages(self) -> int:
    return -(-(self.config.num_steps + 1) // self.passes)

  @property
  def exit_stage(self) -> int:
    return (self.config.num_steps - 1) // self.passes

  def finish_tick(self, block: int) -> int:
    """The tick, from 0, of the last step of a block."""
    return self.passes * block + self.config.num_steps - 1

  def finish_turn(self, block: int) -> int:
    return block + self.exit_stage

  def blocks_at(self, turn: int) -> list[int]:
    return [turn - stage for stage in range(self.num_stages)]

  def init_state(
    self,
    params: dict,
    text: TextKV,
    initial: jax.Array | None = None,
    origin: int = 0,
  ) -> SharedState:
    sampler = Sampler(self.denoiser, params, text, self.config, origin)
    past = sampler.empty_past()
    if initial is not None:
      past = sampler.anchor(past, initial)
    shape = self.config.block_shape(self.denoiser.config)
    return SharedState(
      turn=jnp.zeros((), jnp.int32),
      inbox=jnp.zeros((self.num_stages, sampler.batch, *shape)),
      pasts=tuple(
        jax.tree.map(
          lambda a: jnp.broadcast_to(a, (self.num_stages, *a.shape)), past
        )
        for _ in range(self.passes)
      ),
    )

  def _run_local(self, params, bank, slots_tL, keys_B, state, stages):
    one_turn = functools.partial(self._turn, params, bank, keys_B, stages)
    return jax.lax.scan(one_turn, state, slots_tL)

  def _turn(self, params, bank, keys_B, stages, state, slots):
    """Every stage takes its block through its passes, all in step.

    A stage works on whatever it holds where it has no block, or no pass: before
    its first block, and in the last stage after the commit. `is_step` keeps
    that out of the pasts; a later stage has no block either.
    """
    num_steps, size = self.config.num_steps, self.passes
    one_pass = functools.partial(self._pass, params, bank, keys_B)
    block = state.turn - stages
    x, pasts = state.inbox, list(state.pasts)
    finished = None

    def is_step(block, step):
      """Does the pass exist, and are its K/V anyone's context?"""
      return (block >= 0) & (step >= 1) & (step <= num_steps)

    for i in range(size):
      step = size * stages + i
      x, kv = jax.vmap(one_pass)(step, slots, block, x, pasts[i])
      live = is_step(block, step)
      if i:
        pasts[i - 1] = pasts[i - 1].write_each(kv, live)
      else:
        # They are due in this turn's last pass of the stage before.
        pasts[-1] = pasts[-1].write_each(
          self._shift(kv, -1), is_step(block - 1, step + size)
        )
      if i == num_steps % size:
        # The commit reads the past of step S - 1, in a copy of its own: the
        # step may live in another stage.
        pasts[i] = pasts[i].write_each(kv, live & (step == num_steps))
      if i == (num_steps - 1) % size:
        exit_stage = self.exit_stage % self.stages_per_device
        finished = x[exit_stage : exit_stage + 1]
    inbox = self._shift(x, 1)
    return SharedState(state.turn + 1, inbox, tuple(pasts)), finished

  def _pass(self, params, bank, keys_B, step, slot, block, x, past):
    """D(block, step), or the commit where step is S: latents and K/V."""
    sampler, noise = self._stage(params, bank, keys_B, slot)
    block = jnp.maximum(block, 0)
    x = jnp.where(step == 0, noise(0, block), x)
    # Idle passes have steps beyond S.
    level = sampler.levels[jnp.minimum(step, self.config.num_steps)]
    level = jnp.where(level == 0, self.config.context_level, level)
    flow, kv = self.denoiser.flow(params, x, level, sampler.text, past=past)
    last = self.config.num_steps - 1
    x, _ = sampler.advance(x, flow, noise, jnp.minimum(step, last), block)
    return x, kv


def _device_counts(num_passes: int) -> list[int]:
  """Numbers of devices over which so many passes a block divide."""
  stages = {-(-num_passes // p) for p in range(2, num_passes + 1)}
  return sorted(
    n for n in range(1, num_passes) if any(s % n == 0 for s in stages)
  )
