"""What makes the videos of a server: one pipeline, and its streams."""

# F frames, H W height and width

import collections
import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from hiar_jax.sampling import modes, streaming
from hiar_jax.sampling.video_pipeline import VideoPipeline

_KEPT_TEXTS = 256
# Of a device's memory; the decoder has its own, and XLA.
_USABLE = 0.8


class Studio:
  """A pipeline as a server needs it.

  Attributes:
    pipeline: it makes the videos.
    mode: of streams that ask for none.
    reason: of the mode, for people.
    modes: that may be asked for.
    max_sessions: videos at a time that the device has room for.
  """

  def __init__(
    self,
    pipeline: VideoPipeline,
    *,
    mode: str = modes.AUTO,
    mesh: jax.sharding.Mesh | None = None,
  ):
    """Chooses the mode; nothing is compiled yet.

    Args:
      pipeline: it makes the videos.
      mode: see `VideoPipeline.stream`.
      mesh: likewise.

    Raises:
      ValueError: if the mode does not go with the pipeline or the mesh, or the
        device has no room.
    """
    self._texts = _EncodedOnce(pipeline.encoder)
    self.pipeline = dataclasses.replace(pipeline, encoder=self._texts)
    self._mesh = mesh
    self.reason = 'as asked for'
    if mode == modes.AUTO:
      mode, self.reason = modes.choose_mode(
        *(pipeline.denoiser, pipeline.rollout, pipeline.params, 1, mesh),
        order=pipeline.order,
      )
    self.mode = mode
    self.modes = tuple(filter(self._fits, streaming.MODES))
    engine = self._engine(mode)
    self.max_sessions = _room(engine, pipeline.params)
    # Once: every stream would lay the weights out for itself.
    params = engine.denoiser.unstack_layers(pipeline.params)
    self.pipeline = dataclasses.replace(
      self.pipeline, params=engine.place(params)
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
    """Begins a video and makes its first block, compiling what it needs.

    Raises:
      ValueError: naming the value that does not fit.
    """
    stream = self.pipeline.stream(
      prompt,
      seed=seed,
      mode=mode or self.mode,
      initial_frames=initial_frames,
      mesh=self._mesh,
    )
    return Making(stream)


def _room(engine: streaming.Engine, params: dict) -> int:
  """Videos whose caches fit beside the weights, one of them being made."""
  need = modes.estimate_memory(engine, params, 1)
  device = jax.local_devices()[0]
  if engine.mesh is not None:
    device = engine.mesh.local_devices[0]
  room = _USABLE * modes.device_memory(device) - need.weights - need.temporaries
  return max(1, int(room // need.caches))


class Making:
  """One video that is being made.

  Attributes:
    mode: of its stream.
    given: uint8 [F, H, W, 3], the frames that it goes on from, or None.
    first: uint8 [F, H, W, 3], its first block.
  """

  def __init__(self, stream: streaming.Stream):
    """Makes the first block of a stream of one video."""
    self._stream = stream
    # A server makes the blocks in time itself, and its prompts are awaited.
    stream.ahead = 0
    self.mode = stream.mode
    self.given = None if stream.given is None else np.asarray(stream.given)[0]
    self.first = self.next()

  def next(self) -> np.ndarray:
    """The next block, uint8 [F, H, W, 3]."""
    return next(self._stream)[0]

  def send(self, prompt: str, recache: bool = False) -> int:
    """Changes the prompt; the block from which it shows."""
    return self._stream.send(prompt, recache=recache)

  def turns(self, block: int) -> dict[str, Any]:
    """The squares of the grid that were worked on to finish a block.

    Returns:
      `turns`: for each turn the block of every stage, from the noisiest on,
      negative where it has none; `steps`: the denoising steps of each stage;
      `verbs`: for each turn what every stage did, D, C or both.
    """
    engine = self._stream.engine
    turns = engine.turns(block)
    steps = engine.config.num_steps
    if engine.stages is None or len(turns[0]) != steps:
      # A stage takes a block through several steps in a turn.
      return {
        'turns': turns,
        'steps': steps,
        'verbs': [['DC'] * len(turn) for turn in turns],
      }
    before = engine.stages.finish_turn(block - 1) + 1 if block else 0
    verbs = [
      ['D' if (turn - stage) % 2 == 0 else 'C' for stage in range(steps)]
      for turn in range(before, before + len(turns))
    ]
    return {'turns': turns, 'steps': steps, 'verbs': verbs}

  def close(self) -> None:
    """Frees what the video holds on the device."""
    self._stream.close()


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
