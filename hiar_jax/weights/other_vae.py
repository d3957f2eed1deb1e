"""A VAE that is not the one of the weights: a tiny one, or a whole one."""

import os
import pathlib
from typing import Any

from hiar_jax.weights import (
  conversion_cache,
  hub,
  layouts,
  releases,
  safetensors_io,
  tiny_vae_files,
)


def find(
  name: str | os.PathLike,
) -> tuple[pathlib.Path, dict[str, Any]]:
  """The file of a VAE's weights, and what it changes in a pipeline's config.

  Args:
    name: a file, a folder that has a VAE, or a hub's name of either.

  Returns:
    A file as published and nothing, for a tiny one; else a converted one and
    the section 'vae' with its sizes.

  Raises:
    FileNotFoundError, ValueError: if there is none, or it is something else.
  """
  path = pathlib.Path(name).expanduser()
  if not path.exists() and hub.is_name(str(name)):
    path = hub.download(str(name))
  if path.is_file() and tiny_vae_files.is_one(path):
    return path, {}
  if releases.find(path, as_base=True).vae is None:
    raise ValueError(f'{name} has no VAE')
  folder = conversion_cache.cached(path, needs=('vae',))
  config = safetensors_io.read_json(folder / layouts.CONFIG_FILE)
  return folder / layouts.OWN_FILES['vae'], {'vae': config['vae']}
