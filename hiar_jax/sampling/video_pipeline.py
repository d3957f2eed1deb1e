"""Text to video: load a pipeline, call it with a prompt, look at the result.

  pipe = generate.load('bouncing')
  video = pipe('a large red disc drifting fast over dark blue', num_blocks=28)
  video.save('video.mp4')

A pipeline is a folder of three files: a config, weights and a codec.
"""

# B batch, F frames, H W height and width, h w latent rows and columns,
# C channels, P prompts, L text tokens, D width

import contextlib
import dataclasses
import json
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hiar_jax import noise_schedule, rollout
from hiar_jax.codecs import linear, pixels
from hiar_jax.codecs import vae as codecs_vae
from hiar_jax.denoiser import Denoiser
from hiar_jax.models import vae
from hiar_jax.models.config import WanConfig
from hiar_jax.runtime import metrics
from hiar_jax.sampling import calls, streaming
from hiar_jax.sampling.video import Video
from hiar_jax.text import encoders
from hiar_jax.text import umt5 as text_umt5
from hiar_jax.weights import (
  conversion,
  conversion_cache,
  hub,
  layouts,
  networks,
  releases,
)

# What a pipeline takes from a training config; the rest is about training.
SECTIONS = ('name', 'model', 'text', 'schedule', 'rollout', 'generate')
# All that `from_config` reads; of these, what is there.
READS = (*SECTIONS, 'vae', 'umt5', 'weights_dtype')

# Videos that are sampled together. More of them need memory in proportion and
# are no faster once the machine is busy.
MAX_BATCH = 8


@dataclasses.dataclass(frozen=True, eq=False)
class VideoPipeline:
  """Prompts to videos; made by `load` or `from_config`.

  Attributes:
    name: for people.
    denoiser: network.
    params: its parameters.
    encoder: captions to text states, see `text`.
    codec: latents to frames, see `codecs`.
    rollout: how blocks are denoised.
    order: that the weights were trained for, one of rollout.ORDERS.
    fps: frames a second of the videos.
  """

  name: str
  denoiser: Denoiser
  params: dict
  encoder: Any
  codec: Any
  rollout: rollout.RolloutConfig
  order: str
  fps: float

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
    seed: int = 0,
    order: str | None = None,
    anchor_blocks: int = 0,
    block_first_steps: int = 0,
    context: str | None = None,
    initial_frames: np.ndarray | None = None,
    progress: bool = True,
  ) -> Video | list[Video]:
    """Makes videos.

    Video v of prompt p has its noise from (seed, p, v, step, block): it does
    not depend on how many others are made with it, nor on the order.

    Args:
      prompt: one or several.
      num_blocks: length; a block is `rollout.frames_per_block` latent frames.
      num_videos: of each prompt.
      seed: another seed gives other videos.
      order: one of rollout.ORDERS; None is the one trained for.
      anchor_blocks: 'hybrid' only: first blocks that are finished first.
      block_first_steps: 'hybrid' only: first steps that go block by block.
      context: one of rollout.CONTEXTS; None is the one trained for.
      initial_frames: uint8 [F, H, W, 3] that the videos go on from: one image
        or the end of another video. They come first in the result, as the
        codec sees them.
      progress: show a bar of the network passes.

    Returns:
      A Video for one prompt and num_videos=1, else a list, prompt by prompt.

    Raises:
      ValueError: naming the value that does not fit.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    request = calls.Request(
      num_blocks=num_blocks,
      num_videos=num_videos,
      seed=seed,
      order=self.order if order is None else order,
      anchor_blocks=anchor_blocks,
      block_first_steps=block_first_steps,
    )
    pipeline = self
    if context is not None:
      pipeline = dataclasses.replace(
        self, rollout=dataclasses.replace(self.rollout, context=context)
      )
    latents = pipeline.sample(
      prompts, request, initial_frames=initial_frames, progress=progress
    )
    frames = pipeline.decode(latents)
    videos = [
      Video(frames[i], self.fps, prompts[i // num_videos], latents[i])
      for i in range(len(frames))
    ]
    return videos[0] if isinstance(prompt, str) and num_videos == 1 else videos

  def sample(
    self,
    prompts: Sequence[str],
    request: calls.Request,
    *,
    initial_frames: np.ndarray | None = None,
    progress: bool = True,
  ) -> np.ndarray:
    """Makes latents; arguments as in `__call__`.

    Returns:
      float32 [B, F, h, w, C], B = prompts * num_videos, prompt by prompt;
      given frames included.
    """
    check_prompts(prompts)
    passes = calls.num_passes(request, self.rollout)
    initial = None
    if initial_frames is not None:
      initial = self.encode(initial_frames)
    states_PLD = self.encoder.encode(prompts)
    size = len(prompts) * request.num_videos
    batches = _batches(size)
    calls.check_memory(
      *(self.denoiser, self.rollout, self.params, request, len(batches[0]))
    )
    latents = []
    with _progress(len(batches) * passes, progress) as report:
      for samples in batches:
        prompt, video = np.divmod(samples, request.num_videos)
        latents.append(
          calls.sample(
            self.denoiser,
            self.params,
            self.rollout,
            request,
            calls.sample_keys(np.uint32(request.seed), prompt, video),
            states_PLD[prompt],
            initial,
            report,
          )
        )
    return np.concatenate(latents)[:size]

  def stream(
    self,
    prompt: str | Sequence[str],
    *,
    seed: int = 0,
    mode: str = streaming.AUTO,
    initial_frames: np.ndarray | None = None,
    mesh: jax.sharding.Mesh | None = None,
  ) -> streaming.Stream:
    """An endless video, block by block, in constant memory.

    `next(stream)` is uint8 [B, F, H, W, 3] (B prompts), the frames of the next
    block; `stream.send(prompt)` changes the prompt from the next block on. The
    blocks are those of a call with the same seed in step-first order.

    Args:
      prompt: one or several, streamed together.
      seed: another seed gives another video.
      mode: one of streaming.MODES, or 'auto': the fastest one that fits, see
        `streaming.choose_mode`. The stream's `mode` and `reason` tell.
      initial_frames: see `__call__`; the stream has them as the codec sees
        them in `given`, and begins with the block after them.
      mesh: runs the stages on the devices of its axis `stage`. Under several
        processes each runs the same stream and gets all frames.

    Raises:
      ValueError: naming the value that does not fit.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    check_prompts(prompts)
    config = self.rollout
    chosen = {}
    if mode == streaming.AUTO:
      mode, chosen['reason'] = streaming.choose_mode(
        self.denoiser, config, self.params, len(prompts), mesh
      )
    if mode == 'shared':
      config = dataclasses.replace(config, context='shared')
    engine = streaming.Engine(self.denoiser, config, mode, mesh)
    initial = None
    if initial_frames is not None:
      initial = self.encode(initial_frames).repeat(len(prompts), 0)
    numbers = np.arange(len(prompts))
    keys = calls.sample_keys(np.uint32(seed), numbers, 0 * numbers)
    return streaming.Stream(
      engine,
      self.params,
      self.codec,
      self.encoder.encode,
      prompts,
      keys,
      initial=initial,
      **chosen,
    )

  def decode(self, latents_BFhwC: np.ndarray) -> np.ndarray:
    """Latents to uint8 frames [B, F, H, W, 3], block by block."""
    size = self.rollout.frames_per_block
    videos = [
      streaming.decode_blocks(self.codec, latents_BFhwC[samples], size)[0]
      for samples in _batches(len(latents_BFhwC))
    ]
    return np.concatenate(videos)[: len(latents_BFhwC)]

  def encode(self, frames_FHWC: np.ndarray) -> np.ndarray:
    """Given frames to latents [1, F, h, w, C]."""
    frames_FHWC = np.asarray(frames_FHWC)
    wanted = self.frame_shape
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
    return np.asarray(_encode_frames(self.codec, frames_FHWC[None]))


def load(
  name_or_path: str | pathlib.Path,
  *,
  base: str | pathlib.Path | None = None,
  text_encoder: str | pathlib.Path = 'keep',
  text_cache: str | pathlib.Path | None = None,
) -> VideoPipeline:
  """Reads a pipeline with its trained weights.

  Published weights are converted when they are first loaded, see
  `conversion_cache.cached`.

  Args:
    name_or_path: a name of `known_names()`, a folder written by `export` or
      `launch/convert_checkpoint.py`, or weights in the layout of Wan2.1,
      diffusers or Self-Forcing: a folder, a file, or a hub's 'owner/name'.
    base: published weights that have the parts which the others lack, such as
      the VAE and the text encoder of Wan2.1.
    text_encoder: see `from_config`.
    text_cache: likewise.

  Raises:
    ValueError: if there is no such pipeline, or a file of it is damaged.
    FileNotFoundError: if a file is missing from the folder.
  """
  folder = layouts.ASSETS / name_or_path
  if not (folder / layouts.CONFIG_FILE).exists():
    folder = pathlib.Path(name_or_path)
  if base is not None or not conversion.is_ours(folder):
    folder = _converted(name_or_path, base)
  path = folder / layouts.CONFIG_FILE
  try:
    config = json.loads(path.read_bytes())
  except ValueError as error:
    raise ValueError(f'{path} is not JSON: {error}') from error
  return from_config(
    config,
    weights=folder / layouts.STUDENT_FILE,
    codec=folder / layouts.codec_file(config),
    text_encoder=text_encoder,
    text_cache=text_cache,
  )


def _converted(
  name: str | pathlib.Path, base: str | pathlib.Path | None
) -> pathlib.Path:
  """The converted folder of published weights."""
  path = pathlib.Path(name)
  if path.is_dir():
    if not releases.holds_weights(path):
      raise FileNotFoundError(
        f'no pipeline in {path}: it has no {layouts.CONFIG_FILE}'
      )
  elif not path.exists() and not hub.is_name(str(name)):
    raise ValueError(
      f'no pipeline {str(name)!r}: it is neither a folder nor one of '
      f'{known_names()}'
    )
  return conversion_cache.cached(name, base=base)


def known_names() -> list[str]:
  """Pipelines that come with the package."""
  return sorted(
    path.parent.name for path in layouts.ASSETS.glob(f'*/{layouts.CONFIG_FILE}')
  )


def from_config(
  config: Mapping[str, Any],
  *,
  weights: str | pathlib.Path,
  codec: str | pathlib.Path,
  text_encoder: str | pathlib.Path = 'keep',
  text_cache: str | pathlib.Path | None = None,
) -> VideoPipeline:
  """Builds a pipeline from a config and two files.

  Args:
    config: has SECTIONS, such as `configs/bouncing.py`, and may have
      'weights_dtype' (float32 if not), 'vae' (sizes of the VAE that is the
      codec) and 'umt5' (sizes of the text encoder, instead of 'text'; it and
      its tokenizer lie beside the weights); others are ignored.
    weights: of `networks.save_weights`.
    codec: of `linear.save_linear_codec`, or of the VAE.
    text_encoder: 'keep', 'release' or a path, see `text_umt5.load_encoder`.
    text_cache: a folder for the states of prompts, see there.

  Raises:
    ValueError: if a section is missing, a value is out of range, or a file is
      damaged or of another model.
    TypeError: naming a key that is unknown.
    FileNotFoundError: if a file is missing.
  """
  needed = [n for n in SECTIONS if n != 'text' or 'umt5' not in config]
  missing = [name for name in needed if name not in config]
  if missing:
    raise ValueError(f'the config has no {missing}; generation needs them')
  denoiser = Denoiser(WanConfig(**config['model']))
  if 'umt5' in config or text_encoder not in text_umt5.CHOICES:
    encoder = text_umt5.load_encoder(
      config, pathlib.Path(weights).parent, text_encoder, text_cache
    )
  else:
    encoder = encoders.open_encoder(config['text'])
  levels = noise_schedule.warped_levels(**config['schedule'])
  rollout_config = rollout.RolloutConfig(levels=levels, **config['rollout'])
  # The shapes alone: random weights would take longer than reading real ones.
  abstract = jax.eval_shape(lambda: denoiser.init(jax.random.key(0)))
  dtype = config.get('weights_dtype', 'float32')
  # Onto the device array by array: the whole is not held twice.
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  abstract = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, dtype, sharding=device), abstract
  )
  return VideoPipeline(
    name=config['name'],
    denoiser=denoiser,
    params=networks.load_weights(weights, abstract),
    encoder=encoder,
    codec=_load_codec(codec, config),
    rollout=rollout_config,
    **config['generate'],
  )


def export(
  folder: str | pathlib.Path,
  *,
  config: Mapping[str, Any],
  params: Mapping[str, Any],
  codec: linear.LinearCodec | codecs_vae.VAECodec,
  dtype: jax.typing.DTypeLike | None = None,
) -> None:
  """Writes what `load` reads.

  Args:
    folder: is made if it does not exist.
    config: of the training; its SECTIONS and 'vae' are written, the rest is
      left out.
    params: of the student, averaged.
    codec: that its latents are of.
    dtype: of the stored weights, such as float16; None keeps them as they are.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  names = (*SECTIONS, 'vae') if 'vae' in config else SECTIONS
  sections = {name: config[name] for name in names}
  (folder / layouts.CONFIG_FILE).write_text(
    json.dumps(sections, indent=2, default=dict) + '\n'
  )
  path = folder / layouts.codec_file(config)
  if 'vae' in config:
    networks.save_weights(path, codec.params, dtype=dtype)
  else:
    linear.save_linear_codec(codec, path)
  networks.save_weights(folder / layouts.STUDENT_FILE, params, dtype=dtype)


def check_prompts(prompts: Sequence[str]) -> None:
  """Raises ValueError unless there are prompts and none of them is empty."""
  if not len(prompts):
    raise ValueError('there is no prompt')
  for prompt in prompts:
    if not isinstance(prompt, str) or not prompt.strip():
      raise ValueError(f'prompt {prompt!r} is not a text')


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


def _batches(size: int) -> list[np.ndarray]:
  """Splits 0..size-1 into equal batches, so that one program serves them all.

  The last sample is repeated where they do not come out even.
  """
  count = -(-size // MAX_BATCH)
  padded = np.minimum(np.arange(-(-size // count) * count), size - 1)
  return np.split(padded.astype(np.int32), count)


@jax.jit
def _encode_frames(codec, frames_BFHWC):
  return codec.encode(pixels.to_float(frames_BFHWC))


def _load_codec(path: str | pathlib.Path, config: Mapping[str, Any]) -> Any:
  if 'vae' in config:
    return codecs_vae.load_vae_codec(path, vae.VAEConfig(**config['vae']))
  if not pathlib.Path(path).exists():
    raise FileNotFoundError(f'no codec at {path}')
  # Asked first: np.load leaves a file open that turns out not to be an archive.
  if not zipfile.is_zipfile(path):
    raise ValueError(f'codec {path} is damaged')
  try:
    return linear.load_linear_codec(path)
  except (KeyError, ValueError, zipfile.BadZipFile) as error:
    raise ValueError(f'codec {path} is damaged ({error})') from error
