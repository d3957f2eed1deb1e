"""Pipelines as folders: a config, weights and a codec, read and written.

pipe = loading.load('bouncing')
"""

import json
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import jax

from hiar_jax import noise_schedule, rollout
from hiar_jax.codecs import linear
from hiar_jax.codecs import vae as codecs_vae
from hiar_jax.denoiser import Denoiser
from hiar_jax.models import vae
from hiar_jax.models.config import WanConfig
from hiar_jax.runtime import compiled_programs
from hiar_jax.sampling.video_pipeline import VideoPipeline
from hiar_jax.text import encoders
from hiar_jax.text import umt5 as text_umt5
from hiar_jax.weights import (
  conversion,
  conversion_cache,
  hub,
  layouts,
  networks,
  releases,
  safetensors_io,
)

# What a pipeline takes from a training config; the rest is about training.
SECTIONS = ('name', 'model', 'text', 'schedule', 'rollout', 'generate')
# All that `from_config` reads; of these, what is there.
READS = (*SECTIONS, 'vae', 'umt5', 'weights_dtype')


def load(
  name_or_path: str | pathlib.Path,
  *,
  base: str | pathlib.Path | None = None,
  text_encoder: str | pathlib.Path = 'keep',
  text_cache: str | pathlib.Path | None = None,
) -> VideoPipeline:
  """Reads a pipeline with its trained weights.

  What is compiled from here on is kept for the next start, unless jax was told
  otherwise; see `compiled_programs`.

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
  compiled_programs.keep()
  folder = layouts.ASSETS / name_or_path
  if not (folder / layouts.CONFIG_FILE).exists():
    folder = pathlib.Path(name_or_path)
  if base is not None or not conversion.is_ours(folder):
    folder = _converted(name_or_path, base)
  path = folder / layouts.CONFIG_FILE
  config = safetensors_io.read_json(path)
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
