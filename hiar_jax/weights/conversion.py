"""Published weights to folders that `hiar_jax.load` reads, and back.

Arrays go from file to file one at a time, so memory is needed for one or two of
them, whatever the size of the network. A folder in our format:

  config.json                  sizes, noise schedule, rollout
  student.safetensors          transformer; layers stacked on axis 0
  vae.safetensors              if the release has one
  text_encoder.safetensors     likewise
  tokenizer/                   likewise

Large files are split into shards with an index. Instead of a .safetensors file
there may be a folder of that name and .orbax, an orbax checkpoint.
"""

import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hiar_jax.models import umt5, vae
from hiar_jax.models.config import WanConfig
from hiar_jax.weights import (
  finite,
  foreign,
  identity,
  layouts,
  lora_files,
  networks,
  orbax_weights,
  parts,
  safetensors_io,
  tables,
  wrong_files,
)
from hiar_jax.weights.identity import Config, Network
from hiar_jax.weights.releases import Release

DTYPES = ('float32', 'bfloat16', 'float16')
FORMATS = ('safetensors', 'orbax')
# Whose format `to_foreign` writes.
TARGETS = (*identity.NAMINGS, 'self_forcing')

# The section of config.json with a network's sizes, and their class.
_SECTIONS = {
  'transformer': ('model', WanConfig),
  'vae': ('vae', vae.VAEConfig),
  'text_encoder': ('umt5', umt5.UMT5Config),
}
# HiAR as published (arXiv:2603.08703), which is also Self-Forcing's schedule.
DEFAULTS = {
  'schedule': {'shift': 5.0, 'indices': (1000, 750, 500, 250)},
  'rollout': {
    'frames_per_block': 3,
    'window': 21,
    'sink': 0,
    'stepping': 'sde',
    'context': 'matched',
  },
  'generate': {'order': 'step_first', 'fps': 16.0},
}


@dataclasses.dataclass(frozen=True)
class Options:
  """How a release is converted.

  Attributes:
    dtype: of the stored weights, one of DTYPES; None keeps each array's own.
    member: see `foreign.StateDict`.
    head_dim: see `identity.open_network`.
    latent_size: rows and columns of the latent frames to make.
    compute_dtype: that the networks run in.
    attention: see `WanConfig`.
    shard_bytes: largest size of a file; of orbax's about that.
    format: of the weights, one of FORMATS. An orbax checkpoint is written
      array by array, and an array here has all layers.

  Raises:
    ValueError: naming the value that does not fit.
  """

  dtype: str | None = None
  member: str | None = None
  head_dim: int = 128
  latent_size: tuple[int, int] = (60, 104)
  compute_dtype: str = 'bfloat16'
  attention: str = 'auto'
  shard_bytes: int = safetensors_io.SHARD_BYTES
  format: str = 'safetensors'

  def __post_init__(self):
    if self.format not in FORMATS:
      raise ValueError(f'format={self.format!r} is not one of {FORMATS}')
    if self.dtype is not None and self.dtype not in DTYPES:
      raise ValueError(f'dtype={self.dtype!r} is not one of {DTYPES}')


# Told the part that is being written, its arrays done and all of them.
Report = Callable[[str, int, int], None]


def to_ours(
  release: Release,
  out: str | os.PathLike,
  *,
  name: str,
  options: Options = Options(),
  sections: Mapping[str, Any] | None = None,
  loras: Sequence[lora_files.Given] = (),
  report: Report | None = None,
) -> None:
  """Writes a release as a folder of ours.

  Everything but the values is checked before anything is written; values that
  are not finite end it, and what was written is removed.

  Args:
    release: at least one part.
    out: the folder, made if it does not exist.
    name: of the pipeline, for people.
    options: see there.
    sections: of config.json ('schedule', 'rollout', 'generate'); those not
      given are HiAR's.
    loras: added to the transformer, see `lora_files.open_all`.
    report: see Report.

  Raises:
    FileNotFoundError: if a file or a shard is missing.
    ValueError: naming the files and arrays that do not fit, or have values
      that are not finite, or if the disk is too small.
  """
  out = pathlib.Path(out)
  is_new = not out.exists()
  opened = open_networks(release, options)
  plans = {
    kind: _our_arrays(network, options.dtype)
    for kind, network in opened.items()
  }
  if release.tokenizer is not None:
    wrong_files.check_tokenizer(tokenizer_file(release.tokenizer))
  added = _open_loras(loras, opened.get('transformer'))
  out.mkdir(parents=True, exist_ok=True)
  _check_space(out, plans.values())
  try:
    _write_release(
      *(release, opened, plans, out, name, options, sections, added, report)
    )
  except BaseException:
    if is_new:
      shutil.rmtree(out, ignore_errors=True)
    raise


def _open_loras(loras, network):
  if not loras:
    return []
  if network is None:
    raise ValueError('a LoRA is for a transformer, and the release has none')
  return lora_files.open_all(loras, network.config)


def _write_release(
  release, opened, plans, out, name, options, sections, loras, report
):
  config: dict[str, Any] = {'name': name} | DEFAULTS
  for section in DEFAULTS:
    config[section] = dict((sections or {}).get(section, DEFAULTS[section]))
  for kind, network in opened.items():
    config[_SECTIONS[kind][0]] = dataclasses.asdict(network.config)
    _write_ours(
      *(network, out / layouts.OWN_FILES[kind], plans[kind], options),
      loras if kind == 'transformer' else [],
      report,
    )
  # Weights that are read in for sampling; the files keep what they have.
  config['weights_dtype'] = options.compute_dtype
  if 'transformer' in opened:
    config[layouts.IS_BASE_MODEL] = opened['transformer'].is_base_model
  if release.tokenizer is not None:
    copy_tokenizer(release.tokenizer, out / layouts.TOKENIZER)
  elif 'text_encoder' in opened:
    _write_own_tokenizer(opened['text_encoder'], out / layouts.TOKENIZER)
  # Last: a folder that has it is whole.
  _write_json(out / layouts.CONFIG_FILE, config)


def open_networks(release: Release, options: Options) -> dict[str, Network]:
  """Opens and checks every network of a release.

  Raises:
    FileNotFoundError, ValueError: see `to_ours`.
  """
  opened = {}
  for kind in identity.KINDS:
    path = getattr(release, kind)
    if path is None:
      continue
    network = identity.open_network(
      path,
      member=options.member if kind == 'transformer' else None,
      head_dim=options.head_dim,
      latent_size=options.latent_size,
    )
    if network.kind != kind:
      raise ValueError(f'{path} is a {network.kind}, not a {kind}')
    changes: dict[str, Any] = {'dtype': options.compute_dtype}
    if kind == 'transformer':
      changes['attention'] = options.attention
    opened[kind] = dataclasses.replace(
      network, config=dataclasses.replace(network.config, **changes)
    )
  if not opened:
    raise ValueError('the release has no network in it')
  parts.check(
    {kind: network.config for kind, network in opened.items()},
    {kind: network.state.path for kind, network in opened.items()},
  )
  return opened


def has_own_tokenizer(network: Network) -> bool:
  """Whether the file of a text encoder has a tokenizer in it."""
  return foreign.TOKENIZER_ARRAY in network.state.names


def to_foreign(
  folder: str | os.PathLike,
  out: str | os.PathLike,
  *,
  naming: str,
  dtype: str | None = None,
  shard_bytes: int = safetensors_io.SHARD_BYTES,
  loras: Sequence[lora_files.Given] = (),
  report: Report | None = None,
) -> None:
  """Writes a folder of ours as others would: safetensors under their names.

  Args:
    folder: has a config.json and at least one network.
    out: the folder, made if it does not exist.
    naming: one of TARGETS. 'diffusers' gives a folder that its classes load,
      'wan' the file names of Wan2.1, 'self_forcing' the transformer alone as
      a training of Self-Forcing or HiAR keeps its average.
    dtype: of the stored weights, one of DTYPES; None keeps each array's own.
    shard_bytes: largest size of a file.
    loras: added to the transformer, see `lora_files.open_all`.
    report: see Report.

  Raises:
    FileNotFoundError: if a file is missing.
    ValueError: naming what does not fit.
  """
  if naming not in TARGETS:
    raise ValueError(f'naming={naming!r} is not one of {TARGETS}')
  folder, out = pathlib.Path(folder), pathlib.Path(out)
  config = safetensors_io.read_json(folder / layouts.CONFIG_FILE)
  if naming == 'self_forcing':
    network_to_foreign(
      folder / layouts.STUDENT_FILE,
      WanConfig(**config['model']),
      out / layouts.SELF_FORCING_FILE,
      naming='wan',
      prefix=f'{foreign.AVERAGE}.model.',
      dtype=dtype,
      shard_bytes=shard_bytes,
      loras=loras,
      report=report,
    )
    return
  written = []
  for kind, (section, config_class) in _SECTIONS.items():
    if section not in config:
      continue
    path = out / layouts.FILES[naming][kind]
    path.parent.mkdir(parents=True, exist_ok=True)
    network_to_foreign(
      folder / layouts.OWN_FILES[kind],
      config_class(**config[section]),
      path,
      naming=naming,
      dtype=dtype,
      shard_bytes=shard_bytes,
      loras=loras if kind == 'transformer' else (),
      report=report,
    )
    written.append(kind)
  if not written:
    raise ValueError(f'{folder / layouts.CONFIG_FILE} is of no network')
  if (folder / layouts.TOKENIZER).is_dir():
    place = layouts.TOKENIZER if naming == 'diffusers' else 'google/umt5-xxl'
    copy_tokenizer(folder / layouts.TOKENIZER, out / place)
  if naming == 'diffusers' and len(written) == len(_SECTIONS):
    for name, value in layouts.diffusers_pipeline(config).items():
      (out / name).parent.mkdir(exist_ok=True)
      _write_json(out / name, value)


def network_to_foreign(
  weights: str | os.PathLike,
  config: Config,
  path: str | os.PathLike,
  *,
  naming: str,
  prefix: str = '',
  dtype: str | None = None,
  shard_bytes: int = safetensors_io.SHARD_BYTES,
  loras: Sequence[lora_files.Given] = (),
  report: Report | None = None,
) -> None:
  """Writes one network's weights, and its config.json, under other names.

  Args:
    weights: file of ours, such as a training's student.safetensors; see
      `networks.open_weights`.
    config: of the network.
    path: the .safetensors file to write.
    naming: one of identity.NAMINGS.
    prefix: of every name.
    dtype: see `to_foreign`.
    shard_bytes: likewise.
    loras: likewise.
    report: see Report.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: naming every array that does not fit.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  reader = open_ours(weights, config)
  added: list[lora_files.LoRA] = []
  if loras:
    assert isinstance(config, WanConfig), 'a LoRA is for a transformer'
    added = lora_files.open_all(loras, config)
  foreign_config = layouts.config_of(config, naming)
  slots = identity.expected_slots(config, naming)
  arrays = {
    f'{prefix}{name}': (
      slot.shape,
      np.dtype(dtype or reader.entries[slot.path].dtype),
    )
    for name, slot in slots.items()
  }
  _check_space(path.parent, [arrays])
  with safetensors_io.Writer(path, arrays, shard_bytes=shard_bytes) as writer:
    # By our paths: of an orbax checkpoint arrays are read whole, and once.
    in_order = sorted(slots.items(), key=lambda item: item[1].path)
    for done, (name, slot) in enumerate(in_order):
      if report is not None:
        report(path.stem, done, len(slots))
      if slot.index is None:
        array = reader.read(slot.path)
      else:
        array = reader.read(slot.path, slice(slot.index, slot.index + 1))[0]
      array = lora_files.merge(added, slot.path, slot.index, array)
      name = f'{prefix}{name}'
      writer.write(name, slot.to_foreign(array).astype(arrays[name][1]))
  if foreign_config:
    _write_json(path.with_name(layouts.CONFIG_FILE), foreign_config)


def open_ours(
  weights: str | os.PathLike, config: Config
) -> safetensors_io.Reader | orbax_weights.Reader:
  """Opens weights of ours and checks every name and shape.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: naming every array that does not fit.
  """
  reader = networks.open_weights(weights)
  wanted = tables.flatten(identity.abstract_params(config))
  stored = {name: entry.shape for name, entry in reader.entries.items()}
  problems = [f'{k} is missing' for k in wanted if k not in stored]
  problems += [f'{k} is unknown' for k in stored if k not in wanted]
  problems += [
    f'{k} has shape {stored[k]}, not {leaf.shape}'
    for k, leaf in wanted.items()
    if k in stored and stored[k] != leaf.shape
  ]
  if problems:
    raise ValueError(f'{weights} does not fit: {tables.report(problems)}')
  return reader


def copy_tokenizer(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies a tokenizer's own files, not what else lies beside them."""
  target.mkdir(parents=True, exist_ok=True)
  for file in source.iterdir():
    if file.suffix in ('.json', '.model', '.txt') and file.name.startswith(
      ('tokenizer', 'spiece', 'special_tokens', 'added_tokens')
    ):
      shutil.copyfile(file, target / file.name)


def tokenizer_file(folder: pathlib.Path) -> pathlib.Path:
  """The file of a tokenizer that is read, of those in its folder."""
  files = [folder / name for name in layouts.TOKENIZER_FILES]
  return next(file for file in files if file.is_file())


def _write_own_tokenizer(network: Network, folder: pathlib.Path) -> None:
  """Writes the sentencepiece model that ComfyUI keeps beside the weights."""
  if has_own_tokenizer(network):
    folder.mkdir(exist_ok=True)
    model = network.state.read_bytes(foreign.TOKENIZER_ARRAY)
    (folder / 'spiece.model').write_bytes(model)


def is_ours(folder: str | os.PathLike) -> bool:
  """Whether a folder has a config.json that is not another library's."""
  path = pathlib.Path(folder) / layouts.CONFIG_FILE
  if not path.is_file():
    return False
  try:
    config = safetensors_io.read_json(path)
  except ValueError:
    return True  # Whoever reads it says what is wrong.
  return not config.keys() & {'_class_name', 'model_type', 'architectures'}


def _our_arrays(
  network: Network, dtype: str | None
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  """Our path -> (shape, dtype) of what will be stored."""
  stored: dict[str, set[np.dtype]] = {}
  state = network.state
  for name, slot in network.slots.items():
    stored.setdefault(slot.path, set()).add(state.dtypes[name])
  for slot in (s for n, s in network.slots.items() if state.is_quantised(n)):
    # Some layers of such files are left whole, in what they were trained in.
    if len(stored[slot.path]) > 1:
      stored[slot.path] = {np.dtype(np.float32)}
  mixed = [path for path, dtypes in stored.items() if len(dtypes) > 1]
  if mixed and dtype is None:
    raise ValueError(
      f'{network.state.path}: layers of {tables.report(mixed)} have different '
      'dtypes, and are stacked here; choose one dtype for all'
    )
  shapes = tables.flatten(identity.abstract_params(network.config))
  return {
    path: (leaf.shape, np.dtype(dtype or min(stored[path], key=str)))
    for path, leaf in shapes.items()
  }


def _write_ours(
  network: Network,
  path: pathlib.Path,
  arrays: Mapping[str, tuple],
  options: Options,
  loras: Sequence[lora_files.LoRA],
  report: Report | None,
) -> None:
  state, slots = network.state, network.slots
  # In the order of the file, which is then read from its beginning to end.
  names = list(state.shapes)
  kind: type[safetensors_io.Writer | orbax_weights.Writer]
  kind = safetensors_io.Writer
  if options.format == 'orbax':
    # Its arrays are held until all of their layers are there.
    names.sort(key=lambda name: slots[name].path)
    path, kind = path.with_suffix(orbax_weights.SUFFIX), orbax_weights.Writer
  counts = {}
  with kind(path, arrays, shard_bytes=options.shard_bytes) as writer:
    for done, name in enumerate(names):
      if report is not None:
        report(network.kind, done, len(names))
      slot = slots[name]
      array = slot.to_ours(state.read(name))
      array = lora_files.merge(loras, slot.path, slot.index, array)
      array = array.astype(arrays[slot.path][1], copy=False)
      counts[name] = finite.count(array), array.size
      writer.write(slot.path, array, slot.index)
    finite.check(state.path, counts)


def _check_space(folder: pathlib.Path, plans: Iterable[Mapping]) -> None:
  needed = sum(
    math.prod(shape) * dtype.itemsize
    for arrays in plans
    for shape, dtype in arrays.values()
  )
  free = shutil.disk_usage(folder).free
  if needed > free:
    raise ValueError(
      f'{folder} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are '
      'to be written'
    )


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2) + '\n')
