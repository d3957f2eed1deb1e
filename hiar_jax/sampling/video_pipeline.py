"""Text to video: load a pipeline, call it with a prompt, look at the result.

  pipe = loading.load('bouncing')
  video = pipe('a large red disc drifting fast over dark blue', num_blocks=28)
  video.save('video.mp4')

A pipeline is a folder of three files: a config, weights and a codec.
"""

# B batch, F frames, H W height and width, h w latent rows and columns,
# C channels, P prompts, L text tokens, D width

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hiar_jax import rollout
from hiar_jax.codecs import pixels
from hiar_jax.data import clips
from hiar_jax.denoiser import Denoiser
from hiar_jax.runtime import metrics
from hiar_jax.sampling import (
  calls,
  choices,
  decoding,
  executors,
  memory,
  meshes,
  modes,
  seeds,
  staged_calls,
  streaming,
)
from hiar_jax.sampling.video import Video

# Videos that are sampled together. More of them need memory in proportion and
# are no faster once the machine is busy.
MAX_BATCH = 8


@dataclasses.dataclass(frozen=True, eq=False)
class VideoPipeline:
  """Prompts to videos; made by `loading.load` or `from_config`.

  Attributes:
    name: for people.
    denoiser: network.
    params: its parameters.
    encoder: captions to text states, see `text`.
    codec: latents to frames, see `codecs`.
    rollout: how blocks are denoised.
    order: that the weights were trained for, one of rollout.ORDERS.
    fps: frames a second of the videos.
    schedule: the config's section that the levels of `rollout` are of.
    mesh: of `meshes.make`: the devices of calls and streams; None: one device.
    identity: differs between weights; '' if nothing is known of them.
  """

  name: str
  denoiser: Denoiser
  params: dict
  encoder: Any
  codec: Any
  rollout: rollout.RolloutConfig
  order: str
  fps: float
  schedule: Mapping[str, Any]
  identity: str = ''
  mesh: jax.sharding.Mesh | None = None

  def __repr__(self) -> str:
    model, (height, width, _) = self.denoiser.config, self.frame_shape
    return (
      f'VideoPipeline({self.name!r}, {model.num_layers} layers of width '
      f'{model.dim}, frames {height}x{width} at {self.fps:g} fps, '
      f'{self.order}, {self.rollout.num_steps} steps)'
    )

  @property
  def frame_shape(self) -> tuple[int, int, int]:
    """(H, W, 3) of the frames."""
    config, stride = self.denoiser.config, self.codec.spatial_stride
    return (config.latent_height * stride, config.latent_width * stride, 3)

  def __call__(
    self,
    prompt: str | Sequence[str],
    *,
    num_blocks: int = 7,
    num_videos: int = 1,
    seed: int | Sequence[int] = 0,
    anchor_blocks: int = 0,
    block_first_steps: int = 0,
    initial_frames: np.ndarray | Video | None = None,
    clip: np.ndarray | Video | None = None,
    strength: float | None = None,
    fit: str | None = None,
    progress: bool = True,
    **chosen: Any,
  ) -> Video | list[Video]:
    """Makes videos.

    Each video has its noise from (its seed, step, block), see `seeds`: it does
    not depend on what others are made with it, nor on the order, and its
    `Video.seed` makes it again alone.

    Args:
      prompt: one or several.
      num_blocks: length; a block is `rollout.frames_per_block` latent frames.
      num_videos: of each prompt.
      seed: another seed gives other videos; or one for each video, prompt by
        prompt.
      anchor_blocks: 'hybrid' only: first blocks that are finished first.
      block_first_steps: 'hybrid' only: first steps that go block by block.
      initial_frames: uint8 [F, H, W, 3], one picture [H, W, 3], or a Video,
        that the videos go on from. They come first in the result, as the
        codec sees them.
      clip: uint8 [F, H, W, 3] or a Video that is made over, as far as it fills
        whole blocks; their number is the video's, and num_blocks is not looked
        at.
      strength: with a clip, how much of it is made over: the level in (0, 1]
        that noise takes it to, see `start_from`.
      fit: brings given frames of another size to that of the videos, see
        `clips.fit`; None: they must have it.
      progress: show a bar of the network passes.
      **chosen: order, context, window, sink, steps, ..., instead of what the
        weights were trained for: see `choices.Choices`.

    Returns:
      A Video for one prompt and num_videos=1, else a list, prompt by prompt.

    Raises:
      ValueError: naming the value that does not fit.
    """
    pipeline = choices.apply(self, **chosen)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    start = None
    if (clip is None) != (strength is None):
      raise ValueError('clip and strength go together')
    if clip is not None and strength is not None:
      num_blocks, start = pipeline.start_from(clip, strength, fit)
    request = calls.Request(
      num_blocks=num_blocks,
      num_videos=num_videos,
      seed=seed,
      order=pipeline.order,
      anchor_blocks=anchor_blocks,
      block_first_steps=block_first_steps,
    )
    latents = pipeline.sample(
      *(prompts, request),
      initial_frames=initial_frames,
      start=start,
      fit=fit,
      progress=progress,
    )
    frames = pipeline.decode(latents)
    videos = [
      Video(frames[i], self.fps, prompts[i // num_videos], latents[i], seed)
      for i, seed in enumerate(
        seeds.of_videos(request.seed, len(prompts), num_videos)
      )
    ]
    return videos[0] if isinstance(prompt, str) and num_videos == 1 else videos

  def sample(
    self,
    prompts: Sequence[str],
    request: calls.Request,
    *,
    initial_frames: np.ndarray | Video | None = None,
    start: calls.Start | None = None,
    fit: str | None = None,
    progress: bool = True,
  ) -> np.ndarray:
    """Makes latents; arguments as in `__call__`, `start` from `start_from`.

    Returns:
      float32 [B, F, h, w, C], B = prompts * num_videos, prompt by prompt;
      given frames included.
    """
    streaming.check_prompts(prompts)
    passes = calls.num_passes(request, self.rollout, start)
    size = len(prompts) * request.num_videos
    seeds_B = seeds.of_videos(request.seed, len(prompts), request.num_videos)
    initial = None
    if initial_frames is not None:
      initial = self.encode(initial_frames, fit)
    self._check_host(size, request.num_blocks, initial)
    engine = self._staged(request, start)
    meshes.check_model(self.denoiser.config, self.mesh)
    states_PLD = self.encoder.encode(prompts)
    in_turn = batches(size)
    if self.mesh is None:
      calls.check_memory(
        *(self.denoiser, self.rollout, self.params, request, len(in_turn[0]))
      )
    latents = []
    with _progress(len(in_turn) * passes, progress) as report:
      for samples in in_turn:
        given = (
          *(request, seeds.keys([seeds_B[i] for i in samples])),
          *(states_PLD[samples // request.num_videos], initial, report),
        )
        if engine is not None:
          latents.append(staged_calls.sample(engine, self.params, *given))
          continue
        with meshes.under(self.mesh):
          latents.append(
            calls.sample(
              *(self.denoiser, self.params, self.rollout, *given),
              start=start,
              mesh=self.mesh,
            )
          )
    return np.concatenate(latents)[:size]

  def _staged(
    self, request: calls.Request, start: calls.Start | None
  ) -> streaming.Engine | None:
    """The programs of a call with stages or processes; None: it has none."""
    if self.mesh is None:
      return None
    if self.mesh.shape[executors.STAGE] == 1 and jax.process_count() == 1:
      return None
    mode = staged_calls.mode_of(request, start, self.rollout.context)
    return streaming.Engine(self.denoiser, self.rollout, mode, self.mesh)

  def stream(
    self,
    prompt: str | Sequence[str],
    *,
    seed: int | Sequence[int] = 0,
    num_blocks: int | None = None,
    mode: str = modes.AUTO,
    initial_frames: np.ndarray | Video | None = None,
    fit: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    **chosen: Any,
  ) -> streaming.Stream:
    """A video block by block, endless or not, in constant memory.

    `next(stream)` is uint8 [B, F, H, W, 3] (B prompts), the frames of the next
    block; `stream.send(prompt)` changes the prompt and returns the block from
    which it shows: blocks under way keep theirs. The
    blocks are those of a call with the same seed, in step-first order or, with
    mode 'block_first', in that.

    Args:
      prompt: one or several, streamed together.
      seed: another seed gives another video; or one for each prompt.
      num_blocks: after which it ends; None: it has no end.
      mode: one of streaming.MODES, or 'auto': the fastest one that fits, see
        `modes.choose_mode`. The stream's `mode` and `reason` tell.
      fit: see `__call__`.
      initial_frames: see `__call__`; the stream has them as the codec sees
        them in `given`, and begins with the block after them.
      mesh: instead of the pipeline's: runs the stages on the devices of its
        axis `stage`, and divides their passes over others. Under several
        processes each runs the same stream and gets all frames.
      **chosen: see `__call__`.

    Raises:
      ValueError: naming the value that does not fit.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    streaming.check_prompts(prompts)
    keys = seeds.keys(seeds.of_videos(seed, len(prompts)))
    pipeline = choices.apply(self, **chosen)
    config, mesh = pipeline.rollout, mesh or self.mesh
    reason: dict[str, Any] = {}
    if mode == modes.AUTO:
      mode, reason['reason'] = modes.choose_mode(
        *(pipeline.denoiser, config, self.params, len(prompts), mesh),
        order=pipeline.order,
      )
    elif chosen.get('order') is not None:
      is_block_first = mode == 'block_first'
      if is_block_first != (pipeline.order == 'block_first'):
        raise ValueError(
          f'order {pipeline.order!r} is not that of stream mode {mode!r}'
        )
    if mode == 'shared':
      config = dataclasses.replace(config, context='shared')
    engine = streaming.Engine(pipeline.denoiser, config, mode, mesh)
    engine = modes.on_device(engine, self.params, len(prompts))
    initial = None
    if initial_frames is not None:
      initial = pipeline.encode(initial_frames, fit)
      initial = initial.repeat(len(prompts), 0)
    return streaming.Stream(
      engine,
      self.params,
      pipeline.codec,
      self.encoder.encode,
      prompts,
      keys,
      initial=initial,
      fps=self.fps,
      num_blocks=num_blocks,
      **reason,
    )

  def decode(self, latents_BFhwC: np.ndarray) -> np.ndarray:
    """Latents to uint8 frames [B, F, H, W, 3], block by block."""
    size = self.rollout.frames_per_block
    videos = [
      decoding.decode_blocks(self.codec, latents_BFhwC[samples], size)[0]
      for samples in batches(len(latents_BFhwC))
    ]
    return np.concatenate(videos)[: len(latents_BFhwC)]

  def decoded_blocks(self, latents_FhwC: np.ndarray) -> Iterator[np.ndarray]:
    """One video's latents to uint8 frames [F, H, W, 3], a block at a time."""
    size = self.rollout.frames_per_block
    for frames, _ in decoding.decoded_blocks(
      self.codec, latents_FhwC[None], size
    ):
      yield frames[0]

  def _check_host(
    self, size: int, num_blocks: int, initial: np.ndarray | None
  ) -> None:
    """Raises ValueError unless the host has room, see `memory.check_host`."""
    stride = self.codec.temporal_stride
    frames, *latent = self.rollout.block_shape(self.denoiser.config)
    count = num_blocks * frames + (0 if initial is None else initial.shape[1])
    memory.check_host(
      (size, count, *latent),
      (size, 1 + (count - 1) * stride, *self.frame_shape),
    )

  def start_from(
    self, clip: np.ndarray | Video, strength: float, fit: str | None = None
  ) -> tuple[int, calls.Start | None]:
    """What a video that makes a clip over starts from.

    The steps from the first one on whose level is not above `strength` are run,
    on the clip with noise to that level: the least that is made over is the
    last step, and 1 leaves nothing of the clip but its length.

    Args:
      clip: see `__call__`.
      strength: a level in (0, 1].
      fit: see `__call__`.

    Returns:
      The number of blocks, and what they start from; None: pure noise.

    Raises:
      ValueError: if no step has so low a level, or the clip fills no block.
    """
    levels = self.rollout.levels[:-1]
    if not 0 < strength <= 1:
      raise ValueError(f'strength={strength} is not in (0, 1]')
    steps = [j for j, level in enumerate(levels) if level <= strength + 1e-6]
    if not steps:
      shown = ', '.join(f'{level:.3g}' for level in levels)
      raise ValueError(
        f'strength={strength} is below the levels of all steps, {shown}; more '
        'steps or a smaller shift have lower ones'
      )
    frames = np.asarray(clip.frames if isinstance(clip, Video) else clip)
    stride, size = self.codec.temporal_stride, self.rollout.frames_per_block
    blocks = (
      ((len(frames) - 1) // stride + 1) // size if frames.ndim == 4 else 0
    )
    if not blocks:
      raise ValueError(
        f'a clip of {len(frames)} frames does not fill a block, which has '
        f'{1 + (size - 1) * stride}'
      )
    used = 1 + (blocks * size - 1) * stride
    latents = self.encode(frames[:used], fit)
    if not steps[0]:
      return blocks, None
    return blocks, calls.Start(latents, steps[0])

  def encode(
    self, frames_FHWC: np.ndarray | Video, fit: str | None = None
  ) -> np.ndarray:
    """Given frames to latents [1, F, h, w, C]; `fit` as in `__call__`."""
    if isinstance(frames_FHWC, Video):
      frames_FHWC = frames_FHWC.frames
    frames_FHWC = np.asarray(frames_FHWC)
    if frames_FHWC.ndim == 3:  # One picture.
      frames_FHWC = frames_FHWC[None]
    wanted = self.frame_shape
    if fit is not None:
      frames_FHWC = _fitted(frames_FHWC, wanted, fit)
    if (
      frames_FHWC.dtype != np.uint8
      or frames_FHWC.ndim != 4
      or frames_FHWC.shape[1:] != wanted
      or not len(frames_FHWC)
    ):
      raise ValueError(
        f'initial_frames must be uint8 [F, {wanted[0]}, {wanted[1]}, 3], not '
        f'{frames_FHWC.dtype} {list(frames_FHWC.shape)}'
      )
    stride, count = self.codec.temporal_stride, len(frames_FHWC)
    if (count - 1) % stride:
      fewer = 1 + (count - 1) // stride * stride
      raise ValueError(
        f'{count} given frames are not 1 + {stride}k; the last {fewer} would do'
      )
    return np.asarray(_encode_frames(self.codec, frames_FHWC[None]))


def _fitted(frames: np.ndarray, size: tuple[int, ...], how: str) -> np.ndarray:
  """Frames at another size; what are no frames is left for others to name."""
  if how not in clips.FITS:
    raise ValueError(f'fit={how!r} is not one of {clips.FITS}')
  if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
    return frames
  height, width = size[:2]
  fitted = [clips.fit(frame, 1.0, height, width, how) for frame in frames]
  return np.stack(fitted) if fitted else frames


@contextlib.contextmanager
def _progress(total: int, visible: bool) -> Iterator[Callable[[int], None]]:
  """Shows what is reported to it as a bar, or does nothing."""
  if not visible:
    yield lambda passes: None
    return
  done = 0
  with metrics.Progress(total, label='sampling', unit='pass') as bar:

    def report(passes):
      nonlocal done
      done += passes
      bar.update(done)

    yield report


def batches(size: int) -> list[np.ndarray]:
  """Splits 0..size-1 into equal batches, so that one program serves them all.

  The last sample is repeated where they do not come out even.
  """
  count = -(-size // MAX_BATCH)
  padded = np.minimum(np.arange(-(-size // count) * count), size - 1)
  return np.split(padded.astype(np.int32), count)


@jax.jit
def _encode_frames(codec, frames_BFHWC):
  return codec.encode(pixels.to_float(frames_BFHWC))
