"""Videos without end: finished blocks one after the other, memory constant.

A stream holds its stages' pasts on the device and makes one block a step of
the iterator: two ticks of the pipeline, or the S + 1 passes of a block with
shared context or block-first. The next block is under way while the caller
looks at the last one. Prompts may change at any block; a block keeps its prompt
through all its steps.

Over the devices of several processes every process runs the same stream: it
asks for the same blocks, sends the same prompts, and gets all frames.
"""

# B batch, f frames per block, S stages, M prompts in the bank, H W pixels

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from hiar_jax import rollout
from hiar_jax.codecs import linear
from hiar_jax.models.transformer import TextKV
from hiar_jax.sampling import block_stream, decoding, executors, meshes, passes
from hiar_jax.sampling.engines import MODES as MODES
from hiar_jax.sampling.engines import Engine as Engine


class Stream:
  """A video as an iterator of blocks, endless if no number of them is given.

  Each item is uint8 [B, F, H, W, 3], the frames of one block. `close` it, leave
  its `with` block, or drop it, to free what it holds.

  Attributes:
    num_blocks: after which it ends, or None.
    given: uint8 [B, F, H, W, 3], the frames that the video goes on from, as
      the codec sees them; None if it begins with its first block. They are no
      item of the stream.
    reason: of the engine's mode, for people.
    ahead: blocks that are begun before they are asked for. 1: a block's copy
      to the host hides behind the next one. 0: a prompt shows a block sooner.
    prompts: that are sent, the last ones.
    fps: frames a second, or None.

  One thread may ask for blocks while another sends prompts.
  """

  def __init__(
    self,
    engine: Engine,
    params: dict,
    codec: linear.LinearCodec,
    encode_text: Callable[[list[str]], np.ndarray],
    prompts: list[str],
    keys_B: jax.Array,
    *,
    initial: np.ndarray | None = None,
    origin: int = 0,
    reason: str = 'as asked for',
    fps: float | None = None,
    num_blocks: int | None = None,
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
      reason: of the engine's mode, for people.
      fps: frames a second, for `show`.
      num_blocks: after which it ends: no stage works for what comes after.
        None: it has no end.

    Raises:
      ValueError: if it would have no block.
    """
    if num_blocks is not None and num_blocks < 1:
      raise ValueError(f'num_blocks={num_blocks} must be at least 1, or None')
    self.reason, self.fps, self.prompts = reason, fps, list(prompts)
    self.num_blocks = num_blocks
    self._lock = threading.Lock()
    self.ahead = 1
    self._closed = False
    self._engine, self._codec = engine, codec
    params = meshes.put_params(engine.denoiser, params, engine.mesh)
    self._params: Any = params
    self._encode_text, self._keys = encode_text, engine.place(keys_B)
    # Not under the mesh: an encoder has a device of its own.
    states = encode_text(prompts)
    with meshes.under(engine.mesh):
      text = project(params, states, denoiser=engine.denoiser)
      self._bank: Any = new_bank(text, size=engine.bank_size)
    # Which slot of the bank serves from which block on, oldest first.
    self._slots = [(0, 0)]
    self._coming: dict[int, tuple[np.ndarray, bool]] = {}
    self._state: Any
    if engine.by_pass:
      self._state = passes.begin(
        *(engine.denoiser, engine.config, params, text, initial, origin),
        num_windows=engine.num_pasts,
      )
    else:
      with meshes.under(engine.mesh):
        self._state = begin(params, text, initial, origin, engine=engine)
    self._decoder: Any
    self.given, self._decoder = None, codec.init_decode_state(len(prompts))
    if initial is not None:
      if engine.mesh is not None:  # Where the blocks will be decoded.
        initial = jax.device_put(initial, engine.mesh.local_devices[0])
      self.given, self._decoder = decoding.decode_blocks(
        codec, initial, engine.config.frames_per_block
      )
    self._frames = 0 if initial is None else initial.shape[1]
    # Blocks that have left, and blocks that the first stage has begun.
    self._block = self._begun = 0
    self._ready: list[jax.Array] = []

  @property
  def engine(self) -> Engine:
    """Its programs; `turns` tells which squares of the grid a block takes."""
    return self._engine

  @property
  def mode(self) -> str:
    return self._engine.mode

  @property
  def next_block(self) -> int:
    """The next block to start; a prompt sent now shows from it on."""
    return self._begun

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *unused_error: Any) -> None:
    self.close()

  def close(self) -> None:
    """Ends the stream: its caches are freed, and no block comes any more."""
    with self._lock:
      self._closed = True
      self._ready.clear()
      self._coming.clear()
      self._state = self._decoder = self._bank = self._params = None

  def __iter__(self) -> Iterator[np.ndarray]:
    return self

  def __next__(self) -> np.ndarray:
    with self._lock:
      if self._closed:
        raise StopIteration
      while len(self._ready) < 1 + self.ahead and not self._is_over:
        self._ready.append(self._start_block())
      if not self._ready:
        raise StopIteration
      block = self._ready.pop(0)
    # A prompt is not held up by the work that is under way.
    return np.asarray(block)

  def show(self, **options: Any) -> Any:
    """Plays the stream in a notebook's cell; see `preview.Preview`."""
    from hiar_jax.sampling import preview  # Pictures and threads: not all want.

    return preview.Preview(self, **options)

  def send(
    self,
    prompts: str | Sequence[str],
    *,
    at: int | None = None,
    recache: bool = False,
  ) -> int:
    """Changes the prompt; nothing before the named block changes.

    Blocks under way keep theirs: `ahead` are made before they are asked for,
    and every stage has begun one, so that the returned block may be some blocks
    after the last.

    Args:
      prompts: one for all samples, or one per sample.
      at: the block from which it shows; None: as soon as possible.
      recache: with mode 'block_first', compute the keys of the window anew for
        the prompt, see `block_stream.recache`; else the past stays as it was
        made. The prompt shows sooner, and LongLive was trained so.

    Returns:
      That block.

    Raises:
      ValueError: if the stream is closed, the block has been started or comes
        after the last, a prompt is empty or no text, their number is not that
        of the samples, or the mode has no `recache`.
    """
    if self._closed:
      raise ValueError('the stream is closed')
    if recache and self.mode != 'block_first':
      raise ValueError(
        f"recache goes with mode 'block_first', not with {self.mode!r}, whose "
        'pasts are of frames at other levels'
      )
    batch = self._keys.shape[0]
    prompts = [prompts] * batch if isinstance(prompts, str) else list(prompts)
    if len(prompts) != batch:
      raise ValueError(f'{len(prompts)} prompts for {batch} samples')
    check_prompts(prompts)
    states = self._encode_text(prompts)
    with self._lock:
      at = self._begun if at is None else at
      if at < self._begun:
        raise ValueError(
          f'block {at} has been started; the next to start is {self._begun}'
        )
      if self.num_blocks is not None and at >= self.num_blocks:
        raise ValueError(
          f'block {at} comes after the last, which is {self.num_blocks - 1}'
        )
      self._coming[at] = states, recache
      self.prompts = prompts
    return at

  def _change_prompt(
    self, block: int, states: np.ndarray, recache: bool
  ) -> None:
    """Gives a block that starts now, and those after it, other prompts."""
    slot = (self._slots[-1][1] + 1) % self._engine.bank_size
    self._slots = self._slots[1 - self._engine.bank_size :]
    self._slots.append((block, slot))
    text = project(self._params, states, denoiser=self._engine.denoiser)
    self._bank = _set_prompt(self._bank, text, np.int32(slot))
    if recache and self._engine.by_pass:
      self._passes.recache(self._state, slot, block)
    elif recache and self._kept_frames:
      self._state = block_stream.recache(
        *(self._params, text, self._state, np.int32(self._kept_frames)),
        alone=block_stream.recached_alone(self._kept_frames, self._engine),
        engine=self._engine,
      )

  @property
  def _passes(self) -> passes.Passes:
    engine = self._engine
    return passes.Passes(
      *(engine.denoiser, engine.config, self._params, self._bank, self._keys)
    )

  @property
  def _is_over(self) -> bool:
    return self.num_blocks is not None and self._block >= self.num_blocks

  @property
  def _kept_frames(self) -> int:
    return min(self._frames, self._engine.config.past_frames)

  def compile_recache(self) -> None:
    """Makes ready what the first `send(..., recache=True)` would wait for.

    In mode 'block_first'; elsewhere there is nothing to do. Blocks may be asked
    for meanwhile, in another thread: for a while the past is there twice.
    """
    slots = self._engine.config.past_frames
    if self.mode != 'block_first' or not slots or self._engine.by_pass:
      return  # Passes are the same for it.
    # Of frames that do not fill the window, and of those that do.
    for count in {self._kept_frames, slots}:
      states = self._encode_text(self.prompts)
      with self._lock:
        if self._closed:
          return
        params, state = self._params, jax.tree.map(jnp.copy, self._state)
      with meshes.under(self._engine.mesh):
        text = project(params, states, denoiser=self._engine.denoiser)
        done = block_stream.recache(
          *(params, text, state, np.int32(count)),
          alone=block_stream.recached_alone(count, self._engine),
          engine=self._engine,
        )
      jax.block_until_ready(done)

  def _slot(self, block: int) -> int:
    """Slot of the prompt that serves a block."""
    return [s for first, s in self._slots if first <= max(block, 0)][-1]

  def _start_block(self) -> jax.Array:
    """Dispatches what the next block still needs; its frames to come."""
    with meshes.under(self._engine.mesh):
      latents = self._next_latents()
    frames, self._decoder = decoding.decode_block(
      self._codec, self._decoder, latents
    )
    return frames

  def _next_latents(self) -> jax.Array:
    engine = self._engine
    turns = engine.turns(self._block)
    # Where there are stages, later blocks begin before this one leaves.
    for block in range(self._begun, turns[-1][0] + 1):
      if block in self._coming:
        self._change_prompt(block, *self._coming.pop(block))
    self._begun = turns[-1][0] + 1
    slots_tS = np.array(
      [[self._slot(block) for block in stages] for stages in turns], np.int32
    )
    if self.num_blocks is not None:
      slots_tS[~engine.wanted(self._block, self.num_blocks)] = executors.NOTHING
    arguments = (self._params, self._bank, slots_tS)
    if engine.by_pass:
      latents = self._passes.next_block(
        engine.mode, self._state, slots_tS, self._block
      )
    elif engine.mode == 'block_first':
      self._state, latents = block_stream.run_block(
        *(*arguments, self._keys, self._state, np.int32(self._block)),
        engine=engine,
        is_first=not self._block and bool(engine.config.first_levels),
      )
    elif engine.stages is None:
      self._state, latents = run_shared_block(
        *arguments,
        self._keys,
        self._state,
        np.int32(self._block),
        engine=engine,
      )
    else:
      self._state, latents = run_turns(
        *arguments, self._keys, self._state, engine=engine
      )
    self._block += 1
    self._frames += engine.config.frames_per_block
    # Where there is a mesh all its devices have them; one is enough to decode.
    return latents.addressable_data(0)


def check_prompts(prompts: Sequence[str]) -> None:
  """Raises ValueError unless there are prompts and none of them is empty."""
  if not len(prompts):
    raise ValueError('there is no prompt')
  for prompt in prompts:
    if not isinstance(prompt, str) or not prompt.strip():
      raise ValueError(f'prompt {prompt!r} is not a text')


@functools.partial(jax.jit, static_argnames='denoiser')
def project(params: Any, states: Any, *, denoiser: Any) -> TextKV:
  """Text states [B, L, D] as the keys and values of a network."""
  return denoiser.project_text(params, states)


@functools.partial(jax.jit, static_argnames='size')
def new_bank(text: Any, *, size: int) -> Any:
  """A bank that has the same prompts in every slot."""
  return jax.tree.map(lambda a: jnp.stack([a] * size), text)


@functools.partial(jax.jit, donate_argnums=0)
def _set_prompt(bank, text, slot):
  return jax.tree.map(lambda b, t: b.at[slot].set(t), bank, text)


@functools.partial(jax.jit, static_argnames='engine')
def begin(
  params: Any, text: Any, initial: Any, origin: Any, *, engine: Any
) -> Any:
  """The state before the first block, given latents behind it."""
  stages = engine.stages
  if engine.mode == 'block_first':
    state = block_stream.begin(engine.sampler(params, text, origin), initial)
    return meshes.lay_out(state, engine.mesh)
  if stages is None:
    return rollout.stacked_pasts(engine.sampler(params, text, origin), initial)
  state = stages.init_state(params, text, initial, origin)
  return meshes.lay_out(state, engine.mesh, stages.state_specs(state))


@functools.partial(jax.jit, static_argnames='engine', donate_argnames='state')
def run_turns(
  params: Any, bank: Any, slots_tS: Any, keys_B: Any, state: Any, *, engine: Any
) -> tuple[Any, jax.Array]:
  """The turns of `Engine.turns`: the next state and the finished latents."""
  stages = engine.stages
  state, sent = stages.run(params, bank, slots_tS, keys_B, state)
  state = meshes.lay_out(state, engine.mesh, stages.state_specs(state))
  latents = stages.finished(sent, -1)
  if engine.mesh is not None:
    latents = _constrain(latents, engine.mesh, PartitionSpec())
  return state, latents


def _constrain(array, mesh, spec):
  return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec))


@functools.partial(jax.jit, static_argnames='engine', donate_argnames='pasts')
def run_shared_block(
  params: Any,
  bank: Any,
  slots_tS: Any,
  keys_B: Any,
  pasts: Any,
  block: Any,
  *,
  engine: Any,
) -> tuple[Any, jax.Array]:
  """`run_turns` for shared context on one device, where pasts are the state."""
  text = jax.tree.map(lambda a: a[slots_tS[0, 0]], bank)
  noise = rollout.named_noise(
    keys_B, engine.config.block_shape(engine.denoiser.config)
  )
  sampler = engine.sampler(params, text)
  x, pasts, _ = rollout.shared_block(sampler, noise, pasts, block)
  return pasts, x
