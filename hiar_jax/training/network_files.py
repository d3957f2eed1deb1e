"""Networks that a config names: where their weights lie, and their sizes.

A network NAME, such as `teacher`, has in a config

  NAME_weights   its weights: a folder that `hiar-jax convert` or `export` made,
                 whose config.json has its sizes; or the weights file that an
                 earlier phase ended with
  NAME           a section that may be missing, see NetworkConfig

What the networks of a run have to agree on (latents and text) is checked here.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections

from hiar_jax.denoiser import Denoiser
from hiar_jax.models import sharding
from hiar_jax.models.config import DTYPES, WanConfig
from hiar_jax.weights import layouts, networks, safetensors_io

# What a phase leaves in its folder.
WEIGHTS = 'weights.safetensors'
PLACEMENTS = ('divided', 'whole')
# How a network computes, which files do not say: as the student does.
_COMPUTE = ('dtype', 'remat', 'attention')
# What all networks of a run see.
_SHARED = {
  'latents': ('latent_height', 'latent_width', 'channels'),
  'text': ('text_len', 'text_dim'),
}


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
  """How a network that is not trained is held.

  Attributes:
    model: its WanConfig, where the weights are a plain file, or are not there
      yet (a plan); None: that of the student. A folder tells its own sizes.
    dtype: of its parameters on the devices.
    placement: 'divided' over the mesh as models/sharding says, or 'whole' on
      every device: more memory, and nothing to gather.

  Raises:
    ValueError: naming the value that does not fit.
  """

  model: Mapping[str, Any] | None = None
  dtype: str = 'float32'
  placement: str = 'divided'

  def __post_init__(self):
    for name, allowed in (('dtype', DTYPES), ('placement', PLACEMENTS)):
      if getattr(self, name) not in allowed:
        raise ValueError(
          f'{name}={getattr(self, name)!r} is not one of {allowed}'
        )


@dataclasses.dataclass(frozen=True)
class NetworkFile:
  """A network on disk, nothing of it read but its sizes.

  Attributes:
    name: for people, such as 'teacher'.
    path: of the weights, for `networks.load_weights`.
    denoiser: of its sizes.
    config: how it is held.
  """

  name: str
  path: pathlib.Path
  denoiser: Denoiser
  config: NetworkConfig

  def load(self, mesh: jax.sharding.Mesh | None = None) -> Any:
    """Reads the parameters, into their places if there is a mesh.

    Raises:
      FileNotFoundError: saying what makes them, if they are not there.
      ValueError: if they are damaged or of other sizes.
    """
    try:
      return networks.load_weights(self.path, self.abstract(mesh))
    except FileNotFoundError as error:
      if not str(error).startswith('no weights at'):  # Of a missing shard.
        raise
      raise FileNotFoundError(f'{error}; {_maker(self.path)}') from None

  def trained(self) -> 'NetworkFile':
    """The same as the start of what is trained: masters, divided."""
    return dataclasses.replace(self, config=NetworkConfig())

  def abstract(self, mesh: jax.sharding.Mesh | None = None) -> Any:
    """Their shapes, and places if there is a mesh."""
    dtype = self.config.dtype
    tree = jax.eval_shape(
      lambda: jax.tree.map(
        lambda a: a.astype(dtype), self.denoiser.init(jax.random.key(0))
      )
    )
    if mesh is None:
      return tree
    if self.config.placement == 'whole':
      return sharding.abstract_whole(tree, mesh)
    return sharding.abstract(tree, mesh)

  def digest(self) -> str:
    """Differs between weights, by a part of them; '' if they are not there."""
    try:
      return networks.open_weights(self.path).digest()
    except FileNotFoundError:
      return ''


def find(config: ml_collections.ConfigDict, *names: str) -> NetworkFile:
  """The first of these networks that the config has weights of.

  Args:
    config: of a phase; its section `model` is the student's.
    *names: such as 'critic', 'teacher': a critic that starts where the teacher
      does unless it has weights of its own.

  Raises:
    ValueError: if it has none of them, or latents or text are not the
      student's.
    TypeError: naming a key of a section that is unknown.
    FileNotFoundError: if a folder has no config.json.
  """
  name = next((n for n in names if f'{n}_weights' in config), None)
  if name is None:
    raise ValueError(f'the {config.phase} config has no {names[0]}_weights')
  path = pathlib.Path(config[f'{name}_weights'])
  held = NetworkConfig(**config.get(name, {}))
  student = WanConfig(**config.model)
  model = student if held.model is None else WanConfig(**held.model)
  if path.is_dir():
    model = _sizes(path, like=model)
    path = path / layouts.STUDENT_FILE
  check_shared(name, model, 'model', student)
  return NetworkFile(name, path, Denoiser(model), held)


def find_student(config: ml_collections.ConfigDict, *names: str) -> NetworkFile:
  """As `find`, of weights that the network of the section `model` starts from.

  They are held as the section NAME says where adapters are trained beside them;
  what is trained itself is `trained`.

  Raises:
    ValueError: as `find`; also if they are of other sizes than `model` says.
  """
  found = find(config, *names)
  model = WanConfig(**config.model)
  for name, size in dataclasses.asdict(model).items():
    other = getattr(found.denoiser.config, name)
    if name not in (*_COMPUTE, 'unroll') and other != size:
      raise ValueError(
        f'{found.path} has {name}={other}, and the config {name}={size} in '
        'model'
      )
  return dataclasses.replace(found, denoiser=Denoiser(model))


def check_shared(
  name: str, model: WanConfig, other_name: str, other: WanConfig
) -> None:
  """Raises a ValueError unless two networks see the same latents and text."""
  for what, fields in _SHARED.items():
    sizes = [tuple(getattr(m, f) for f in fields) for m in (model, other)]
    if sizes[0] != sizes[1]:
      shown = ['x'.join(map(str, size)) for size in sizes]
      raise ValueError(
        f'{name} has {what} of {shown[0]} and {other_name} of {shown[1]} '
        f'({", ".join(fields)}); they have to be the same'
      )


def _sizes(folder: pathlib.Path, like: WanConfig) -> WanConfig:
  """The sizes of a converted network, which computes as another one does."""
  file = folder / layouts.CONFIG_FILE
  if not file.exists():
    raise FileNotFoundError(f'no network in {folder}; {_maker(folder)}')
  sizes = safetensors_io.read_json(file).get('model')
  if not isinstance(sizes, Mapping):
    raise ValueError(
      f'{file} has no section model: it is not of a converted folder; '
      f'{_maker(folder)}'
    )
  compute = {name: getattr(like, name) for name in _COMPUTE}
  return WanConfig(**(dict(sizes) | compute))


def _maker(path: pathlib.Path) -> str:
  if path.name == WEIGHTS:
    return f'the phase {path.parent.name} of the config ends with them'
  return '`hiar-jax convert` makes such folders of published weights'
