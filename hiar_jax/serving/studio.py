"""What makes the videos of a server: one pipeline, and its streams."""

# F frames, H W height and width

import collections
import dataclasses
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np

from hiar_jax.sampling import meshes, modes, seeds, streaming, together
from hiar_jax.sampling.video_pipeline import VideoPipeline

_KEPT_TEXTS = 256
# Of a device's memory; the decoder has its own, and XLA.
_USABLE = 0.8
_MOST_PLACES = 256


class Studio:
  """A pipeline as a server needs it.

  Attributes:
    pipeline: it makes the videos.
    mode: of streams that ask for none.
    reason: of the mode, for people.
    modes: that may be asked for.
    places: sessions at a time.
  """

  def __init__(
    self,
    pipeline: VideoPipeline,
    *,
    mode: str = modes.AUTO,
    share_batch: bool | None = None,
    places: int = 4,
  ):
    """Chooses the mode; nothing is compiled yet.

    Args:
      pipeline: it makes the videos.
      mode: see `VideoPipeline.stream`.
      share_batch: make the blocks of all sessions as one batch, where the mode
        is 'batched' on one device; None: on accelerators. A CPU is as fast
        without, and has less to compile.
      places: sessions at a time; fewer where the device has no room for them.

    Raises:
      ValueError: if the mode does not go with the pipeline or the mesh, or the
        device has no room.
    """
    self._texts = _EncodedOnce(pipeline.encoder)
    self.pipeline = dataclasses.replace(pipeline, encoder=self._texts)
    self._mesh = mesh = pipeline.mesh
    self.reason = 'as asked for'
    if mode == modes.AUTO:
      mode, self.reason = modes.choose_mode(
        *(pipeline.denoiser, pipeline.rollout, pipeline.params, 1, mesh),
        order=pipeline.order,
      )
    self.mode = mode
    self.modes = tuple(filter(self._fits, streaming.MODES))
    engine = self._engine(mode)
    can = mode == 'batched' and mesh is None
    if share_batch and not can:
      raise ValueError(
        f"a batch of sessions goes with mode 'batched' on one device, not with "
        f'{mode!r}' + (' on a mesh' if mesh is not None else '')
      )
    if share_batch is None:
      share_batch = can and jax.local_devices()[0].platform != 'cpu'
    if not share_batch:
      engine = modes.on_device(engine, pipeline.params, 1)
    self.places = min(places, _room(engine, pipeline.params, share_batch))
    # Once: every stream would lay the weights out for itself.
    params = meshes.put_params(engine.denoiser, pipeline.params, mesh)
    self.pipeline = dataclasses.replace(
      self.pipeline, params=params, denoiser=engine.denoiser
    )
    self._row = None
    self._compiled: set[str] = set()
    # Numbers of given frames after which recaching is compiled.
    self._recached: set[int] = set()
    if share_batch:
      self._row = together.Together(
        *(engine, params, pipeline.codec, self._texts.encode),
        places=self.places,
      )

  def notes(self, prompt: str) -> list[str]:
    """What a prompt asks for in vain, a sentence each."""
    tells = getattr(self.pipeline.encoder, 'notes', None)
    return [] if tells is None else list(tells(prompt))

  def examples(self) -> tuple[str, ...]:
    """Prompts that the pipeline follows, if it knows some."""
    tells = getattr(self.pipeline.encoder, 'examples', None)
    return () if tells is None else tuple(tells())

  def _fits(self, mode: str) -> bool:
    """Whether streams of the pipeline may run in a mode."""
    try:
      self._engine(mode)
    except ValueError:
      return False
    return True

  def _engine(self, mode: str) -> streaming.Engine:
    config = self.pipeline.rollout
    if mode == 'shared':
      config = dataclasses.replace(config, context='shared')
    return streaming.Engine(self.pipeline.denoiser, config, mode, self._mesh)

  def encode(self, prompt: str) -> None:
    """Encodes a prompt, so that later it need not be waited for."""
    self._texts.encode([prompt])

  def open(
    self,
    prompt: str,
    *,
    seed: int,
    mode: str | None = None,
    initial_frames: np.ndarray | None = None,
  ) -> 'Making':
    """Prepares a video, compiling what it needs.

    Its first block is made with it, unless it goes into a row.

    Raises:
      ValueError: naming the value that does not fit.
    """
    mode = mode or self.mode
    if self._row is not None and mode == self.mode:
      return self._open_together(prompt, seed, initial_frames)
    if mode not in self._compiled:
      # Here, where nobody waits: the maker's thread has blocks to make.
      self._compile(prompt, mode)
    making = self._open_alone(prompt, seed, mode, initial_frames)
    if initial_frames is not None and len(initial_frames) not in self._recached:
      making.compile_recache()
      self._recached.add(len(initial_frames))
    return making

  def step(self, makings: Sequence['Making']) -> list[np.ndarray | None]:
    """The next block of some videos: one, or several of one row.

    Returns:
      For each uint8 [F, H, W, 3], or None while the first is on its way, or if
      it failed: the `error` of a video in a row. Look at all of the row.
    """
    first = makings[0]
    if isinstance(first, InRow):
      return first.row.step([m.member for m in makings if isinstance(m, InRow)])
    return [making.next() for making in makings]

  def warm_up(self, prompt: str) -> None:
    """Compiles what sessions of the usual mode need, with videos of a prompt.

    Before there are any: it steps and leaves as the maker's thread does.
    """
    self.encode(prompt)
    if self._row is None:
      self._compile(prompt, self.mode)
      return
    makings: list[Making] = []
    for seed in range(self.places):
      makings.append(self._open_together(prompt, seed, None))
      makings[-1].begin()
      for _ in range(self._some_blocks):
        self.step(makings)
    makings[0].send(prompt)
    for _ in range(self._some_blocks):
      self.step(makings)
    for making in makings:
      making.close()

  @property
  def _some_blocks(self) -> int:
    """The first ones, those after them, and those after a change of prompt."""
    return self.pipeline.rollout.num_steps + 2

  def _compile(self, prompt: str, mode: str) -> None:
    making = self._open_alone(prompt, 0, mode, None)
    making.next()
    making.send(prompt)
    for _ in range(self._some_blocks):
      making.next()
    making.compile_recache()
    making.close()
    self._compiled.add(mode)

  def _open_alone(
    self, prompt: str, seed: int, mode: str, initial_frames: np.ndarray | None
  ) -> 'OwnStream':
    return OwnStream(
      self.pipeline.stream(
        prompt,
        seed=seed,
        mode=mode,
        initial_frames=initial_frames,
      )
    )

  def _open_together(
    self, prompt: str, seed: int, initial_frames: np.ndarray | None
  ) -> 'InRow':
    assert self._row is not None
    streaming.check_prompts([prompt])
    initial = None
    if initial_frames is not None:
      initial = self.pipeline.encode(initial_frames)
    (key,) = seeds.keys(seeds.of_videos(seed, 1))
    return InRow(self._row, self._row.prepare(prompt, key, initial))


def _room(engine: streaming.Engine, params: dict, as_batch: bool) -> int:
  """Videos whose caches fit beside the weights."""
  device = jax.local_devices()[0]
  if engine.mesh is not None:
    device = engine.mesh.local_devices[0]
  room = _USABLE * modes.device_memory(device)

  def need(count: int) -> float:
    one = modes.estimate_memory(engine, params, count if as_batch else 1)
    # A row that grows is there twice for a moment.
    return one.total + (one.caches if as_batch else (count - 1) * one.caches)

  count = 1
  while need(count + 1) <= room and count < _MOST_PLACES:
    count += 1
  return count


class Making(Protocol):
  """One video that is being made, by the maker's thread alone.

  Attributes:
    mode: of its stream.
    given: uint8 [F, H, W, 3], the frames that it goes on from, or None.
    first: uint8 [F, H, W, 3], its first block, if it is there already.
    row: of the videos that are made as one batch with it; None: none are.
    error: that ended it within its row, or None.
    restarts: how often its row was begun anew because of another's error.
  """

  mode: str
  given: np.ndarray | None
  first: np.ndarray | None
  row: Any

  @property
  def error(self) -> Exception | None: ...

  @property
  def restarts(self) -> int: ...

  def begin(self) -> None:
    """Takes its place."""

  def next(self) -> np.ndarray:
    """The next block, uint8 [F, H, W, 3], if it is in no row."""

  def send(self, prompt: str, recache: bool = False) -> int:
    """Changes the prompt; the block from which it shows."""

  def turns(self, block: int) -> dict[str, Any]:
    """See `squares`."""

  def close(self) -> None:
    """Frees what the video holds on the device."""


class OwnStream:
  """A `Making` that is a stream of its own."""

  row: Any = None
  error: Exception | None = None
  restarts: int = 0

  def __init__(self, stream: streaming.Stream):
    """Makes the first block of a stream of one video."""
    self._stream = stream
    # A server makes the blocks in time itself, and its prompts are awaited.
    stream.ahead = 0
    self.mode = stream.mode
    self.given = None if stream.given is None else np.asarray(stream.given)[0]
    self.first: np.ndarray | None = self.next()

  def begin(self) -> None:
    """See `Making`."""

  def next(self) -> np.ndarray:
    """The next block, uint8 [F, H, W, 3]."""
    return next(self._stream)[0]

  def send(self, prompt: str, recache: bool = False) -> int:
    """See `Making`."""
    return self._stream.send(prompt, recache=recache)

  def compile_recache(self) -> None:
    """See `streaming.Stream`."""
    self._stream.compile_recache()

  def turns(self, block: int) -> dict[str, Any]:
    """See `Making`."""
    return squares(self._stream.engine, block)

  def close(self) -> None:
    """See `Making`."""
    self._stream.close()


class InRow:
  """A `Making` that is one of several made as one batch.

  Attributes:
    member: of the row.
  """

  def __init__(self, row: together.Together, member: together.Member):
    self.row, self.member = row, member
    self.mode, self.given = row.engine.mode, member.given
    self.first: np.ndarray | None = None

  @property
  def error(self) -> Exception | None:
    """See `Making`."""
    return self.member.error

  @property
  def restarts(self) -> int:
    """See `Making`."""
    return self.member.restarts

  def begin(self) -> None:
    """See `Making`."""
    self.row.join(self.member)

  def next(self) -> np.ndarray:
    """See `Making`."""
    raise AssertionError('a video of a row gets on by a step of the row')

  def send(self, prompt: str, recache: bool = False) -> int:
    """See `Making`."""
    if recache:
      raise ValueError(f"recache goes with mode 'block_first', not {self.mode}")
    return self.row.send(self.member, prompt)

  def turns(self, block: int) -> dict[str, Any]:
    """See `Making`."""
    return squares(self.row.engine, block)

  def close(self) -> None:
    """See `Making`."""
    self.row.leave(self.member)


def squares(engine: streaming.Engine, block: int) -> dict[str, Any]:
  """The squares of the grid that were worked on to finish a block.

  Returns:
    `turns`: for each turn the block of every stage, from the noisiest on,
    negative where it has none; `steps`: the denoising steps of each stage;
    `verbs`: for each turn what every stage did, D, C or both.
  """
  turns, steps = engine.turns(block), engine.config.num_steps
  if engine.stages is None or len(turns[0]) != steps:
    # A stage takes a block through several steps in a turn.
    verbs = [['DC'] * len(turn) for turn in turns]
  else:
    first = engine.stages.finish_turn(block - 1) + 1 if block else 0
    verbs = [
      ['D' if (turn - stage) % 2 == 0 else 'C' for stage in range(steps)]
      for turn in range(first, first + len(turns))
    ]
  return {'turns': turns, 'steps': steps, 'verbs': verbs}


class _EncodedOnce:
  """A text encoder that keeps the last texts' states, for several threads."""

  def __init__(self, encoder: Any):
    self._encoder = encoder
    # Two: who finds his text kept does not wait while another is encoded.
    self._encoding, self._lock = threading.Lock(), threading.Lock()
    self._kept: collections.OrderedDict[str, np.ndarray] = (
      collections.OrderedDict()
    )

  def __getattr__(self, name: str) -> Any:
    return getattr(self._encoder, name)

  def encode(self, prompts: Sequence[str]) -> np.ndarray:
    """States [B, L, D] of captions, as the encoder itself gives them."""
    if (kept := self._look_up(prompts)) is not None:
      return kept
    with self._encoding:
      if (kept := self._look_up(prompts)) is not None:
        return kept
      states = np.asarray(self._encoder.encode(list(prompts)))
    with self._lock:
      self._kept.update(zip(prompts, states))
      while len(self._kept) > _KEPT_TEXTS:
        self._kept.popitem(last=False)
    return states

  def _look_up(self, prompts: Sequence[str]) -> np.ndarray | None:
    with self._lock:
      if not all(prompt in self._kept for prompt in prompts):
        return None
      for prompt in prompts:
        self._kept.move_to_end(prompt)
      return np.stack([self._kept[prompt] for prompt in prompts])
