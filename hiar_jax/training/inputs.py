"""Config sections to what training reads: prompts, text states, videos.

Nothing else in training knows where data comes from. A section names a source
or an encoder (see `runtime.seams`: a module of hiar_jax/data or hiar_jax/text,
or anyone's); what else is in it is that one's own business.

  prompts          source: 'file', ...    captions by number
  text             encoder: 'umt5', ...   captions to states [L, D]
  states           dir, num, shard_size, batch_size: states on disk, read in
                   place of encoding; `hiar-jax encode prompts` writes them
  negative_prompt  text that guidance leads away from; missing: the encoder's
  videos           source: 'folder', ...  captioned videos by number
  clips            source: 'folder', crop, ...   what a codec is trained on
  codec            folder, or path: what makes latents of videos
  latents          dir, num, shard_size, batch_size: encoded videos on disk,
                   read in place of videos; `hiar-jax encode videos` writes them

How a phase reads:

  encoder = inputs.open_text(config, mesh)
  source = inputs.open_states(config, inputs.open_prompts(config), encoder)
  batches = sources.batches(source, ...)
  ...
  batch = source.finish(sharding.put_batch(batch, mesh))   # has 'text'

What a source hands out for element i touches no device; `finish` runs in the
loop, on the mesh, in the same order in all processes. An encoder with weights
runs there.

B batch, L text tokens, D text width, F H W frames, height and width of videos.
"""

import contextlib
import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import jax
import ml_collections
import numpy as np

from hiar_jax.codecs import linear
from hiar_jax.codecs import vae as codecs_vae
from hiar_jax.data import crops, latents, text_states
from hiar_jax.data import prompts as data_prompts
from hiar_jax.data import videos as data_videos
from hiar_jax.models import vae
from hiar_jax.runtime import seams
from hiar_jax.text import encoders
from hiar_jax.weights import layouts, safetensors_io

Config: TypeAlias = ml_collections.ConfigDict

# Sources whose modules hold more than them.
_ALIASES = {'file': 'prompts', 'folder': 'videos'}


class States(Protocol):
  """Text by number, for batches; a grain RandomAccessDataSource.

  `finish` makes `text` [B, L, D] of a batch of elements, see
  `encoders.Encoder.finish`.
  """

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...

  def finish(self, batch: dict[str, Any]) -> dict[str, Any]: ...

  def identity(self) -> dict[str, Any]:
    """{'prompts': ..., 'encoder': ...}: what the states are of; JSON."""


def open_prompts(config: Config) -> data_prompts.Prompts:
  """The prompts of the section `prompts`.

  Raises:
    ValueError: if there is no such section or source, or its files are not
      prompts.
    FileNotFoundError: if they are missing.
  """
  return _open('prompts', _section('prompts', config), config)


def open_text(
  config: Config, mesh: jax.sharding.Mesh | None = None
) -> encoders.Encoder:
  """What training encodes with: the encoder, or the states that it left.

  With a section `states` it knows the texts that are beside the states, the
  empty caption and the negative prompt, and no others; the encoder's weights
  need not be there.

  Args:
    config: of the phase.
    mesh: that an encoder with weights is divided over; None: one device.

  Raises:
    ValueError: if there is no such encoder, it does not fit the network, or
      the states are those of another one.
    FileNotFoundError: if there are no states.
  """
  encoder = None
  if 'states' not in config:
    encoder = open_encoder(config, mesh)
  else:
    encoder = text_states.StoredEncoder(config.states.dir)
    expected = _identity(config)
    if expected is not None and expected != encoder.identity:
      raise ValueError(
        f'{config.states.dir} has states of another text encoder than the '
        f"config's: {encoder.identity}, not {expected}"
      )
  if 'model' in config:
    wanted = (config.model.text_len, config.model.text_dim)
    if (encoder.length, encoder.dim) != wanted:
      raise ValueError(
        f'text has {encoder.length} tokens of width {encoder.dim}, and the '
        f'network takes model.text_len={wanted[0]} of '
        f'model.text_dim={wanted[1]}'
      )
  return encoder


def open_encoder(
  config: Config, mesh: jax.sharding.Mesh | None = None
) -> encoders.Encoder:
  """The encoder of the section `text`; errors as `encoders.open_encoder`."""
  return encoders.open_encoder(_section('text', config), mesh)


def _identity(config: Config) -> str | None:
  """Of the config's encoder; None where its files are not here."""
  try:
    return open_encoder(config).identity
  except FileNotFoundError:
    return None


def negative_prompt(config: Config, encoder: encoders.Encoder) -> str:
  """What guidance leads away from: part of what a teacher's data is."""
  chosen = config.get('negative_prompt')
  return encoder.negative_prompt if chosen is None else chosen


def negative_states(config: Config, encoder: encoders.Encoder) -> np.ndarray:
  """States of the negative prompt: float32 [1, L, D].

  Guidance leads away from them, in trajectories and in the reverse KL alike.
  """
  return encoder.encode([negative_prompt(config, encoder)])


def other_texts(config: Config, encoder: encoders.Encoder) -> tuple[str, ...]:
  """What training encodes beside prompts, by text and not by number.

  The empty caption, the negative prompt and the prompts of sampled videos.
  """
  sampled = config.get('loop', {}).get('sample_prompts', ())
  return ('', negative_prompt(config, encoder), *sampled)


def captions_to_encode(config: Config) -> data_prompts.Prompts:
  """The prompts whose states a phase reads: its own, or those of its videos."""
  if 'latents' in config:
    return open_latents(config).captions
  if 'videos' in config:
    return open_bare_videos(config).captions
  return open_prompts(config)


def open_states(
  config: Config, prompts: data_prompts.Prompts, encoder: encoders.Encoder
) -> States:
  """The text states of prompts, as training reads them.

  Args:
    config: of the phase.
    prompts: from `open_prompts`, or the captions of videos.
    encoder: from `open_text`.

  Raises:
    FileNotFoundError: if the config has a section `states` and its folder
      lacks any.
    ValueError: if they are states of other prompts, naming what differs.
  """
  if 'states' in config:
    return text_states.StoredStates(config.states.dir, prompts)
  return PromptStates(prompts, encoder)


def open_videos(config: Config, encoder: encoders.Encoder) -> 'CaptionedVideos':
  """The teacher's training data: videos or their latents, and their text.

  Element i has what `finish` makes `text` of, and with a section `latents`
  `latents` float32 [F, h, w, C], else `video` uint8 [F, H, W, 3]. A share
  `caption_dropout` of the elements has the text of the empty caption.

  Raises:
    ValueError: if there is no such source, a value is out of range, or the
      latents are of other videos or another codec, naming what differs.
    FileNotFoundError: if videos or latents are missing.
  """
  source: latents.EncodedVideos | data_videos.Videos
  if 'latents' in config:
    name, source = 'latents', open_latents(config)
  else:
    name, source = 'video', open_bare_videos(config)
  return CaptionedVideos(
    source,
    name,
    open_states(config, source.captions, encoder),
    encoder,
    caption_dropout=config.caption_dropout,
    seed=config.seed,
  )


def open_bare_videos(config: Config) -> data_videos.Videos:
  """The videos of the section `videos`, to be encoded or looked at."""
  return _open('videos', _section('videos', config), config)


def open_latents(config: Config) -> latents.EncodedVideos:
  """The encoded videos of the section `latents`.

  They are held to the config's videos and codec where those are at hand; where
  they are not, the latents can be trained on alone.
  """
  expected: dict[str, Any] = {}
  with contextlib.suppress(FileNotFoundError):
    if 'videos' in config:
      expected['videos'] = open_bare_videos(config).identity()
  with contextlib.suppress(FileNotFoundError):
    if 'codec' in config:
      expected['codec_sha256'] = codec_sha256(open_codec(config))
  source = latents.EncodedVideos(config.latents.dir, expected)
  if 'model' in config:
    _check_latents(config, source.manifest.shape)
  return source


def latent_frames(videos: Any, codec: Any | None) -> int:
  """Latent frames of a source's videos.

  Args:
    videos: `data.videos.Videos`, or with no codec `latents.EncodedVideos`.
    codec: that encodes them; None: they are latents.

  Raises:
    ValueError: if the codec takes no videos of that many frames.
  """
  if codec is None:
    return videos.manifest.shape[0]
  frames, stride = videos.shape[0], codec.temporal_stride
  if frames % stride != 1 % stride:
    raise ValueError(
      f'videos of {frames} frames do not divide: the codec takes 1 + {stride} k'
    )
  return 1 + (frames - 1) // stride


def latents_manifest(
  config: Config, videos: data_videos.Videos, codec: Any
) -> latents.Manifest:
  """What the folder `latents.dir` has to hold.

  Raises:
    ValueError: if codec, videos and network do not go together, or there are
      fewer videos than the config asks for.
  """
  num = config.latents.num
  if num > len(videos):
    raise ValueError(f'latents.num={num} is more than the {len(videos)} videos')
  frames, height, width, _ = videos.shape
  stride = codec.temporal_stride
  if frames % stride != 1 % stride:
    raise ValueError(
      f'videos of {frames} frames do not divide: the codec takes 1 + {stride} k'
    )
  for name, size in (('height', height), ('width', width)):
    if size % codec.spatial_stride:
      raise ValueError(
        f'videos of {name}={size} do not divide: the codec takes multiples '
        f'of {codec.spatial_stride}'
      )
  shape = (
    latent_frames(videos, codec),
    height // codec.spatial_stride,
    width // codec.spatial_stride,
    codec.channels,
  )
  if 'model' in config:
    _check_latents(config, shape)
  return latents.Manifest(
    num=num or len(videos),
    shard_size=config.latents.shard_size,
    videos=videos.identity(),
    codec_sha256=codec_sha256(codec),
    shape=shape,
  )


def _check_latents(config: Config, shape: tuple[int, ...]) -> None:
  model = config.model
  wanted = (model.latent_height, model.latent_width, model.channels)
  if tuple(shape[1:]) != wanted:
    raise ValueError(
      f'videos have latents of {tuple(shape[1:])} rows, columns and channels, '
      f'and the network takes {wanted}'
    )


def open_codec(config: Config) -> Any:
  """The codec of the section `codec`, between frames and latents.

  With `folder` the VAE of a converted folder; with a section `vae` that VAE,
  its weights at `codec.path`; else a linear codec at `codec.path`, which is
  fitted to the first `codec.num_videos` of `codec.videos` if it is not there.

  Raises:
    FileNotFoundError: if there are no weights.
    ValueError: if a file is damaged or of another codec.
  """
  section = _section('codec', config)
  if folder := section.get('folder'):
    path = pathlib.Path(folder) / layouts.CONFIG_FILE
    sizes = safetensors_io.read_json(path).get('vae')
    if sizes is None:
      raise ValueError(f'{path} has no VAE: no section vae')
    file = path.with_name(layouts.OWN_FILES['vae'])
    return codecs_vae.load_vae_codec(file, vae.VAEConfig(**sizes))
  path = pathlib.Path(section.path)
  if 'vae' in config:
    return codecs_vae.load_vae_codec(path, vae.VAEConfig(**config.vae))
  if not path.exists():
    videos = _open('videos', section.videos, config, key='codec.videos')
    codec = linear.fit_linear_codec(
      (videos[index] for index in range(section.num_videos)),
      channels=section.channels,
      whitening=section.whitening,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    linear.save_linear_codec(codec, path)
  return linear.load_linear_codec(path)


def open_clips(config: Config) -> crops.Clips:
  """The clips of the section `clips`, which a codec is trained on.

  Raises:
    ValueError: if there is no such section or source, or a value is out of
      range.
    FileNotFoundError: if there are no files.
  """
  section = _section('clips', config)
  return _open('clips', section, config, aliases={'folder': 'crops'})


def codec_sha256(codec: Any) -> str:
  """Checksum of all that a codec holds: names, shapes, dtypes and values."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(codec):
    array = np.asarray(leaf)
    name = jax.tree_util.keystr(path)
    digest.update(f'{name} {array.shape} {array.dtype}\n'.encode())
    digest.update(array.tobytes())
  return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class PromptStates:
  """Prompts that are encoded while training runs; see `States`."""

  prompts: data_prompts.Prompts
  encoder: encoders.Encoder

  def __len__(self) -> int:
    return len(self.prompts)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    return self.encoder.prepare(self.prompts[index])

  def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
    return self.encoder.finish(batch)

  def identity(self) -> dict[str, Any]:
    return {
      'prompts': self.prompts.identity(),
      'encoder': self.encoder.identity,
    }


@dataclasses.dataclass(frozen=True)
class CaptionedVideos:
  """Videos or their latents beside their text; see `States`.

  Attributes:
    videos: element i of it is an array; as many as there are states.
    name: that the array has in a batch.
    states: text i is that of video i.
    encoder: of the empty caption.
    caption_dropout: share of the elements with the empty caption, which
      teaches the unconditional video (classifier-free guidance).
    seed: of which ones.
  """

  videos: Any
  name: str
  states: States
  encoder: encoders.Encoder
  caption_dropout: float
  seed: int

  def __post_init__(self):
    if not 0.0 <= self.caption_dropout <= 1.0:
      raise ValueError(
        f'caption_dropout={self.caption_dropout} must be in [0, 1]'
      )

  def __len__(self) -> int:
    return len(self.videos)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    dropped = data_videos.drops_caption(self.seed, index, self.caption_dropout)
    text = self.encoder.prepare('') if dropped else self.states[index]
    return {self.name: self.videos[index]} | text

  def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
    return self.states.finish(batch)

  def identity(self) -> dict[str, Any]:
    return {'videos': self.videos.identity()} | self.states.identity()


def read_by_codec(config: Config) -> tuple[str, ...]:
  """All sections that `open_codec` reads, its source's of videos included."""
  section = _section('codec', config)
  source = section.get('videos', {}).get('source', '')
  own = seams.reads('data', source, aliases=_ALIASES) if source else ()
  return ('codec', 'vae', *own)


def _open(
  room: str,
  section: Mapping[str, Any],
  config: Config,
  *,
  key: str = '',
  aliases: Mapping[str, str] = _ALIASES,
) -> Any:
  """`open_<room>` of the source that a section names."""
  options, key = dict(section), key or room
  source = options.pop('source', None)
  if source is None:
    raise ValueError(f'the section {key!r} of the config names no source')
  opens = seams.function(
    'data', source, f'open_{room}', key=f'{key}.source', aliases=aliases
  )
  return opens(options, config)


def _section(name: str, config: Config) -> Config:
  if name not in config:
    raise ValueError(
      f'the {config.phase} config has no section {name!r}; training needs it'
    )
  return config[name]
