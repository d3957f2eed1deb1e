"""What a phase trains of a network: all of it, or adapters beside a base.

A config's section `lora`, which may be missing or None, is a
`models.lora.LoRAConfig`: optimisers, averages and checkpoints then have
adapters alone, and what they belong to is read once for all networks that
start from the same weights. NAME_lora, which may be missing or '', is a LoRA
file that the adapters of the network NAME start from, such as an earlier
phase's FILE; else they begin by changing nothing.
"""

import functools
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from hiar_jax.denoiser import Denoiser
from hiar_jax.models import lora, sharding
from hiar_jax.models.config import WanConfig
from hiar_jax.training.network_files import NetworkFile
from hiar_jax.weights import adapter_files

# What a phase that trained adapters leaves, beside the merged weights.
FILE = 'lora.safetensors'

Mesh = jax.sharding.Mesh


def config_of(
  config: ml_collections.ConfigDict, *networks: Denoiser
) -> lora.LoRAConfig | None:
  """The section `lora` of a config, held to the networks; None: there is none.

  Raises:
    ValueError: if a value does not fit the networks.
    TypeError: naming a key that is unknown.
  """
  if not config.get('lora'):
    return None
  adapters = lora.LoRAConfig(**config.lora)
  for network in networks:
    lora.shapes(adapters, jax.eval_shape(network.init, jax.random.key(0)))
  return adapters


class Bases:
  """Frozen parameters by where they lie, each read once."""

  def __init__(self, mesh: Mesh | None):
    self._mesh = mesh
    self._trees: dict[pathlib.Path, Any] = {}

  def load(self, file: NetworkFile) -> Any:
    """Parameters of a file, as the first that asked for them holds them."""
    path = file.path.resolve()
    if path not in self._trees:
      self._trees[path] = file.load(self._mesh)
    return self._trees[path]


def start(
  config: ml_collections.ConfigDict,
  name: str,
  file: NetworkFile,
  adapters: lora.LoRAConfig | None,
  bases: Bases,
  mesh: Mesh | None,
) -> tuple[Any, Any]:
  """What is trained of a network, in its places, and what it belongs to.

  Args:
    config: of the phase.
    name: of the network, such as 'student'.
    file: its weights.
    adapters: what is trained of it; None: all, as float32.
    bases: that are read already.
    mesh: that they lie on.

  Returns:
    Parameters and None, or adapters and their base.

  Raises:
    FileNotFoundError, ValueError: if a file is missing, or does not fit.
  """
  if adapters is None:
    return file.trained().load(mesh), None
  path = config.get(f'{name}_lora', '')
  if path:
    model = file.denoiser.config
    params = sharding.put(_read(pathlib.Path(path), adapters, model), mesh)
    return params, bases.load(file)
  shapes = jax.eval_shape(file.denoiser.init, jax.random.key(0))
  key = jax.random.fold_in(
    jax.random.key(config.seed), zlib.crc32(name.encode())
  )
  init = functools.partial(lora.init, adapters, shapes)
  params = init(key) if mesh is None else sharding.make(init, mesh, key)
  return params, bases.load(file)


def _read(path, adapters, model):
  try:
    return adapter_files.read_adapters(path, adapters, model)
  except FileNotFoundError as error:
    hint = ''
    if path.name == FILE:
      hint = f'; the phase {path.parent.name} of the config ends with it'
    raise FileNotFoundError(f'{error}{hint}') from None


def whole(
  params: Any, base: Any, adapters: lora.LoRAConfig | None, mesh: Mesh | None
) -> Any:
  """Parameters of the network alone, which every process can read."""
  if adapters is None:
    return sharding.whole(params, mesh)
  merge = functools.partial(lora.merge, scale=adapters.scale)
  if mesh is None:
    return jax.jit(merge)(base, params)
  return sharding.whole(sharding.make(merge, mesh, base, params), mesh)


def saver(
  adapters: lora.LoRAConfig | None, model: WanConfig, mesh: Mesh | None
) -> Callable[[Any, pathlib.Path], None] | None:
  """For `Phase.save_adapters`: writes the average under ComfyUI's names."""
  if adapters is None:
    return None

  def save(state, path):
    params = sharding.whole(state.ema, mesh)
    if jax.process_index() == 0:
      adapter_files.save(path, params, adapters, model)
      print(f'wrote {path}', flush=True)

  return save
