"""A trained student beside the parts that it was trained with, as a folder.

The VAE, the text encoder and its tokenizer are those of a folder that
`conversion` made; on one disk they take no room a second time.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

from hiar_jax.models.config import WanConfig
from hiar_jax.runtime import provenance
from hiar_jax.weights import conversion, layouts, safetensors_io

# Of config.json: what training says, and what the parts say.
_TRAINED = ('name', 'model', 'schedule', 'rollout', 'generate')
_PARTS = {'vae': 'vae', 'text_encoder': 'umt5'}


def write(
  out: str | os.PathLike,
  *,
  weights: str | os.PathLike,
  config: Mapping[str, Any],
  base: str | os.PathLike,
  dtype: str | None = None,
) -> None:
  """Writes a folder that `hiar_jax.load` reads.

  Args:
    out: the folder, made if it does not exist.
    weights: of the student, averaged.
    config: of its training.
    base: a converted folder with the VAE, and maybe the text encoder.
    dtype: of the stored weights, one of conversion.DTYPES; None: float32.

  Raises:
    FileNotFoundError: if weights or base are missing.
    ValueError: naming every array that does not fit, or if the base has no VAE
      or latents of other channels.
  """
  out, base = pathlib.Path(out), pathlib.Path(base)
  if not (base / layouts.CONFIG_FILE).exists():
    raise FileNotFoundError(
      f'no parts in {base}; `hiar-jax convert` makes such folders of published '
      'weights'
    )
  parts = safetensors_io.read_json(base / layouts.CONFIG_FILE)
  model = WanConfig(**config['model'])
  if 'vae' not in parts:
    raise ValueError(f'{base} has no VAE to go with the student')
  if parts['vae']['z_dim'] != model.channels:
    raise ValueError(
      f'the VAE in {base} makes latents of {parts["vae"]["z_dim"]} channels, '
      f'and the student has {model.channels}'
    )
  reader = conversion.open_ours(weights, model)
  out.mkdir(parents=True, exist_ok=True)
  arrays = {
    name: (entry.shape, np.dtype(dtype or entry.dtype))
    for name, entry in reader.entries.items()
  }
  with safetensors_io.Writer(out / layouts.STUDENT_FILE, arrays) as writer:
    for name, (_, stored) in arrays.items():
      writer.write(name, reader.read(name).astype(stored, copy=False))
  told = {name: config[name] for name in _TRAINED}
  for part, section in _PARTS.items():
    if section not in parts:
      continue
    told[section] = parts[section]
    # Of shards and their index, or of an orbax checkpoint, all.
    for file in sorted(base.glob(f'{part}[.-]*')):
      _same(file, out / file.name)
  if (base / layouts.TOKENIZER).is_dir():
    conversion.copy_tokenizer(base / layouts.TOKENIZER, out / layouts.TOKENIZER)
  told['weights_dtype'] = model.dtype
  # Last: a folder that has it is whole.
  text = json.dumps(provenance.jsonable(told), indent=2)
  (out / layouts.CONFIG_FILE).write_text(text + '\n')


def _same(source: str | os.PathLike, target: str | os.PathLike) -> None:
  """One file under a second name, or a copy where that cannot be."""
  source, target = pathlib.Path(source), pathlib.Path(target)
  if source.is_dir():
    shutil.copytree(source, target, copy_function=_same, dirs_exist_ok=True)
    return
  target.unlink(missing_ok=True)
  try:
    os.link(source, target)
  except OSError:
    shutil.copy2(source, target)
