"""Stored numbers of the public PyTorch code, and cases that compare with them.

A `*_cases.py` module lists `CASES`: each names a stored array and the function
that computes ours. `parity_test.py` and `table.py` go over the same lists.
"""

# B batch, F frames, h w latent rows and columns, C channels

import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from hiar_jax.denoiser import Denoiser
from hiar_jax.models.config import WanConfig
from hiar_jax.weights import tables

_GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'

FORWARD = 2e-5  # One pass of a network.
PIPELINE = 1e-4  # Many passes, each fed by the one before.
GRADIENT = 1e-4  # Of the array's own norm and largest entry.
FORMULA = 1e-6  # Of the array's largest entry: float32 rounding.


class Case(NamedTuple):
  """One stored array and ours.

  Attributes:
    file: stem of the file in tests/golden.
    array: name of the stored array.
    run: computes our arrays by stored name, in the stored layout; cached, so
      that the arrays of one run share it.
    tolerance: largest error.
    relative: error is the larger of |a - b| / |b| in the 2-norm and in the
      maximum norm; otherwise the largest absolute difference.
  """

  file: str
  array: str
  run: Callable[[], Mapping[str, jax.Array]]
  tolerance: float
  relative: bool = False

  def __str__(self) -> str:
    return f'{self.file}-{self.array.removeprefix("out/")}'

  def error(self) -> float:
    """Distance of ours from the stored array.

    Raises:
      ValueError: if the shapes differ.
    """
    ours = np.asarray(self.run()[self.array], np.float64)
    stored = load(self.file)[self.array].astype(np.float64)
    if ours.shape != stored.shape:
      raise ValueError(
        f'{self}: ours has shape {ours.shape}, stored is {stored.shape}'
      )
    difference = np.abs(ours - stored)
    if not self.relative:
      return float(difference.max())
    return float(
      max(
        np.linalg.norm(difference) / np.linalg.norm(stored),
        difference.max() / np.abs(stored).max(),
      )
    )


def cases(
  file: str,
  run: Callable[[], Mapping[str, jax.Array]],
  arrays: Iterable[str],
  tolerance: float,
  relative: bool = False,
) -> list[Case]:
  """A case for each of the arrays that one run yields; `run` is cached."""
  run = functools.cache(run)
  return [Case(file, name, run, tolerance, relative) for name in arrays]


@functools.cache
def load(file: str) -> dict[str, np.ndarray]:
  """All arrays of tests/golden/FILE.npz."""
  with np.load(_GOLDEN / f'{file}.npz') as arrays:
    return {name: arrays[name] for name in arrays.files}


def files() -> list[str]:
  """Stems of all stored files."""
  return sorted(path.stem for path in _GOLDEN.glob('*.npz'))


def stored(file: str, prefix: str) -> list[str]:
  """Names of the stored arrays that start with `prefix`."""
  return [name for name in load(file) if name.startswith(prefix)]


def state_dict(file: str, prefix: str = 'w') -> dict[str, np.ndarray]:
  """Stored weights by their foreign names."""
  return {
    name.removeprefix(f'{prefix}/'): load(file)[name]
    for name in stored(file, f'{prefix}/')
  }


@functools.cache
def network(file: str, prefix: str = 'w') -> tuple[Denoiser, dict]:
  """The stored Wan network as (denoiser, params)."""
  sizes = json.loads(str(load(file)['config']))[prefix]
  denoiser = Denoiser(
    WanConfig(latent_height=4, latent_width=6, channels=4, **sizes)
  )
  params = tables.convert_state_dict(
    state_dict(file, prefix),
    tables.WAN_RULES,
    jax.eval_shape(denoiser.init, jax.random.key(0)),
  )
  return denoiser, params


def from_model(x: np.ndarray) -> np.ndarray:
  """[B, C, F, h, w], the layout of the stored networks, to ours."""
  return np.moveaxis(x, 1, -1)


def to_model(x_BFhwC: jax.Array) -> np.ndarray:
  """Inverse of `from_model`."""
  return np.moveaxis(np.asarray(x_BFhwC), -1, 1)


def from_pipeline(x: np.ndarray) -> np.ndarray:
  """[..., F, C, h, w], the layout of the stored pipelines, to ours."""
  return np.moveaxis(x, -3, -1)


def to_pipeline(x_BFhwC: jax.Array) -> np.ndarray:
  """Inverse of `from_pipeline`."""
  return np.moveaxis(np.asarray(x_BFhwC), -1, -3)


_UNDO = {
  'keep': lambda w: w,
  'linear': lambda w: w.T,
  # [ph * pw * in, out] -> [out, in, 1, ph, pw].
  'patch': lambda w: np.moveaxis(
    w.reshape(1, 2, 2, -1, w.shape[-1]), (-1, -2), (0, 1)
  ),
  'drop_first': lambda w: w[None],
}


def foreign_parameter(params: dict, name: str) -> np.ndarray:
  """Entry of our parameter tree, named and laid out as in the state dict."""
  path, index, transform = tables.target(name, tables.WAN_RULES)
  for key in path.split('/'):
    params = params[key]
  array = np.asarray(params)
  return _UNDO[transform](array if index is None else array[index])


def gradients_by_name(
  file: str, prefix: str, gradients: dict
) -> dict[str, np.ndarray]:
  """Our gradients of those parameters whose gradients are stored."""
  return {
    name: foreign_parameter(gradients, name.removeprefix(prefix))
    for name in stored(file, prefix)
  }
