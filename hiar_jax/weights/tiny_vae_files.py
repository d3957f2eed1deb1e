"""Files of the tiny video autoencoder, read into `models.tiny_vae`."""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax.models import tiny_vae
from hiar_jax.weights import foreign, tables

# Found in no other network that is read here.
_MARK = 'decoder.3.conv.0.weight'


def is_one(path: pathlib.Path) -> bool:
  """Whether a file of weights is a tiny autoencoder.

  Raises:
    ValueError: if the file is damaged, or none of weights.
  """
  return _MARK in foreign.StateDict(path)


def read(path: str | os.PathLike) -> dict[str, jax.Array]:
  """Parameters, float32.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: naming every array that is unknown, missing or misshapen.
  """
  state = foreign.StateDict(pathlib.Path(path))
  wanted, problems = tiny_vae.shapes(), []
  for name, shape in wanted.items():
    found = state.shapes.get(name)
    if found is None:
      problems.append(f'{name!r} is missing')
    elif found != shape and not _has_more_rows(found, shape):
      problems.append(f'{name!r} has shape {found}, not {shape}')
  problems += [f'{name!r} is unknown' for name in state.shapes.keys() - wanted]
  if problems:
    raise ValueError(
      f'{path} is not what a tiny VAE needs: {tables.report(problems)}'
    )
  params = {}
  for name, shape in wanted.items():
    # Of a grow layer with more rows than needed the last ones count.
    array = state.read(name)[-shape[0] :].astype(np.float32)
    if not np.isfinite(array).all():
      raise ValueError(f'{path}: {name!r} has values that are not finite')
    params[name] = jnp.asarray(
      array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
    )
  return params


def _has_more_rows(found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
  """Whether it is a 1x1 kernel that is larger in its outputs alone."""
  return found[1:] == shape[1:] and shape[2:] == (1, 1) and found[0] > shape[0]
