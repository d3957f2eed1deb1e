"""Adapters that were trained here, to a LoRA file that others read and back."""

# I inputs, O outputs, R rank

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from hiar_jax.models import lora
from hiar_jax.models.config import WanConfig
from hiar_jax.weights import identity, lora_files, safetensors_io, tables

# Whose names `save` writes: 'comfyui' has one for every parameter.
NAMINGS = ('comfyui', 'diffusers')
_PREFIX = {'comfyui': 'diffusion_model.', 'diffusers': 'transformer.'}
_SLOTS = {'comfyui': 'wan', 'diffusers': 'diffusers'}


def save(
  path: str | os.PathLike,
  adapters: Mapping[str, Any],
  config: lora.LoRAConfig,
  model: WanConfig,
  *,
  naming: str = 'comfyui',
  dtype: str | None = None,
) -> None:
  """Writes adapters under others' names.

  Args:
    path: the .safetensors file.
    adapters: see models/lora.py.
    config: of them.
    model: of the network.
    naming: one of NAMINGS. 'comfyui' has lora_down, lora_up, alpha, diff and
      diff_b; 'diffusers' lora_A and lora_B with alpha / rank in it, and no
      names but for matrices.
    dtype: of the stored numbers; None: float32.

  Raises:
    ValueError: if the naming is unknown or has no name for an adapter.
  """
  if naming not in NAMINGS:
    raise ValueError(f'naming={naming!r} is not one of {NAMINGS}')
  flat = {k: np.asarray(v) for k, v in tables.flatten(adapters).items()}
  alpha = np.asarray(config.scale * config.rank)
  arrays: dict[str, np.ndarray] = {}
  for name, slot in identity.expected_slots(model, _SLOTS[naming]).items():
    of_layer = lambda a, i=slot.index: a if i is None else a[i]
    module, _, last = name.rpartition('.')
    key = _PREFIX[naming] + (module if last in ('weight', 'bias') else name)
    down, up = lora.factors(slot.path)
    if down in flat and last == 'weight':
      low, high = of_layer(flat[down]), of_layer(flat[up])
      low = slot.to_foreign(low).reshape(config.rank, *slot.shape[1:])
      high = high.T.reshape(*high.T.shape, *(1 for _ in slot.shape[2:]))
      if naming == 'diffusers':
        arrays[f'{key}.lora_A.weight'] = low
        arrays[f'{key}.lora_B.weight'] = config.scale * high
      else:
        arrays[f'{key}.lora_down.weight'] = low
        arrays[f'{key}.lora_up.weight'] = high
        arrays[f'{key}.alpha'] = alpha
    elif slot.path in flat:
      if naming == 'diffusers':
        raise ValueError(
          f"diffusers' LoRA files have no name for {slot.path}: take naming="
          "'comfyui', or targets that are matrices"
        )
      kind = 'diff_b' if last == 'bias' else 'diff'
      arrays[f'{key}.{kind}'] = slot.to_foreign(of_layer(flat[slot.path]))
  stored = {
    name: np.asarray(array, dtype or np.float32)
    for name, array in arrays.items()
  }
  with safetensors_io.Writer(
    path, {name: (a.shape, a.dtype) for name, a in stored.items()}
  ) as writer:
    for name, array in stored.items():
      writer.write(name, array)


def read_adapters(
  path: str | os.PathLike, config: lora.LoRAConfig, model: WanConfig
) -> dict[str, Any]:
  """Adapters of a config from a file that has just these.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: see `lora_files.open_lora`; or if the file has other targets or
      ranks.
  """
  opened = lora_files.open_lora(path, model)
  shapes = lora.shapes(config, identity.abstract_params(model))
  found = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
  filled = set()
  for ours, index in opened.places:
    where = ... if index is None else index
    factors = opened.factors(ours, index)
    if factors is None:
      if ours in found:
        found[ours][where] = opened.added(ours, index)
        filled.add(ours)
        continue
      raise ValueError(f'{path} has a difference of {ours}, lora.targets not')
    down, up, scale = factors
    names = lora.factors(ours)
    if names[0] not in found:
      raise ValueError(f'{path} has an adapter of {ours}, lora.targets not')
    if down.shape[1] != config.rank:
      raise ValueError(
        f'{path} has rank {down.shape[1]} for {ours}, and lora.rank is '
        f'{config.rank}'
      )
    found[names[0]][where] = down
    found[names[1]][where] = up * (scale / config.scale)
    filled |= set(names)
  if missing := sorted(found.keys() - filled):
    raise ValueError(
      f'{path} has nothing for {missing}, which lora.targets has'
    )
  return tables.unflatten(found)
