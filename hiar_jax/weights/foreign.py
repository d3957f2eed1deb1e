"""State dicts that others wrote, read one array at a time.

Safetensors files and torch pickles (.pt, .pth, .bin), single or in shards; the
first bytes of a file tell which it is. Only pickles need torch; they are mapped
into memory, not read, and opened with weights_only, so that no code in them
runs.
"""

import collections
import functools
import importlib
import io
import math
import os
import pathlib
import pickle
import re
import struct
import zipfile
from collections.abc import Collection, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from hiar_jax.weights import safetensors_io, wrong_files
from hiar_jax.weights.tables import Shape

# The sentencepiece model in ComfyUI's files of umT5, as bytes.
TOKENIZER_ARRAY = 'spiece_model'
PICKLES = ('.pt', '.pth', '.bin', '.ckpt')
# What a training run of Self-Forcing, CausVid or HiAR keeps its network under,
# best first: the average is what is sampled from.
AVERAGE = 'generator_ema'
MEMBERS = (
  *(AVERAGE, 'generator', 'model', 'state_dict', 'module'),
  # LongLive's trainer keeps the LoRA of its network beside that of its critic.
  'generator_lora',
)

_WRAPPERS = re.compile(
  r'(?<![^.])(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.'
)
# PEFT wraps what it adapts as base_model.model, and each layer as base_layer.
_LAYER_WRAPPER = re.compile(r'\.base_layer(?=\.(?:weight|bias)$)')
_PREFIXES = re.compile(
  r'^(?:(?:model|module|generator|generator_ema|critic|diffusion_model|'
  r'base_model|net|pipe|dit|transformer)\.)+'
)
# Tables that a network computes and some programs save with it.
_BUFFERS = re.compile(
  r'(?:^|\.)(?:freqs|freqs_cis|freqs_cos|freqs_sin|inv_freq)$'
)
# Beside a quantised weight, per tensor or per row: ComfyUI's and Kijai's files,
# LightX2V's and later ones of ComfyUI.
_SCALES = ('scale_weight', 'weight_scale')
# What else such files have: scales of inputs, and marks of the format.
_NO_WEIGHTS = re.compile(
  r'(?:^|\.)(?:scaled_fp8|scale_input|input_scale|comfy_quant)$'
)
_FOLDED = np.dtype(ml_dtypes.bfloat16)
PICKLE_INDEX = '.bin' + safetensors_io.INDEX_SUFFIX
_PICKLE_SHARD = re.compile(r'(.*)-(\d{5})-of-(\d{5})(\.bin|\.pth?)')


class StateDict:
  """Foreign names and shapes; an array is read when it is asked for.

  Weights in float8, with scales or without, and in int8 with scales are read as
  bfloat16.

  Attributes:
    path: of the file, the first shard or the index.
    shapes: name -> shape.
    dtypes: name -> dtype.
    files: name -> file that holds it.
    names: all that are in the file, as there.
  """

  def __init__(self, path: pathlib.Path, *, member: str | None = None):
    """Opens a file, or all shards of one.

    Args:
      path: a safetensors file, one of its shards, its index, or a pickle.
      member: which network of a file that holds several, such as
        'generator'; None: the first of MEMBERS that is there. In safetensors
        they are told by the first part of a name.

    Raises:
      FileNotFoundError: if a file or a shard is missing.
      ValueError: if a file is damaged, holds more than arrays, or has no such
        member; or if torch is needed and not installed.
    """
    self.path = pathlib.Path(path)
    if self.path.is_symlink() and not self.path.exists():
      raise FileNotFoundError(
        f'{self.path} is a link to {os.readlink(self.path)}, which is not there'
      )
    if _is_pickle(self.path):
      arrays: dict[str, Any] = {}
      files: dict[str, str] = {}
      for file in _pickle_files(self.path):
        loaded = _load_pickle(file, member)
        arrays |= loaded
        files |= {name: str(file) for name in loaded}
      self._read = lambda name: _to_numpy(arrays[name])
      shapes = {name: tuple(t.shape) for name, t in arrays.items()}
      dtypes = {name: _dtype(t) for name, t in arrays.items()}
    else:
      reader = safetensors_io.Reader(self.path)
      self._read = reader.read
      files = {name: str(e.file) for name, e in reader.entries.items()}
      shapes = {name: e.shape for name, e in reader.entries.items()}
      dtypes = {name: e.dtype for name, e in reader.entries.items()}
    self.names = frozenset(shapes)
    shapes = {k: v for k, v in shapes.items() if not _BUFFERS.search(k)}
    names = list(shapes)
    if not _is_pickle(self.path):
      names = _names_of_member(self.path, names, member)
    self._original = _clean_names(names, self.path)
    pick = lambda values: {k: values[v] for k, v in self._original.items()}
    self.shapes: dict[str, Shape] = pick(shapes)
    self.dtypes: dict[str, np.dtype] = pick(dtypes)
    self.files: dict[str, str] = pick(files)
    # Names in the file: a quantised weight -> its scale, or None.
    self._scale_of = self._fold_scales()

  def read(self, name: str) -> np.ndarray:
    original = self._original[name]
    array = self._read(original)
    if original not in self._scale_of:
      return array
    array, scale = array.astype(np.float32), self._scale_of[original]
    if scale is not None:
      by_row = self._read(scale).astype(np.float32).reshape(-1)
      array *= by_row.reshape(-1, *(1 for _ in array.shape[1:]))
    return array.astype(_FOLDED)

  def is_quantised(self, name: str) -> bool:
    """Whether an array has fewer bits in the file than it is read with."""
    return self._original[name] in self._scale_of

  def _fold_scales(self) -> dict[str, str | None]:
    """Takes the scales of quantised weights out of the names.

    Raises:
      ValueError: naming a weight whose scales are neither one nor one a row.
    """
    scale_of: dict[str, str | None] = {}
    for name, dtype in list(self.dtypes.items()):
      is_float8 = str(dtype).startswith('float8')
      if _NO_WEIGHTS.search(name) or not (is_float8 or dtype == np.int8):
        continue
      stem = name.rpartition('.')[0]
      scales = [s for s in (f'{stem}.{end}' for end in _SCALES) if s in self]
      if scales:
        shape, scale = self.shapes[name], scales[0]
        size = math.prod(self.shapes[scale])
        if size not in (1, *shape[:1]):
          raise ValueError(
            f'{self.path}: {scale!r} has shape {self.shapes[scale]} for a '
            f'weight of {shape}, neither one scale nor one for each row; take '
            'the bfloat16 or float16 file of the same release'
          )
        scale_of[self._original[name]] = self._original[scale]
        self.drop(scale)
      elif is_float8:
        scale_of[self._original[name]] = None
      else:
        continue
      self.dtypes[name] = _FOLDED
    if scale_of:
      for name in [n for n in self.shapes if _NO_WEIGHTS.search(n)]:
        self.drop(name)
    return scale_of

  def __contains__(self, name: str) -> bool:
    return name in self.shapes

  def rename(self, aliases: Mapping[str, str]) -> None:
    """Gives arrays their first names; one that is there under both is one."""
    for alias, name in aliases.items():
      if alias not in self._original:
        continue
      every: tuple[dict[str, Any], ...] = (
        *(self._original, self.shapes, self.dtypes, self.files),
      )
      for values in every:
        value = values.pop(alias)
        values.setdefault(name, value)

  def read_bytes(self, name: str) -> bytes:
    """The bytes of an array, dropped or not, by its name in the file."""
    return self._read(name).tobytes()

  def drop(self, name: str) -> None:
    """Leaves out an array that is no parameter."""
    for values in (self._original, self.shapes, self.dtypes, self.files):
      values.pop(name, None)

  def strip_prefix(self) -> bool:
    """Takes off the first word of all names, if it is one and the same."""
    firsts = {name.partition('.')[0] for name in self.shapes}
    if len(firsts) != 1 or any('.' not in name for name in self.shapes):
      return False
    for attribute in ('_original', 'shapes', 'dtypes', 'files'):
      values = getattr(self, attribute)
      short = {k.partition('.')[2]: v for k, v in values.items()}
      setattr(self, attribute, short)
    return True


def _names_of_member(
  path: pathlib.Path, names: list[str], member: str | None
) -> list[str]:
  """The names in a safetensors file that are of one network of several."""
  if member is None:
    # Under any other first name there is one network, as far as is known.
    averaged = any(name.startswith(f'{AVERAGE}.') for name in names)
    member = AVERAGE if averaged else None
  if member is None:
    return names
  chosen = [name for name in names if name.startswith(f'{member}.')]
  if not chosen:
    heads = sorted({name.partition('.')[0] for name in names})
    raise ValueError(f'{path} has no {member!r}; it has {heads[:10]}')
  return chosen


def clean_name(name: str) -> str:
  """A parameter's name without what wrappers of the network put into it."""
  name = _LAYER_WRAPPER.sub('', _WRAPPERS.sub('', name))
  return _PREFIXES.sub('', name, count=1)


def _is_pickle(path: pathlib.Path) -> bool:
  """Told by the file itself, which may be named as the other format is."""
  if path.name.endswith(PICKLE_INDEX):
    return True
  if not path.is_file():
    return path.suffix in PICKLES
  if path.name.endswith(safetensors_io.INDEX_SUFFIX):
    return False
  if wrong_files.is_pickle(path):
    return True
  return path.suffix in PICKLES and not wrong_files.is_safetensors(path)


def _pickle_files(path: pathlib.Path) -> list[pathlib.Path]:
  """The file, or all shards of its index or of its name's number."""
  if path.name.endswith(PICKLE_INDEX):
    return list(safetensors_io.indexed(path))
  shard = _PICKLE_SHARD.fullmatch(path.name)
  if not shard:
    return [path]
  stem, count, suffix = shard[1], int(shard[3]), shard[4]
  files = [
    path.with_name(f'{stem}-{i:05}-of-{count:05}{suffix}')
    for i in range(1, count + 1)
  ]
  missing = [str(file) for file in files if not file.exists()]
  if missing:
    raise FileNotFoundError(
      f'{len(missing)} of {count} shards are missing: ' + ', '.join(missing)
    )
  return files


def _clean_names(names: Collection[str], path: pathlib.Path) -> dict[str, str]:
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
  what = None if wrong_files.is_pickle(path) else wrong_files.describe(path)
  if what := what or wrong_files.describe_bytes(path):
    raise ValueError(f'{path} is {what}')
  try:
    import torch
  except ImportError:
    raise ValueError(
      f'{path} is a torch pickle, and torch is not installed: '
      "pip install 'hiar_jax[convert]'"
    ) from None
  try:
    loaded = _torch_load(torch, path)
  except pickle.UnpicklingError as error:
    culprit = re.search(r'GLOBAL (\S+)', str(error))
    what = f'{culprit[1]}' if culprit else 'objects that are no arrays'
    raise ValueError(
      f'{path} was not opened: it is damaged, or holds code ({what}), which '
      'could do anything; ask its author for safetensors'
    ) from error
  except (RuntimeError, EOFError, OSError, struct.error) as error:
    raise ValueError(f'{path} is damaged: {str(error)[:200]}') from error
  return _choose_member(path, loaded, member, torch.Tensor)


def _torch_load(torch: Any, path: pathlib.Path) -> Any:
  load = functools.partial(torch.load, map_location='cpu', weights_only=True)
  if path.suffix == '.safetensors':
    # By its name torch would take it for that.
    load = functools.partial(load, io.BytesIO(path.read_bytes()))
  else:
    # Files from before torch 1.6 are no archives and cannot be mapped.
    load = functools.partial(load, path, mmap=zipfile.is_zipfile(path))
  try:
    return load()
  except pickle.UnpicklingError as error:
    if 'torch.distributed.tensor' not in str(error):
      raise
  # FSDP2's DTensors are known to it once this is imported.
  importlib.import_module('torch.distributed.tensor')

  return load()


def _choose_member(
  path: pathlib.Path, loaded: Any, member: str | None, tensor: type
) -> dict[str, Any]:
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
  return {
    k: _whole(path, k, v) for k, v in state.items() if isinstance(v, tensor)
  }


def _whole(path: pathlib.Path, name: str, tensor: Any) -> Any:
  """The tensor itself; of an FSDP2 DTensor what this process has, if all."""
  if not hasattr(tensor, 'to_local'):
    return tensor
  local = tensor.to_local()
  if local.shape != tensor.shape:
    raise ValueError(
      f"{path} has one process's part of {name!r}, {tuple(local.shape)} of "
      f'{tuple(tensor.shape)}, as FSDP divides it; save the full state dict '
      '(full_state_dict=True of get_model_state_dict)'
    )
  return local


def _items(value: Any) -> Any:
  return value.items() if isinstance(value, Mapping) else ()


def _dtype(tensor: Any) -> np.dtype:
  name = str(tensor.dtype).removeprefix('torch.')
  if name == 'bfloat16':
    return np.dtype(ml_dtypes.bfloat16)
  if name in ('float8_e4m3fn', 'float8_e5m2'):
    return np.dtype(getattr(ml_dtypes, name))
  return np.dtype(name)


def _to_numpy(tensor: Any) -> np.ndarray:
  import torch

  tensor = tensor.detach().contiguous()
  dtype = _dtype(tensor)
  if dtype.kind == 'V' or dtype == ml_dtypes.bfloat16:
    # NumPy has no such type of its own: the bits travel as integers.
    bits = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    return tensor.view(bits).numpy().view(dtype)
  return tensor.numpy()
