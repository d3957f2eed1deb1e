"""Pipelines as folders: a config, weights and a codec, read and written.

pipe = loading.load('bouncing')
"""

import hashlib
import json
import os
import pathlib
import sys
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from hiar_jax import rollout
from hiar_jax.codecs import linear, tiny
from hiar_jax.codecs import vae as codecs_vae
from hiar_jax.denoiser import Denoiser
from hiar_jax.models import umt5
from hiar_jax.models import vae as models_vae
from hiar_jax.models.config import WanConfig
from hiar_jax.runtime import compiled_programs
from hiar_jax.sampling import choices, meshes, taught, tiling
from hiar_jax.sampling.video_pipeline import VideoPipeline
from hiar_jax.text import encoders
from hiar_jax.text import umt5 as text_umt5
from hiar_jax.weights import (
  conversion,
  conversion_cache,
  families,
  held,
  hub,
  layouts,
  lora_files,
  networks,
  other_vae,
  parts,
  released_family,
  releases,
  safetensors_io,
)

Path = str | os.PathLike

_BASE_MODEL_NOTE = (
  "{}: by its config.json these are the weights of Wan2.1's own transformer, "
  'which takes some 50 steps in both directions of time. As a student of a few '
  'steps it makes no good video; those of HiAR and Self-Forcing do'
)
# Of a codec, for telling it from others.
_DIGEST_BYTES = 2**20
# What a pipeline takes from a training config; the rest is about training.
SECTIONS = ('name', 'model', 'text', 'schedule', 'rollout', 'generate')
# All that `from_config` reads; of these, what is there.
READS = (*SECTIONS, 'vae', 'umt5', 'weights_dtype')


def load(
  name_or_path: Path | Sequence[Path],
  *,
  base: Path | Sequence[Path] | None = None,
  family: str | None = None,
  vae: Path | None = None,
  text_encoder: str | pathlib.Path = 'keep',
  text_cache: str | pathlib.Path | None = None,
  loras: Sequence[lora_files.Given] = (),
  mesh: jax.sharding.Mesh | str | None = None,
  weights_dtype: str | None = None,
  products_dtype: str | None = None,
  **chosen: Any,
) -> VideoPipeline:
  """Reads a pipeline with its trained weights.

  What is compiled from here on is kept for the next start, unless jax was told
  otherwise; see `compiled_programs`.

  Published weights are converted when they are first loaded, see
  `conversion_cache.cached`.

  Args:
    name_or_path: a folder written by `export` or
      `launch/convert_checkpoint.py`; a name of `known_names()`, if no folder
      here that holds a pipeline has it; or weights in the layout of Wan2.1,
      diffusers or Self-Forcing: a folder, a file, a hub's 'owner/name', or
      several of them that have different parts.
    base: published weights that have the parts which the others lack, such as
      the VAE and the text encoder of Wan2.1.
    family: what the weights were trained for, one of families.FAMILIES; None:
      what names and config.json tell, which is said in a line.
    vae: instead of the VAE that comes with the weights: a file of the tiny one
      (taew2_1.safetensors or .pth), another VAE, or a hub's name of either.
    text_encoder: see `from_config`.
    text_cache: likewise.
    loras: likewise.
    mesh: likewise.
    weights_dtype: likewise.
    products_dtype: likewise.
    **chosen: order, window, sink, height, width, ..., instead of what the
      weights were trained for: see `choices.Choices`.

  Raises:
    ValueError: if there is no such pipeline, or a file of it is damaged, or it
      is not told what the weights were trained for.
    FileNotFoundError: if a file is missing from the folder.
  """
  compiled_programs.keep()
  # What is wrong is said before files are read.
  says = [str(held.Held(weights_dtype, products_dtype))]
  if past := choices.Choices(**chosen).past_dtype:
    says.append(f'past in {past}')
  known = None if family is None else families.get(family)
  folder = None if base is not None else _own_folder(name_or_path)
  if folder is None:
    needs = ['transformer'] if vae is not None else ['transformer', 'vae']
    if text_encoder in text_umt5.CHOICES:
      needs += ['text_encoder', 'tokenizer']
    folder, known, loras = _converted(
      name_or_path, base, needs, known, loras, says
    )
  elif any(says):
    print(f'note: {name_or_path}: {_listed(says)}', file=sys.stderr)
  config = safetensors_io.read_json(folder / layouts.CONFIG_FILE)
  if config.get(layouts.IS_BASE_MODEL) and (known is None or known.is_base):
    print(f'note: {_BASE_MODEL_NOTE.format(name_or_path)}', file=sys.stderr)
  if known is not None:
    config |= known.sections()
  codec = folder / layouts.codec_file(config)
  if vae is not None:
    config.pop('vae', None)
    codec, sizes = other_vae.find(vae)
    config |= sizes
  pipeline = from_config(
    config,
    weights=folder / layouts.STUDENT_FILE,
    codec=codec,
    text_encoder=text_encoder,
    text_cache=text_cache,
    loras=loras,
    mesh=mesh,
    weights_dtype=weights_dtype,
    products_dtype=products_dtype,
  )
  pipeline = choices.apply(pipeline, **chosen)
  return pipeline if 'tiles' in chosen else tiling.fitting(pipeline)


def _own_folder(name: Path | Sequence[Path]) -> pathlib.Path | None:
  """The folder in our format that is meant; None: it is to be converted."""
  if not isinstance(name, str | os.PathLike):
    return None
  path = pathlib.Path(name).expanduser()
  if isinstance(name, str) and name in known_names():
    packaged = layouts.ASSETS / name
    if not (path / layouts.CONFIG_FILE).exists():
      return packaged
    print(
      f'note: {name!r} is {path.resolve()}, not the pipeline of that name that '
      'comes with the package',
      file=sys.stderr,
    )
  return path if conversion.is_ours(path) else None


def _converted(
  name: Path | Sequence[Path],
  base: Path | Sequence[Path] | None,
  needs: Sequence[str],
  family: families.Family | None,
  loras: Sequence[lora_files.Given],
  says: Sequence[str],
) -> tuple[pathlib.Path, families.Family, Sequence[lora_files.Given]]:
  """The converted folder of published weights, what they are, and their LoRAs.

  `says` is told beside that.
  """
  names = releases.split_names(name)
  for one in names if len(names) == 1 else ():
    _check_named(one)
  known = []

  def look(release: releases.Release) -> None:
    known.append(
      released_family.find(
        *(name, release, family),
        loras=loras,
        also=_listed(says),
      )
    )

  folder = conversion_cache.cached(name, base=base, needs=needs, check=look)
  return folder, *known[0]


def _listed(says: Sequence[str]) -> str:
  return ', '.join(filter(None, says))


def _check_named(name: Path) -> None:
  """Raises unless something of that name may be converted."""
  path = pathlib.Path(name).expanduser()
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
  loras: Sequence[lora_files.Given] = (),
  mesh: jax.sharding.Mesh | str | None = None,
  weights_dtype: str | None = None,
  products_dtype: str | None = None,
) -> VideoPipeline:
  """Builds a pipeline from a config and two files.

  Args:
    config: has SECTIONS, such as `configs/bouncing.py`, and may have
      'weights_dtype' (float32 if not), 'vae' (sizes of the VAE that is the
      codec) and 'umt5' (sizes of the text encoder, instead of 'text'; it and
      its tokenizer lie beside the weights); others are ignored.
    weights: of `networks.save_weights`.
    codec: of `linear.save_linear_codec`, of the VAE or, without 'vae' in the
      config, of a tiny one.
    text_encoder: 'keep', 'release' or a path, see `text_umt5.load_encoder`.
    text_cache: a folder for the states of prompts, see there.
    loras: LoRA files that are added to the weights, each as a path or as (path,
      scale); see weights/lora_files.py for what is read.
    mesh: of `meshes.make`, or a text such as 'stage=4,tensor=2': the weights
      are put where its passes take them, array by array, and a device has no
      more of them than its part; None: one device.
    weights_dtype: what they are held in, instead of the config's, see
      `held.Held`; LoRA files are added before.
    products_dtype: likewise.

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
  how = held.Held(weights_dtype, products_dtype)
  denoiser = Denoiser(WanConfig(**config['model']))
  _check_parts(config, denoiser, weights, codec)
  added = lora_files.open_all(loras, denoiser.config)
  encoder: Any
  if 'umt5' in config or text_encoder not in text_umt5.CHOICES:
    encoder = text_umt5.load_encoder(
      config, pathlib.Path(weights).parent, text_encoder, text_cache
    )
  else:
    encoder = encoders.open_encoder(config['text'])
  if encoder.dim != denoiser.config.text_dim:
    raise ValueError(
      f'{weights} takes text states of {denoiser.config.text_dim} numbers a '
      f'token, its text encoder gives {encoder.dim}'
    )
  given: dict[str, Any] = dict(choices.levels(config['schedule']))
  rollout_config = rollout.RolloutConfig(**given, **config['rollout'])
  # The shapes alone: random weights would take longer than reading real ones.
  abstract = jax.eval_shape(lambda: denoiser.init(jax.random.key(0)))
  abstract = how.shapes(abstract, config.get('weights_dtype', 'float32'))
  decoders: list[jax.Device] = []
  if isinstance(mesh, str):
    sizes = meshes.parse(mesh)
    mesh, decoders = meshes.make(sizes), meshes.decoders(sizes)
  meshes.check_model(denoiser.config, mesh)
  # Onto the devices array by array: the whole is not held twice.
  abstract = meshes.abstract_params(denoiser, abstract, mesh)
  # Before the codec: a folder that is not there has neither.
  networks.open_whole(weights)
  opened = _load_codec(codec, config)
  if len(decoders) > 1:
    if not isinstance(opened, codecs_vae.VAECodec):
      raise ValueError(
        f"decode={len(decoders)} divides the rows of Wan's VAE; {codec} is "
        'decoded by one device'
      )
    opened = opened.divided(decoders, denoiser.config.latent_height)
  elif decoders:
    opened = jax.device_put(opened, decoders[0])
  if opened.channels != denoiser.config.channels:
    raise ValueError(
      f'{weights} makes latents of {denoiser.config.channels} channels, and '
      f'{codec} takes {opened.channels}'
    )
  return VideoPipeline(
    name=config['name'],
    denoiser=denoiser,
    params=networks.load_weights(
      weights,
      abstract,
      change=lora_files.Merge(added) if added else None,
    ),
    encoder=taught.TaughtEncoder(
      encoder, config.get('prompts', {}).get('source')
    ),
    codec=opened,
    rollout=rollout_config,
    schedule=config['schedule'],
    identity=_identity(config, weights, codec, added, how),
    mesh=mesh,
    **config['generate'],
  )


def _identity(
  config: Mapping[str, Any],
  weights: Path,
  codec: Path,
  loras: Sequence[lora_files.LoRA],
  how: held.Held,
) -> str:
  """Differs between weights, by a part of them, and what they are held in."""
  digest = hashlib.sha256(networks.open_weights(weights).digest().encode())
  if 'vae' in config:
    digest.update(networks.open_weights(codec).digest().encode())
  else:
    with pathlib.Path(codec).open('rb') as file:
      digest.update(file.read(_DIGEST_BYTES))
  for one in loras:
    digest.update(f'{one.digest()} {one.scale}'.encode())
  digest.update(str(how).encode())
  return digest.hexdigest()


def _check_parts(
  config: Mapping[str, Any], denoiser: Denoiser, weights: Any, codec: Any
) -> None:
  """Raises ValueError if sizes in a config do not go together."""
  configs: dict[str, Any] = {'transformer': denoiser.config}
  names = {'transformer': weights}
  if 'vae' in config:
    configs['vae'], names['vae'] = models_vae.VAEConfig(**config['vae']), codec
  if 'umt5' in config:
    configs['text_encoder'] = umt5.UMT5Config(**config['umt5'])
    folder = pathlib.Path(weights).parent
    names['text_encoder'] = folder / layouts.TEXT_ENCODER_FILE
  parts.check(configs, names)


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
    config: of the training; its SECTIONS, 'vae' and where its prompts were
      from are written, the rest is left out.
    params: of the student, averaged.
    codec: that its latents are of.
    dtype: of the stored weights, such as float16; None keeps them as they are.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  names = (*SECTIONS, 'vae') if 'vae' in config else SECTIONS
  sections = {name: config[name] for name in names}
  if source := config.get('prompts', {}).get('source'):
    sections['prompts'] = {'source': source}
  (folder / layouts.CONFIG_FILE).write_text(
    json.dumps(sections, indent=2, default=dict) + '\n'
  )
  path = folder / layouts.codec_file(config)
  if isinstance(codec, codecs_vae.VAECodec):
    networks.save_weights(path, codec.params, dtype=dtype)
  else:
    linear.save_linear_codec(codec, path)
  networks.save_weights(folder / layouts.STUDENT_FILE, params, dtype=dtype)


def _load_codec(path: str | pathlib.Path, config: Mapping[str, Any]) -> Any:
  if 'vae' in config:
    return codecs_vae.load_vae_codec(
      path, models_vae.VAEConfig(**config['vae'])
    )
  if not pathlib.Path(path).exists():
    raise FileNotFoundError(f'no codec at {path}')
  if pathlib.Path(path).suffix != '.npz':
    return tiny.load_tiny_codec(path)
  # Asked first: np.load leaves a file open that turns out not to be an archive.
  if not zipfile.is_zipfile(path):
    raise ValueError(f'codec {path} is damaged')
  try:
    return linear.load_linear_codec(path)
  except (KeyError, ValueError, zipfile.BadZipFile) as error:
    raise ValueError(f'codec {path} is damaged ({error})') from error
