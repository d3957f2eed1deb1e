"""LoRA files, as diffusers, PEFT, ComfyUI and kohya's trainers write them.

What a module such as blocks.0.self_attn.q may have, in the names of Wan2.1 or
of diffusers:

  lora_A / lora_down / lora.down  [R, I]    factors of an addition to its weight
  lora_B / lora_up / lora.up      [O, R]
  alpha                           number    the addition counts alpha / R times
  diff, diff_b                              additions to weight and bias
  lora_B.bias                     [O]       to the bias, alpha / R times

Before it there may be transformer., diffusion_model., base_model.model. and
such; kohya's names have underscores in place of dots and lora_unet_ before
them. `diff` also follows what is no module's weight, such as modulation, whose
other name is `diff_m`. Where no alpha is beside the factors it is that of
PEFT's adapter_config.json, or of the file's header as diffusers writes it, or
R.
"""

# I inputs, O outputs, R rank

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from hiar_jax.models.config import WanConfig
from hiar_jax.weights import (
  finite,
  foreign,
  hub,
  identity,
  networks,
  safetensors_io,
)
from hiar_jax.weights.tables import Slot

# PEFT's name of the adapter, such as 'default', which may be there.
_ADAPTER = r'(?:\.(?!bias$|weight$)[^.]+)?'
_KINDS = {
  'down': r'(?:lora_A|lora_down|lora\.down)' + _ADAPTER + r'(?:\.weight)?',
  'up': r'(?:lora_B|lora_up|lora\.up)' + _ADAPTER + r'(?:\.weight)?',
  'up_bias': r'lora_B' + _ADAPTER + r'\.bias',
  'alpha': 'alpha',
  'diff': 'diff',
  'diff_b': 'diff_b',
  'diff_m': 'diff_m',
}
# A path, or a path and a scale.
Given: TypeAlias = str | os.PathLike | tuple[str | os.PathLike, float]

# Kinds that are not of the weight.
_ARRAYS = {'diff_b': 'bias', 'up_bias': 'bias'}
_NAME = re.compile(
  r'(?P<module>.+?)\.(?:'
  + '|'.join(f'(?P<{kind}>{form})' for kind, form in _KINDS.items())
  + ')'
)
_KOHYA = re.compile('lora_(?:unet|transformer)_+')
_OTHERS = re.compile(
  r'\.(hada_|lokr_|dora_scale|lora_mid|lora_magnitude_vector|oft_|boft_|ia3_)'
)
_PIECE = 2**20  # Bytes.
_METADATA = 'lora_adapter_metadata'


@dataclasses.dataclass(frozen=True, eq=False)
class Module:
  """What a file has for one module of the network.

  Attributes:
    slots: 'weight' and 'bias' -> the parameter; one that is no module's weight,
      such as modulation, counts as one.
    names: kind of array, a key of _KINDS -> its name in the file.
  """

  slots: Mapping[str, Slot]
  names: dict[str, str]

  def touched(self) -> list[str]:
    """Which of 'weight' and 'bias' are added to."""
    return sorted({_ARRAYS.get(kind, 'weight') for kind in self.names})


@dataclasses.dataclass(frozen=True, eq=False)
class LoRA:
  """An open file, every name and shape of which fits a network.

  Attributes:
    path: of the file.
    scale: how much of it is added.
    state: its arrays.
    modules: name of a module in the file -> what the file has for it.
    places: (our path, index of the layer or None) -> (name of the module,
      'weight' or 'bias').
  """

  path: pathlib.Path
  scale: float
  state: foreign.StateDict
  modules: Mapping[str, Module]
  places: Mapping[tuple[str, int | None], tuple[str, str]]

  def added(self, path: str, index: int | None) -> np.ndarray | None:
    """What is added to a parameter of ours, float32, or to a layer of it.

    Raises:
      ValueError: if values are not finite.
    """
    if (path, index) not in self.places:
      return None
    name, which = self.places[path, index]
    module = self.modules[name]
    slot, names = module.slots[which], module.names
    total = np.zeros(slot.shape, np.float32)
    if which == 'bias':
      if 'diff_b' in names:
        total += self._read(names['diff_b'])
      if 'up_bias' in names:
        total += self._factor(name) * self._read(names['up_bias'])
    else:
      if 'diff' in names:
        total += self._read(names['diff']).reshape(slot.shape)
      if 'down' in names:
        down, up = self._read(names['down']), self._read(names['up'])
        product = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
        total += self._factor(name) * product.reshape(slot.shape)
    return self.scale * slot.to_ours(total)

  def factors(
    self, path: str, index: int | None
  ) -> tuple[np.ndarray, np.ndarray, float] | None:
    """down [I, R], up [R, O] of a matrix in our layout, and alpha / R.

    None: the file has no factors for it.
    """
    name, which = self.places.get((path, index), ('', ''))
    if which != 'weight' or 'down' not in self.modules[name].names:
      return None
    module = self.modules[name]
    down = self._read(module.names['down'])
    up = self._read(module.names['up'])
    down = module.slots['weight'].to_ours(down)
    return down, up.reshape(len(up), -1).T, self._factor(name)

  def digest(self) -> str:
    """Differs between files."""
    digest = hashlib.sha256()
    with self.path.open('rb') as file:
      for piece in iter(lambda: file.read(_PIECE), b''):
        digest.update(piece)
    return digest.hexdigest()

  def _factor(self, name: str) -> float:
    """alpha / R of a module."""
    names = self.modules[name].names
    rank = self.state.shapes[names['down']][0]
    if 'alpha' in names:
      return float(self._read(names['alpha']).reshape(())) / rank
    return self._said.scale(name, rank)

  @functools.cached_property
  def _said(self) -> '_Said':
    return _read_peft_config(self.path)

  def _read(self, name: str) -> np.ndarray:
    array = self.state.read(name)
    finite.check(self.path, {name: (finite.count(array), array.size)})
    return array.astype(np.float32)


def open_lora(
  path: str | os.PathLike, model: WanConfig, *, scale: float = 1.0
) -> LoRA:
  """Opens a file and checks that all of it is for a network.

  Args:
    path: safetensors, or a torch pickle; or a hub's 'owner/name:file'.
    model: of the network.
    scale: how much of it is added; 1 is as it was trained.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is no LoRA, one of another kind or of another network, or
      has names that match nothing.
  """
  name, path = str(path), pathlib.Path(path).expanduser()
  if not path.exists() and hub.is_name(name):
    path = hub.download(name)
  if not path.is_file():
    raise FileNotFoundError(f'no LoRA at {path}')
  if not np.isfinite(scale):
    raise ValueError(f'{path}: a scale of {scale} is no number')
  state = foreign.StateDict(path)
  names = list(state.shapes)
  if others := [name for name in names if _OTHERS.search(name)]:
    raise ValueError(
      f'{path} is a LoRA of another kind, by its {others[0]!r}: LoRA with '
      'lora_A and lora_B, or lora_down and lora_up, is read'
    )
  if not any(_NAME.fullmatch(name) for name in names):
    raise ValueError(
      f'{path} is no LoRA: it has {sorted(names)[:3]} and '
      f'{max(len(names) - 3, 0)} more'
    )
  modules, unknown = _assign(names, model)
  if unknown:
    raise ValueError(
      f'{path} has {len(unknown)} of {len(names)} names that match nothing in '
      f'the network, such as {", ".join(map(repr, unknown[:3]))}'
    )
  if problems := [p for m in modules.values() for p in _misfits(state, m)]:
    # A file of another network has hundreds, all alike.
    more = f', and {len(problems) - 1} more' if len(problems) > 1 else ''
    raise ValueError(
      f'{path} is a LoRA of another network: {problems[0]}{more}'
    )
  places = {}
  for name, module in modules.items():
    for which in module.touched():
      slot = module.slots[which]
      places[slot.path, slot.index] = name, which
  return LoRA(path, scale, state, modules, places)


def open_all(loras: Sequence[Given], model: WanConfig) -> list[LoRA]:
  """Opens files that are given as a path, or as a path and a scale."""
  return [
    open_lora(path, model, scale=scale) for path, scale in with_scales(loras)
  ]


def with_scales(
  loras: Sequence[Given],
) -> list[tuple[str | os.PathLike, float]]:
  """Each as a path and a scale."""
  return [
    (one, 1.0)
    if isinstance(one, str | os.PathLike)
    else (one[0], float(one[1]))
    for one in loras
  ]


def parse_flag(value: str) -> tuple[str, float]:
  """'PATH' or 'PATH:SCALE' as (path, scale).

  Raises:
    ValueError: if nothing is before the colon.
  """
  path, colon, scale = value.rpartition(':')
  if not colon or pathlib.Path(value).exists():
    return value, 1.0
  try:
    number = float(scale)
  except ValueError:
    return value, 1.0
  if not path:
    raise ValueError(f'--lora={value!r} is not PATH or PATH:SCALE')
  return path, number


def merge(
  loras: Sequence[LoRA], path: str, index: int | None, array: np.ndarray
) -> np.ndarray:
  """A parameter of ours, or a layer of it, with what is added to it.

  In float32, or as it is if nothing is added.
  """
  added = [a for one in loras if (a := one.added(path, index)) is not None]
  if not added:
    return array
  return array.astype(np.float32) + sum(added)


class Merge:
  """What is added to the arrays of a network, by their paths."""

  def __init__(self, loras: Sequence[LoRA]):
    self._loras = loras
    self._places = {place for one in loras for place in one.places}

  def __contains__(self, path: str) -> bool:
    return any(path == own for own, _ in self._places)

  def is_stacked(self, path: str) -> bool:
    """Whether it is added layer by layer."""
    return any(p == path and i is not None for p, i in self._places)

  def __call__(
    self, path: str, index: int | None, array: np.ndarray
  ) -> np.ndarray:
    """See `merge`."""
    return merge(self._loras, path, index, array)


# --- Names.


def _parse(name: str) -> tuple[str, str]:
  """Module and kind of an array; the kind is '' if it is none of a LoRA's."""
  fits = _NAME.fullmatch(name)
  if fits is None:
    return name, ''
  kind = next(kind for kind in _KINDS if fits[kind] is not None)
  if kind == 'diff_m':
    return f'{fits["module"]}.modulation', 'diff'
  return fits['module'], kind


@functools.cache
def _modules(model: WanConfig, naming: str) -> dict[str, dict[str, Slot]]:
  """Module -> 'weight' or 'bias' -> slot; under kohya's names as well."""
  found: dict[str, dict[str, Slot]] = {}
  for name, slot in identity.expected_slots(model, naming).items():
    module, _, last = name.rpartition('.')
    if last not in ('weight', 'bias'):
      module, last = name, 'weight'
    for form in (module, module.replace('.', '_')):
      found.setdefault(form, {})[last] = slot
  return found


def _assign(
  names: Sequence[str], model: WanConfig
) -> tuple[dict[str, Module], list[str]]:
  """A file's modules, by Wan2.1's or diffusers' names, and what fits none."""
  tried = []
  for naming in identity.NAMINGS:
    known = _modules(model, naming)
    modules: dict[str, Module] = {}
    unknown = []
    for name in names:
      module, kind = _parse(name)
      slots = known.get(_KOHYA.sub('', module, count=1), {})
      if not kind or _ARRAYS.get(kind, 'weight') not in slots:
        unknown.append(name)
        continue
      modules.setdefault(module, Module(slots, {})).names[kind] = name
    tried.append((modules, unknown))
  return min(tried, key=lambda one: len(one[1]))


def _misfits(state: foreign.StateDict, module: Module) -> Iterator[str]:
  """What of a module's arrays is missing or has another shape."""
  names = module.names
  shape = lambda kind: state.shapes[names[kind]]
  if factors := names.keys() & {'down', 'up', 'alpha', 'up_bias'}:
    if lacking := [kind for kind in ('down', 'up') if kind not in names]:
      given = names[sorted(factors)[0]]
      yield f'{given!r} has no lora_{lacking[0]} beside it'
      return
    outputs, *inputs = module.slots['weight'].shape
    rank, *of_down = shape('down')
    of_up, *ranks = shape('up')
    if [math.prod(of_down), of_up] != [math.prod(inputs), outputs]:
      yield (
        f'{names["down"]!r} and its pair are of a matrix of {of_up} x '
        f'{math.prod(of_down)}, which is {outputs} x {math.prod(inputs)} here'
      )
    elif math.prod(ranks) != rank:
      yield f'{names["down"]!r} has rank {rank}, its pair {math.prod(ranks)}'
    if 'alpha' in names and math.prod(shape('alpha')) != 1:
      yield f'{names["alpha"]!r} of shape {shape("alpha")} is no number'
  for kind in names.keys() & {'diff', 'diff_b', 'up_bias'}:
    expected = module.slots[_ARRAYS.get(kind, 'weight')].shape
    if math.prod(shape(kind)) != math.prod(expected):
      yield f'{names[kind]!r} has shape {shape(kind)}, not {expected}'


# --- What is said beside the arrays.


@dataclasses.dataclass(frozen=True)
class _Said:
  """PEFT's config of the adapters, as far as it is of their scale."""

  alpha: float | None = None
  alphas: Mapping[str, float] = dataclasses.field(default_factory=dict)
  by_root: bool = False

  def scale(self, module: str, rank: int) -> float:
    """alpha / R, or alpha over its root (rsLoRA, arXiv:2312.03732)."""
    alpha = next(
      (
        value
        for pattern, value in self.alphas.items()
        if re.fullmatch(rf'(.*\.)?({pattern})', module)
      ),
      self.alpha,
    )
    if alpha is None:
      return 1.0
    return alpha / (math.sqrt(rank) if self.by_root else rank)


def _read_peft_config(path: pathlib.Path) -> _Said:
  """That of adapter_config.json, else of the header, else none."""
  file = path.with_name('adapter_config.json')
  if file.is_file():
    said = safetensors_io.read_json(file)
  elif path.suffix == '.safetensors':
    text = networks.read_metadata(path).get(_METADATA, '{}')
    try:
      said = dict(json.loads(text))
    except ValueError as error:
      raise ValueError(f'{path} has a damaged {_METADATA}: {error}') from None
    said = {k.removeprefix('transformer.'): v for k, v in said.items()}
  else:
    return _Said()
  alpha = said.get('lora_alpha')
  return _Said(
    alpha=None if alpha is None else float(alpha),
    alphas=said.get('alpha_pattern') or {},
    by_root=bool(said.get('use_rslora')),
  )
