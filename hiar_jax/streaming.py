"""Videos without end: finished blocks one after the other, memory constant.

A stream holds its stages' pasts on the device and makes one block a step of
the iterator: two ticks of the pipeline, or the S + 1 passes of a block with
shared context. The next block is under way while the caller looks at the last
one. Prompts may change at any block; a block keeps its prompt through all its
steps.
"""

# B batch, f frames per block, S stages, M prompts in the bank, H W pixels

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax import codecs, pipeline, rollout
from hiar_jax.denoiser import Denoiser
from hiar_jax.models.transformer import TextKV

MODES = ('batched', 'serial', 'shared')


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
      its own in S + 1 passes a block instead of 2S.
    mesh: runs the stages on the devices of its axis `stage`; None: one device.

  Raises:
    ValueError: if mode, context and mesh do not go together.
  """

  denoiser: Denoiser
  config: rollout.RolloutConfig
  mode: str = 'batched'
  mesh: Any = None

  def __post_init__(self):
    if self.mode not in MODES:
      raise ValueError(f'stream mode {self.mode!r} is not one of {MODES}')
    if (self.mode == 'shared') != (self.config.context == 'shared'):
      raise ValueError(
        f'stream mode {self.mode!r} does not go with context '
        f'{self.config.context!r}: both or neither must be shared'
      )
    if self.mode == 'shared' and self.mesh is not None:
      raise ValueError("stream mode 'shared' runs on one device, without mesh")
    if self.mode != 'shared':
      _ = self.stages  # Its own checks: the mesh.

  @property
  def stages(self) -> pipeline.Pipeline:
    return pipeline.Pipeline(
      self.denoiser,
      self.config,
      batched=self.mode == 'batched',
      mesh=self.mesh,
    )

  @property
  def bank_size(self) -> int:
    """Prompts that may be in flight: one for each block that is."""
    return self.config.num_steps // 2 + 2

  def sampler(self, params, text, origin=0) -> rollout.Sampler:
    return rollout.Sampler(self.denoiser, params, text, self.config, origin)


class Stream:
  """An endless video as an iterator of blocks.

  Each item is uint8 [B, F, H, W, 3], the frames of one block. Stop by dropping
  it.
  """

  def __init__(
    self,
    engine: Engine,
    params: dict,
    codec: codecs.LinearCodec,
    encode_text: Callable[[list[str]], np.ndarray],
    prompts: list[str],
    keys_B: jax.Array,
    *,
    initial: np.ndarray | None = None,
    origin: int = 0,
  ):
    """Prepares a stream; the first `next` compiles.

    Args:
      engine: its programs.
      params: of the network.
      codec: latents to frames.
      encode_text: prompts to text states [B, L, D].
      prompts: one per sample.
      keys_B: noise keys, see `rollout.named_noise`.
      initial: latents [B, F, h, w, C] that the video goes on from.
      origin: position of the first frame, for tests of shift invariance.
    """
    self._engine, self._params, self._codec = engine, params, codec
    self._encode_text, self._keys = encode_text, keys_B
    text = _project(params, encode_text(prompts), denoiser=engine.denoiser)
    self._bank = _new_bank(text, size=engine.bank_size)
    # Which slot of the bank serves from which block on, oldest first.
    self._slots = [(0, 0)]
    self._coming: dict[int, np.ndarray] = {}
    self._state = _begin(params, text, initial, origin, engine=engine)
    self._decoder = codec.init_decode_state(len(prompts))
    self._block = 0
    self._ready: list[jax.Array] = []

  @property
  def mode(self) -> str:
    return self._engine.mode

  @property
  def next_block(self) -> int:
    """The next block to start; a prompt sent now shows from it on."""
    return self._block

  def __iter__(self) -> Iterator[np.ndarray]:
    return self

  def __next__(self) -> np.ndarray:
    # One block ahead: this one's copy to the host hides behind the next.
    while len(self._ready) < 2:
      self._ready.append(self._start_block())
    return np.asarray(self._ready.pop(0))

  def send(self, prompts: str | Sequence[str], *, at: int | None = None) -> int:
    """Changes the prompt; nothing before the named block changes.

    Args:
      prompts: one for all samples, or one per sample.
      at: the block from which it shows; None: as soon as possible.

    Returns:
      That block.

    Raises:
      ValueError: if the block has been started, or the number of prompts is
        not that of the samples.
    """
    batch = self._keys.shape[0]
    prompts = [prompts] * batch if isinstance(prompts, str) else list(prompts)
    if len(prompts) != batch:
      raise ValueError(f'{len(prompts)} prompts for {batch} samples')
    at = self._block if at is None else at
    if at < self._block:
      raise ValueError(
        f'block {at} has been started; the next to start is {self._block}'
      )
    self._coming[at] = self._encode_text(prompts)
    return at

  def _change_prompt(self, states: np.ndarray) -> None:
    """Gives the block that starts now, and those after it, other prompts."""
    slot = (self._slots[-1][1] + 1) % self._engine.bank_size
    self._slots = self._slots[1 - self._engine.bank_size :]
    self._slots.append((self._block, slot))
    text = _project(self._params, states, denoiser=self._engine.denoiser)
    self._bank = _set_prompt(self._bank, text, np.int32(slot))

  def _slot(self, block: int) -> int:
    """Slot of the prompt that serves a block."""
    return [s for first, s in self._slots if first <= max(block, 0)][-1]

  def _start_block(self) -> jax.Array:
    """Dispatches what the next block still needs; its frames to come."""
    engine, block = self._engine, self._block
    if block in self._coming:
      self._change_prompt(self._coming.pop(block))
    if engine.mode == 'shared':
      # One block is in flight at a time.
      self._state, latents = _shared_block(
        self._params,
        self._bank,
        np.int32(self._slot(block)),
        self._keys,
        self._state,
        np.int32(block),
        engine=engine,
      )
    else:
      stages = engine.stages
      last = stages.finish_tick(block)
      first = stages.finish_tick(block - 1) + 1 if block else 0
      num_steps = engine.config.num_steps
      slots = [
        [self._slot((tick - stage) // 2) for stage in range(num_steps)]
        for tick in range(first, last + 1)
      ]
      self._state, latents = _ticks(
        self._params,
        self._bank,
        np.array(slots, np.int32),
        self._keys,
        self._state,
        engine=engine,
      )
    self._block += 1
    frames, self._decoder = _decode(self._codec, self._decoder, latents)
    return frames


@functools.partial(jax.jit, static_argnames='denoiser')
def _project(params, states, *, denoiser) -> TextKV:
  return denoiser.project_text(params, states)


@functools.partial(jax.jit, static_argnames='size')
def _new_bank(text, *, size):
  return jax.tree.map(lambda a: jnp.stack([a] * size), text)


@functools.partial(jax.jit, donate_argnums=0)
def _set_prompt(bank, text, slot):
  return jax.tree.map(lambda b, t: b.at[slot].set(t), bank, text)


@functools.partial(jax.jit, static_argnames='engine')
def _begin(params, text, initial, origin, *, engine):
  if engine.mode == 'shared':
    return rollout.stacked_pasts(engine.sampler(params, text, origin), initial)
  return engine.stages.init_state(params, text, initial, origin)


@functools.partial(jax.jit, static_argnames='engine', donate_argnames='state')
def _ticks(params, bank, slots_tS, keys_B, state, *, engine):
  state, sent = engine.stages.run(params, bank, slots_tS, keys_B, state)
  return state, sent[-1, -1]


@functools.partial(jax.jit, static_argnames='engine', donate_argnames='pasts')
def _shared_block(params, bank, slot, keys_B, pasts, block, *, engine):
  text = jax.tree.map(lambda a: a[slot], bank)
  noise = rollout.named_noise(
    keys_B, engine.config.block_shape(engine.denoiser.config)
  )
  sampler = engine.sampler(params, text)
  x, pasts, _ = rollout.shared_block(sampler, noise, pasts, block)
  return pasts, x


@jax.jit
def _decode(codec, state, latents):
  frames, state = codec.decode_stream(state, latents)
  return codecs.float_to_pixels(frames), state
