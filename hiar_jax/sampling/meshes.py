"""Devices for sampling: stages of the pipeline, and parts of every pass.

  mesh = meshes.make(meshes.parse('stage=4,tensor=2'))

A mesh of the axis `stage` and those of training. The network of a stage is
divided over `tensor` and `context` by the table of `models.sharding`: of
`tensor` every device has some heads and a part of the feed-forward width, and
of the weights and the pasts that share; of `context` some tokens of each frame,
which for attention are exchanged for some heads of all tokens where the heads
divide, and else see all keys. Each stage has the weights once.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hiar_jax.denoiser import Denoiser
from hiar_jax.models import sharding
from hiar_jax.models.config import WanConfig
from hiar_jax.sampling.executors import STAGE

AXES = (STAGE, *sharding.AXES)
_CHOSEN = ('stage', 'tensor', 'context', 'decode')


@dataclasses.dataclass(frozen=True)
class SamplingMesh:
  """How many ways each axis divides; the product is the number of devices.

  Attributes:
    stage: groups of devices, each with stages of the pipeline.
    tensor: parts of heads, of feed-forward widths, of weights and pasts.
    context: parts of the tokens of each frame.
    decode: devices that decode beside those that denoise; of several each has
      some rows of the frames. 0: the first of the others does both.

  Raises:
    ValueError: if a size is not one of an axis.
  """

  stage: int = 1
  tensor: int = 1
  context: int = 1
  decode: int = 0

  def __post_init__(self):
    for name in ('stage', 'tensor', 'context'):
      if getattr(self, name) < 1:
        raise ValueError(f'mesh axis {name}={getattr(self, name)} is below 1')
    if self.decode < 0:
      raise ValueError(f'mesh has decode={self.decode}, which is below 0')

  @property
  def num_denoising(self) -> int:
    """Devices of the mesh; those that decode are none of it."""
    return self.stage * self.tensor * self.context


def parse(text: str) -> SamplingMesh:
  """'stage=4,tensor=2' as a mesh; axes that are not named are 1.

  Raises:
    ValueError: naming what is no axis, or no number.
  """
  sizes: dict[str, int] = {}
  for part in text.split(','):
    name, equals, size = part.strip().partition('=')
    if name not in _CHOSEN or not equals or not size.strip().isdecimal():
      raise ValueError(
        f'mesh {text!r}: {part.strip()!r} is not AXIS=SIZE with an axis of '
        f'{_CHOSEN}'
      )
    if name in sizes:
      raise ValueError(f'mesh {text!r} names {name} twice')
    sizes[name] = int(size)
  return SamplingMesh(**sizes)


def make(sizes: SamplingMesh, devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh over the first devices, of all processes.

  Raises:
    ValueError: if there are too few, or processes would have none.
  """
  devices = jax.devices() if devices is None else list(devices)
  needed = sizes.num_denoising
  if needed + sizes.decode > len(devices):
    raise ValueError(
      f'mesh {_text(sizes)} needs {needed + sizes.decode} devices, and there '
      f'are {len(devices)}'
    )
  if needed < len(devices) and jax.process_count() > 1:
    raise ValueError(
      f'mesh {_text(sizes)} has {needed} of {len(devices)} devices; over '
      'several processes it takes all of them'
    )
  grid = np.array(devices[:needed]).reshape(
    sizes.stage, 1, 1, sizes.tensor, sizes.context
  )
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def decoders(
  sizes: SamplingMesh, devices: Sequence[Any] | None = None
) -> list[Any]:
  """The devices that decode alone, those after the ones of `make`."""
  devices = jax.devices() if devices is None else list(devices)
  return devices[sizes.num_denoising :][: sizes.decode]


def divides(mesh: Mesh | None) -> bool:
  """Whether passes themselves may be divided over a mesh."""
  return mesh is not None and set(sharding.AXES) <= set(mesh.axis_names)


def num_parts(mesh: Mesh | None) -> int:
  """Devices that share the work of one pass."""
  if mesh is None:
    return 1
  return mesh.size // dict(mesh.shape).get(STAGE, 1)


def check_model(model: WanConfig, mesh: Mesh | None) -> None:
  """Raises ValueError if a network does not divide over a mesh."""
  if mesh is not None and divides(mesh):
    sharding.check_model('the network', model, mesh)


def under(mesh: Mesh | None) -> Any:
  """A context in which programs are traced with the constraints for a mesh."""
  if mesh is None or not divides(mesh):
    return contextlib.nullcontext()
  return jax.set_mesh(mesh)


def places(tree: Any, mesh: Mesh, specs: Any = None) -> Any:
  """Where what programs hand on to each other lies: a tree of NamedShardings.

  Args:
    tree: of arrays; the keys and values of pasts are known by their names `k`
      and `v` and their rank, [..., heads, head width].
    mesh: of `make`, or one of stages alone.
    specs: of leading axes, a tree like it; None: none of them is divided.
  """
  if specs is None:
    specs = jax.tree.map(lambda _: PartitionSpec(), tree)

  def one(path: Any, a: jax.Array, spec: PartitionSpec) -> NamedSharding:
    by_heads = divides(mesh) and _is_keys(path) and a.ndim >= 5
    if by_heads and a.shape[-2] % mesh.shape['tensor'] == 0:
      rest = (None for _ in range(a.ndim - 2 - len(spec)))
      heads = sharding.heads_axes(a.shape[-2], mesh)
      spec = PartitionSpec(*spec, *rest, heads, None)
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(one, tree, specs)


def lay_out(tree: Any, mesh: Mesh | None, specs: Any = None) -> Any:
  """Inside a program: `tree` in its `places`; as it is without a mesh."""
  if mesh is None:
    return tree
  return jax.tree.map(
    jax.lax.with_sharding_constraint, tree, places(tree, mesh, specs)
  )


def abstract_params(denoiser: Denoiser, shapes: Any, mesh: Mesh | None) -> Any:
  """Weights to be read, each array at the place where passes take it.

  Args:
    denoiser: whose they are.
    shapes: of them as they are held, a tree of ShapeDtypeStructs.
    mesh: of `make`; None: one device.
  """
  alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  if mesh is not None and denoiser.config.is_unrolled and num_parts(mesh) == 1:
    # Taken apart before they are put there.
    mesh = None
  if mesh is None:
    where: Any = jax.tree.map(lambda _: alone, shapes)
  elif divides(mesh):
    where = sharding.shardings(shapes, mesh)
  else:
    whole = NamedSharding(mesh, PartitionSpec())
    where = jax.tree.map(lambda _: whole, shapes)
  return jax.tree.map(
    lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
    shapes,
    where,
  )


def put_params(denoiser: Denoiser, params: Any, mesh: Mesh | None) -> Any:
  """Weights where the passes of a mesh take them.

  Layers of their own (see `Denoiser.unstack_layers`) are whole everywhere; what
  is divided stays stacked, for its places are found by its paths.
  """
  if num_parts(mesh) == 1:
    params = denoiser.unstack_layers(params)
  if mesh is None:
    return params
  if divides(mesh) and not isinstance(params['layers'], tuple):
    where = sharding.shardings(params, mesh)
  else:
    whole = NamedSharding(mesh, PartitionSpec())
    where = jax.tree.map(lambda _: whole, params)

  def put(a: Any, place: NamedSharding) -> Any:
    if getattr(a, 'sharding', None) == place:
      return a
    a = np.asarray(a)
    # `device_put` would compare it with that of the other processes.
    return jax.make_array_from_callback(a.shape, place, lambda index: a[index])

  return jax.tree.map(put, params, where)


def _is_keys(path: Any) -> bool:
  """Whether the leaf is a `k` or a `v`, or a part of one in 8 bits."""
  return any(getattr(entry, 'name', None) in ('k', 'v') for entry in path[-2:])


def _text(sizes: SamplingMesh) -> str:
  return ','.join(f'{name}={size}' for name, size in vars(sizes).items())
