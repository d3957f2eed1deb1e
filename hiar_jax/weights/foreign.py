"""State dicts that others wrote, read one array at a time.

Safetensors files, single or in shards, and torch pickles (.pt, .pth, .bin).
Only the latter need torch; they are mapped into memory, not read, and opened
with weights_only, so that no code in them runs.
"""

import collections
import pathlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from hiar_jax.weights import safetensors_io
from hiar_jax.weights.tables import Shape

PICKLES = ('.pt', '.pth', '.bin', '.ckpt')
# What a training run of Self-Forcing, CausVid or HiAR keeps its network under,
# best first: the average is what is sampled from.
MEMBERS = ('generator_ema', 'generator', 'model', 'state_dict', 'module')

_WRAPPERS = re.compile(
  r'(?<![^.])(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.'
)
_PREFIXES = re.compile(r'^(?:(?:model|module|generator|diffusion_model)\.)+')


class StateDict:
  """Foreign names and shapes; an array is read when it is asked for.

  Attributes:
    path: of the file, the first shard or the index.
    shapes: name -> shape.
    dtypes: name -> dtype.
    files: name -> file that holds it.
  """

  def __init__(self, path: pathlib.Path, *, member: str | None = None):
    """Opens a file, or all shards of one.

    Args:
      path: a safetensors file, one of its shards, its index, or a pickle.
      member: which network of a pickle that holds several, such as
        'generator'; None: the first of MEMBERS that is there.

    Raises:
      FileNotFoundError: if a file or a shard is missing.
      ValueError: if a file is damaged, holds more than arrays, or has no such
        member; or if torch is needed and not installed.
    """
    self.path = pathlib.Path(path)
    if self.path.suffix in PICKLES:
      arrays = _load_pickle(self.path, member)
      files = {name: str(self.path) for name in arrays}
      self._read = lambda name: _to_numpy(arrays[name])
      shapes = {name: tuple(t.shape) for name, t in arrays.items()}
      dtypes = {name: _dtype(t) for name, t in arrays.items()}
    else:
      reader = safetensors_io.Reader(self.path)
      self._read = reader.read
      files = {name: str(e.file) for name, e in reader.entries.items()}
      shapes = {name: e.shape for name, e in reader.entries.items()}
      dtypes = {name: e.dtype for name, e in reader.entries.items()}
    self._original = _clean_names(shapes, self.path)
    pick = lambda values: {k: values[v] for k, v in self._original.items()}
    self.shapes: dict[str, Shape] = pick(shapes)
    self.dtypes: dict[str, np.dtype] = pick(dtypes)
    self.files: dict[str, str] = pick(files)

  def read(self, name: str) -> np.ndarray:
    return self._read(self._original[name])

  def rename(self, aliases: Mapping[str, str]) -> None:
    """Gives arrays their first names; one that is there under both is one."""
    for alias, name in aliases.items():
      if alias not in self._original:
        continue
      for values in (self._original, self.shapes, self.dtypes, self.files):
        value = values.pop(alias)
        values.setdefault(name, value)


def clean_name(name: str) -> str:
  """A parameter's name without what wrappers of the network put into it."""
  return _PREFIXES.sub('', _WRAPPERS.sub('', name), count=1)


def _clean_names(names, path: pathlib.Path) -> dict[str, str]:
  """Clean name -> name in the file."""
  original = {clean_name(name): name for name in names}
  if len(original) < len(names):
    twice = collections.Counter(map(clean_name, names)).most_common(1)[0][0]
    raise ValueError(
      f'{path} has {twice!r} more than once, under different prefixes'
    )
  return original


def _load_pickle(path: pathlib.Path, member: str | None) -> dict[str, Any]:
  """Name -> tensor of one network in a pickle."""
  if not path.is_file():
    raise FileNotFoundError(f'no weights at {path}')
  try:
    import torch
  except ImportError:
    raise ValueError(
      f'{path} is a torch pickle, and torch is not installed: '
      "pip install 'hiar_jax[convert]'"
    ) from None
  try:
    loaded = torch.load(
      path,
      map_location='cpu',
      weights_only=True,
      # Files from before torch 1.6 are no archives and cannot be mapped.
      mmap=zipfile.is_zipfile(path),
    )
  except pickle.UnpicklingError as error:
    culprit = re.search(r'GLOBAL (\S+)', str(error))
    what = f'{culprit[1]}' if culprit else 'objects that are no arrays'
    raise ValueError(
      f'{path} was not opened: it is damaged, or holds code ({what}), which '
      'could do anything; ask its author for safetensors'
    ) from error
  except (RuntimeError, EOFError) as error:
    raise ValueError(f'{path} is damaged: {str(error)[:200]}') from error
  return _choose_member(path, loaded, member, torch.Tensor)


def _choose_member(path, loaded, member: str | None, tensor: type) -> dict:
  state = loaded
  if member is not None:
    networks = [k for k, v in _items(loaded) if isinstance(v, Mapping) and v]
    if member not in networks:
      raise ValueError(f'{path} has no {member!r}; it has {networks}')
    state = loaded[member]
  while not any(isinstance(v, tensor) for _, v in _items(state)):
    inner = [m for m in MEMBERS if m in dict(_items(state)) and state[m]]
    if not inner:
      raise ValueError(
        f'{path} has no weights; it has {[k for k, _ in _items(state)][:10]}'
      )
    state = state[inner[0]]
  return {k: v for k, v in state.items() if isinstance(v, tensor)}


def _items(value):
  return value.items() if isinstance(value, Mapping) else ()


def _dtype(tensor) -> np.dtype:
  name = str(tensor.dtype).removeprefix('torch.')
  if name == 'bfloat16':
    return np.dtype(ml_dtypes.bfloat16)
  if name in ('float8_e4m3fn', 'float8_e5m2'):
    return np.dtype(getattr(ml_dtypes, name))
  return np.dtype(name)


def _to_numpy(tensor) -> np.ndarray:
  import torch

  tensor = tensor.detach().contiguous()
  dtype = _dtype(tensor)
  if dtype.kind == 'V' or dtype == ml_dtypes.bfloat16:
    # NumPy has no such type of its own: the bits travel as integers.
    bits = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    return tensor.view(bits).numpy().view(dtype)
  return tensor.numpy()
