"""A stream on one accelerator, pass by pass: one program for all of them.

What comes next is known on the host. So the network is compiled as one pass
over a block and its window, which it writes where it lies (models/window.py),
and no program has branches, loops over stages, or a past to cut out of a stack:
all that would copy keys and values. The price is a few launches a pass, which
a CPU and its small networks would feel.
"""

# B batch, f frames per block, S denoising steps, M prompts in the bank,
# h w latent rows and columns, C channels

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax import rollout
from hiar_jax.denoiser import Denoiser
from hiar_jax.models import window
from hiar_jax.models.transformer import TextKV
from hiar_jax.models.window import Window
from hiar_jax.rollout import RolloutConfig, Sampler
from hiar_jax.sampling.executors import NOTHING


@dataclasses.dataclass
class State:
  """What is held between blocks.

  Attributes:
    windows: one for each step; block-first has one.
    inbox: the block that a step is to denoise next, [B, f, h, w, C]; None
      before its first one.
    hold: the block that it has denoised and is to commit.
    first: position of the first frame of block 0.
    origin: position of the video's first frame.
    kept: the clean latents of the window, the oldest first, [B, F, h, w, C];
      None: none, or other modes than block-first.
    turn: turns done.
  """

  windows: list[Window]
  inbox: list[jax.Array | None]
  hold: list[jax.Array | None]
  first: int
  origin: int
  kept: jax.Array | None = None
  turn: int = 0


def begin(
  denoiser: Denoiser,
  config: RolloutConfig,
  params: dict,
  text: TextKV,
  initial: Any,
  origin: int,
  *,
  num_windows: int,
) -> State:
  """Before the first block.

  Args:
    denoiser: network, of whose layers each has its parameters apart.
    config: how blocks are denoised.
    params: of the network.
    text: the prompts, [N, B, ...].
    initial: clean latents [B, F, h, w, C] that come first, or None.
    origin: position of the first frame.
    num_windows: one for each step, or one.
  """
  sampler = Sampler(denoiser, params, text, config, in_place=True)
  given = 0 if initial is None else initial.shape[1]
  # A bank of this prompt alone.
  bank = jax.tree.map(lambda a: a[None], text)
  passes = Passes(denoiser, config, params, bank, None)
  past = passes.commit_all(
    *(sampler.empty_past(given), initial, origin + np.arange(given), 0)
  )
  # Each has arrays of its own, which its passes write.
  windows = [past, *(_copy(past) for _ in range(num_windows - 1))]
  none: list[jax.Array | None] = [None] * num_windows
  kept = None if num_windows > 1 else _kept(config, initial)
  return State(windows, list(none), list(none), origin + given, origin, kept)


def _kept(config: RolloutConfig, x: jax.Array | None) -> jax.Array | None:
  """Of frames [B, F, h, w, C] those that the past has; None: none."""
  if x is None or not config.past_frames:
    return None
  ring = config.past_frames - config.sink
  rest = x[:, config.sink :]
  return jnp.concatenate(
    [x[:, : config.sink], rest[:, max(rest.shape[1] - ring, 0) :]], 1
  )


_copy = jax.jit(functools.partial(jax.tree.map, jnp.copy))


@functools.partial(jax.jit, static_argnames='denoiser', donate_argnames='past')
def denoise(
  params: dict,
  bank: TextKV,
  slot: jax.Array,
  x: jax.Array,
  level: jax.Array,
  positions_F: jax.Array,
  past: Window,
  *,
  denoiser: Denoiser,
) -> tuple[jax.Array, Window]:
  """D: the flow of a block, and its window, which counts it not yet.

  Args:
    params: of the network.
    bank: prompts, [M, N, B, ...].
    slot: int32 scalar, the one in it that the block has.
    x: the block, [B, f, h, w, C].
    level: float32 scalar, that it is at.
    positions_F: int32, of its frames.
    past: donated.
    denoiser: network.
  """
  flow, written = _flow(
    *(params, bank, slot, x, level, positions_F, past), denoiser
  )
  return flow, past.keep(written)


@functools.partial(jax.jit, static_argnames='denoiser', donate_argnames='past')
def commit(
  params: dict,
  bank: TextKV,
  slot: jax.Array,
  x: jax.Array,
  level: jax.Array,
  positions_F: jax.Array,
  past: Window,
  *,
  denoiser: Denoiser,
) -> Window:
  """C: the window after a block that counts; arguments as in `denoise`.

  The compiler leaves out what comes after the last layer's keys.
  """
  _, written = _flow(
    *(params, bank, slot, x, level, positions_F, past), denoiser
  )
  return past.write(written)


def _flow(params, bank, slot, x, level, positions_F, past, denoiser):
  text = jax.tree.map(lambda a: a[slot], bank)
  return denoiser.flow(
    params, x, level, text, past=past, positions_F=positions_F
  )


@functools.partial(jax.jit, static_argnames='num_frames', donate_argnames='to')
def hand_over(to: Window, source: Window, *, num_frames: int) -> Window:
  """A window after the next block, whose keys lie in another one.

  Args:
    to: donated.
    source: of as many frames, with the next block's keys in it.
    num_frames: of the block.
  """
  ks, vs = [], []
  for i in range(len(to.k)):
    own = source.layer(i, num_frames).own()
    layer = to.layer(i, num_frames).write(own)
    ks.append(layer.k)
    vs.append(layer.v)
  return to.write(window.Written(tuple(ks), tuple(vs), num_frames))


@functools.partial(jax.jit, static_argnames=('denoiser', 'config'))
def first(
  keys_B: jax.Array, block: jax.Array, *, denoiser: Denoiser, config: Any
) -> jax.Array:
  """A block's initial noise, [B, f, h, w, C]."""
  return rollout.named_noise(keys_B, config.block_shape(denoiser.config))(
    0, block
  )


@functools.partial(jax.jit, static_argnames=('denoiser', 'config'))
def advance(
  x: jax.Array,
  flow: jax.Array,
  keys_B: jax.Array,
  step: jax.Array,
  block: jax.Array,
  *,
  denoiser: Denoiser,
  config: RolloutConfig,
) -> tuple[jax.Array, jax.Array]:
  """The block at the next level, and its x0; see `Sampler.advance`."""
  noise = rollout.named_noise(keys_B, config.block_shape(denoiser.config))
  sampler: Any = Sampler(denoiser, {}, None, config)  # type: ignore[arg-type]
  return sampler.advance(x, flow, noise, step, block)


@dataclasses.dataclass(frozen=True)
class Passes:
  """A stream's passes over its windows, in the order of its mode.

  Attributes:
    denoiser: network, of whose layers each has its parameters apart.
    config: how blocks are denoised.
    params: of the network.
    bank: prompts, [M, N, B, ...].
    keys_B: one noise key per sample.
  """

  denoiser: Denoiser
  config: RolloutConfig
  params: dict
  bank: TextKV
  keys_B: Any

  def next_block(
    self, mode: str, state: State, slots_tS: np.ndarray, block: int
  ) -> Any:
    """The next block, [B, f, h, w, C]; `state` is changed.

    Args:
      mode: of the stream.
      state: from `begin`.
      slots_tS: see `serial`.
      block: its name.
    """
    if mode == 'serial':
      return self.serial(state, slots_tS)
    made = self.shared if mode == 'shared' else self.block_first
    return made(state, slots_tS[0, 0], block)

  def serial(self, state: State, slots_tS: np.ndarray) -> jax.Array | None:
    """Turns of `pipeline.Pipeline`, stage after stage; `state` is changed.

    Args:
      state: of a window for each step.
      slots_tS: int32, the prompt of each stage in each of the turns.

    Returns:
      The block that is finished in the last turn.
    """
    sent: jax.Array | None = None
    for slots in slots_tS:
      sent = self._tick(state, slots)
    return sent

  def _tick(self, state: State, slots: np.ndarray) -> jax.Array | None:
    inbox, sent = list(state.inbox), None
    for step in range(self.config.num_steps):
      age = state.turn - step
      if age < 0:
        break  # It has no block yet, nor have those after it.
      if slots[step] == NOTHING:
        continue
      block, is_commit = divmod(age, 2)
      at, past = self._at(state, block), state.windows[step]
      if is_commit:
        level = self._context_level(step + 1)
        state.windows[step] = self._commit(
          state.hold[step], level, at, past, slots[step]
        )
        continue
      x = state.inbox[step] if step else self._first(block)
      sent, x0, state.windows[step] = self._denoise(
        x, step, block, at, past, slots[step]
      )
      state.hold[step] = x0 if self.config.context == 'clean' else sent
      if step + 1 < len(inbox):
        inbox[step + 1] = sent
    state.inbox, state.turn = inbox, state.turn + 1
    return sent

  def shared(self, state: State, slot: Any, block: int) -> jax.Array:
    """The next block by `rollout.shared_block`; `state` is changed.

    The keys of a step's pass are the context of the step before.
    """
    x, at, windows = self._first(block), self._at(state, block), state.windows
    for step in range(self.config.num_steps):
      x, _, windows[step] = self._denoise(
        x, step, block, at, windows[step], slot
      )
      if step:
        windows[step - 1] = hand_over(
          windows[step - 1],
          windows[step],
          num_frames=self.config.frames_per_block,
        )
    level = self.config.context_level
    windows[-1] = self._commit(x, level, at, windows[-1], slot)
    return x

  def block_first(self, state: State, slot: Any, block: int) -> jax.Array:
    """The next block by `rollout.block_first`; `state` is changed."""
    x = self.denoise_block(state, slot, block)
    self.commit_block(state, x, slot, block)
    return x

  def denoise_block(self, state: State, slot: Any, block: int) -> jax.Array:
    """All steps of the next block of `block_first`, not yet committed."""
    config = self.config.of_block(block)
    own = dataclasses.replace(self, config=config)
    x, at, past = self._first(block), self._at(state, block), state.windows[0]
    for step in range(config.num_steps):
      x, _, past = own._denoise(x, step, block, at, past, slot)
    state.windows[0] = past
    return x

  def commit_block(
    self, state: State, x: jax.Array, slot: Any, block: int
  ) -> None:
    """Has a block of `denoise_block` count."""
    at, past = self._at(state, block), state.windows[0]
    level = self.config.context_level
    state.windows[0] = self._commit(x, level, at, past, slot)
    kept = x if state.kept is None else jnp.concatenate([state.kept, x], 1)
    state.kept = _kept(self.config, kept)

  def recache(self, state: State, slot: Any, block: int) -> None:
    """`block_stream.recache`, before the next block; `state` is changed."""
    if state.kept is None:
      return
    count = state.kept.shape[1]
    own, before = np.arange(count), self._at(state, block)[0]
    positions = before - count + own
    if self.config.positions == 'absolute':
      positions = np.where(
        own < self.config.sink, state.origin + own, positions
      )
    past = dataclasses.replace(state.windows[0], frames=jnp.int32(0))
    state.windows[0] = self.commit_all(past, state.kept, positions, slot)

  def commit_all(
    self, past: Window, x: Any, positions: np.ndarray, slot: Any
  ) -> Window:
    """The window after clean frames, committed block by block.

    Args:
      past: what came before; donated.
      x: [B, F, h, w, C] or None; a first block that is shorter comes first.
      positions: of the frames.
      slot: the prompt.
    """
    start, size = 0, self.config.frames_per_block
    while start < len(positions):
      end = start + ((len(positions) - start) % size or size)
      past = self._commit(
        x[:, start:end],
        self.config.context_level,
        np.int32(positions[start:end]),
        *(past, slot),
      )
      start = end
    return past

  def _at(self, state: State, block: int) -> np.ndarray:
    """Positions of a block's frames."""
    size = self.config.frames_per_block
    return state.first + size * block + np.arange(size, dtype=np.int32)

  def _context_level(self, step: int) -> float:
    """At which a block is committed, as the network is told it."""
    level = self.config.levels[step]
    if self.config.context == 'clean' or not level:
      return self.config.context_level
    return level

  def _first(self, block: int) -> jax.Array:
    return first(
      *(self.keys_B, np.int32(block)),
      denoiser=self.denoiser,
      config=self.config,
    )

  def _denoise(
    self, x: Any, step: int, block: int, at: Any, past: Window, slot: Any
  ) -> tuple[jax.Array, jax.Array, Window]:
    level = np.float32(self.config.levels[step])
    flow, past = denoise(
      *(self.params, self.bank, np.int32(slot), x, level, at, past),
      denoiser=self.denoiser,
    )
    x, x0 = advance(
      *(x, flow, self.keys_B, np.int32(step), np.int32(block)),
      denoiser=self.denoiser,
      config=self.config,
    )
    return x, x0, past

  def _commit(
    self, x: Any, level: float, at: Any, past: Window, slot: Any
  ) -> Window:
    return commit(
      *(self.params, self.bank, np.int32(slot), x, np.float32(level), at, past),
      denoiser=self.denoiser,
    )
