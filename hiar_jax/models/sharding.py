"""Which device holds what: the mesh, and a PartitionSpec for every array.

A mesh has four axes. Samples are divided over `data` and `fsdp`, parameters
over `fsdp` and `tensor`, attention heads over `tensor`, and the tokens of every
frame over `context`. Parameters, and all that is shaped like them (gradients,
moments of optimisers, averages), find their place by their path in one table.
Activations are constrained at three places: tokens after patchify, heads of
q/k/v, caches. XLA does the rest.

Without a mesh nothing is placed and no constraint is made.
"""

# B batch, F frames, P tokens per frame, T queries, S keys, H heads, K head
# width, N layers, D width

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hiar_jax.models import lora, quantised
from hiar_jax.models.config import WanConfig

AXES = ('data', 'fsdp', 'tensor', 'context')
BATCH = ('data', 'fsdp')  # What the leading axis of a batch is divided over.

# Specs of activations.
TOKENS_BFPD = (BATCH, None, 'context', None)
TOKENS_BFPHK = (BATCH, None, 'context', 'tensor', None)
# Of self-attention, see `heads_axes`: devices exchange their tokens' heads for
# all tokens of some heads, or each keeps its tokens and sees all keys.
HEADS = 'heads'
QUERIES_BFPHK = (BATCH, None, 'context', HEADS, None)
# Whole sequences: every device's queries see all keys. So a cache is written
# at any slot without asking who has it.
KEYS_BFPHK = (BATCH, None, None, HEADS, None)
KEYS_BSHK = (BATCH, None, HEADS, None)
KEYS_NBSHK = (None, BATCH, None, HEADS, None)
TEXT_NBSHK = (None, BATCH, None, 'tensor', None)

# Path of a parameter -> its spec. Exactly one rule fits each.
PARAM_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r'layers/(self|cross)_attention/[qkv]/kernel', (None, 'fsdp', 'tensor')),
  (r'layers/(self|cross)_attention/o/kernel', (None, 'tensor', 'fsdp')),
  (r'layers/ffn_in/kernel', (None, 'fsdp', 'tensor')),
  (r'layers/ffn_out/kernel', (None, 'tensor', 'fsdp')),
  (r'layers/(self|cross)_attention/([qkv]/bias|norm_[qk])', (None, 'tensor')),
  (r'layers/ffn_in/bias', (None, 'tensor')),
  (r'text_kv/[kv]_kernel', (None, 'fsdp', 'tensor')),
  (r'text_kv/([kv]_bias|norm_k)', (None, 'tensor')),
  (r'text_in/kernel', ('fsdp', 'tensor')),
  (r'text_in/bias', ('tensor',)),
  (r'text_out/kernel', ('tensor', 'fsdp')),
  (r'(time_in|time_out|patch_embedding)/kernel', (None, 'fsdp')),
  (r'(time_projection|head)/kernel', ('fsdp', None)),
  # Vectors of a width, added to what is whole on every device.
  (r'layers/(modulation|cross_norm/(scale|bias))', ()),
  (r'layers/((self|cross)_attention/o|ffn_out)/bias', ()),
  (r'(text_out|time_in|time_out|time_projection|patch_embedding)/bias', ()),
  (r'head/bias|head_modulation', ()),
)
# Of the text encoder, beside those of a feed-forward layer above.
PARAM_RULES += (
  (r'token_embedding/embedding', (None, 'fsdp')),
  (r'layers/[qkv]/kernel', (None, 'fsdp', 'tensor')),
  (r'layers/o/kernel', (None, 'tensor', 'fsdp')),
  (r'layers/ffn_gate/kernel', (None, 'fsdp', 'tensor')),
  (r'layers/relative_bias', (None, None, 'tensor')),
  (r'(layers/norm[12]|norm)/scale', ()),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How many ways each axis divides; the product is the number of devices.

  Attributes:
    data: copies of the parameters; samples are divided over them.
    fsdp: parts of the parameters, gathered layer by layer; samples too.
    tensor: parts of heads and of feed-forward widths.
    context: parts of the tokens of each frame.
    One of them may be -1: what the devices leave.
  """

  data: int = 1
  fsdp: int = 1
  tensor: int = 1
  context: int = 1

  def __post_init__(self):
    sizes = dataclasses.astuple(self)
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
      raise ValueError(
        f'mesh {self} has a size that is neither positive nor the only -1'
      )

  def __str__(self) -> str:
    sizes = zip(AXES, dataclasses.astuple(self), strict=True)
    return ' '.join(f'{axis}={size}' for axis, size in sizes)

  def filled(self, num_devices: int) -> 'MeshConfig':
    """The same with its -1 replaced.

    Raises:
      ValueError: if the sizes do not make up the number of devices.
    """
    sizes = dataclasses.astuple(self)
    known = math.prod(size for size in sizes if size > 0)
    if num_devices % known or (-1 not in sizes and known != num_devices):
      raise ValueError(
        f'mesh {self} does not make up {num_devices} devices: its sizes give '
        f'{known}'
      )
    rest = num_devices // known
    return MeshConfig(*(rest if size == -1 else size for size in sizes))


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh over some devices; default: all there are, of all processes.

  Raises:
    ValueError: see `MeshConfig.filled`.
  """
  devices = jax.devices() if devices is None else devices
  sizes = dataclasses.astuple(config.filled(len(devices)))
  # Not jax.make_mesh: of a torus of 4x4x4 it gives no axis of 2.
  grid = mesh_utils.create_device_mesh(
    sizes, devices, allow_split_physical_axes=True
  )
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_model(name: str, model: WanConfig, mesh: Mesh) -> None:
  """Raises a ValueError if a network's sizes do not divide over the mesh."""
  for size, axis in (('num_heads', 'tensor'), ('tokens_per_frame', 'context')):
    if getattr(model, size) % mesh.shape[axis]:
      raise ValueError(
        f'{name}: {size}={getattr(model, size)} is not divisible by '
        f'{axis}={mesh.shape[axis]}'
      )


def check_batch(batch_size: int, microbatches: int, mesh: Mesh) -> None:
  """Raises a ValueError if the parts of a batch do not divide over the mesh."""
  ways = math.prod(mesh.shape[axis] for axis in BATCH)
  if batch_size % (microbatches * ways):
    raise ValueError(
      f'batch_size={batch_size} is not divisible by microbatches='
      f'{microbatches} times data={mesh.shape["data"]} times '
      f'fsdp={mesh.shape["fsdp"]}'
    )


# --- Parameters, and what is shaped like them.


@functools.cache
def param_spec(path: str) -> PartitionSpec:
  """Spec of a parameter, by its path such as 'layers/ffn_in/kernel'.

  Factors of a matrix are divided as its rows and columns, never by rank, and
  its scales as its columns.

  Raises:
    ValueError: unless exactly one rule fits.
  """
  matrix = lora.matrix(path) or quantised.matrix(path) or path
  fits = [spec for rule, spec in PARAM_RULES if re.fullmatch(rule, matrix)]
  if len(fits) != 1:
    raise ValueError(f'{len(fits)} sharding rules fit {path!r}, not 1')
  (spec,) = fits
  if path.endswith(lora.DOWN):
    spec = (*spec[:-1], None)
  elif path.endswith(lora.UP) or quantised.matrix(path):
    spec = (*spec[:-2], None, spec[-1])
  return PartitionSpec(*spec)


def shardings(tree: Any, mesh: Mesh) -> Any:
  """Where the arrays of a training state lie; their tree of NamedShardings.

  An array in dicts is a parameter or is shaped like one, and the keys of those
  dicts are its path. Counters and what else is in none is whole everywhere.

  Args:
    tree: of arrays or ShapeDtypeStructs: parameters, states of optimisers,
      states of a phase.
    mesh: from `make_mesh`.

  Raises:
    ValueError: if no rule fits, or an axis does not divide a dimension.
  """

  def place(path, leaf):
    names: list[str] = []
    for entry in reversed(path):
      if not isinstance(entry, jax.tree_util.DictKey):
        break
      names.insert(0, entry.key)
    name, spec = '/'.join(names), PartitionSpec()
    if name:
      spec = param_spec(name)
      _check_divides(name, leaf.shape, spec, mesh)
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(place, tree)


def _check_divides(name, shape, spec, mesh):
  for axis, (size, over) in enumerate(zip(shape, spec)):
    if over is not None and size % mesh.shape[over]:
      raise ValueError(
        f'{name} of shape {tuple(shape)}: axis {axis} is not divisible by '
        f'{over}={mesh.shape[over]}'
      )


def abstract(tree: Any, mesh: Mesh, dtype: Any = None) -> Any:
  """`tree` as placed ShapeDtypeStructs, in another dtype if one is given.

  Raises:
    ValueError: see `shardings`.
  """
  return jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, dtype or a.dtype, sharding=s),
    tree,
    shardings(tree, mesh),
  )


def abstract_whole(tree: Any, mesh: Mesh) -> Any:
  """`tree` as ShapeDtypeStructs that lie whole on every device."""
  everywhere = NamedSharding(mesh, PartitionSpec())
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), tree
  )


def put(tree: Any, mesh: Mesh | None) -> Any:
  """Host arrays, the same in every process, in their places if there are any.

  Raises:
    ValueError: see `shardings`.
  """
  if mesh is None:
    return tree

  def place(array, sharding):
    array = np.asarray(array)
    return jax.make_array_from_callback(
      array.shape, sharding, lambda index: array[index]
    )

  return jax.tree.map(place, tree, shardings(tree, mesh))


def make(function: Callable, mesh: Mesh, *args: Any) -> Any:
  """function(*args), whose result never lies anywhere but in its places."""
  places = shardings(jax.eval_shape(function, *args), mesh)
  return jax.jit(function, out_shardings=places)(*args)


def whole(tree: Any, mesh: Mesh | None) -> Any:
  """Arrays that every process can read as a whole."""
  if mesh is None:
    return tree
  everywhere = NamedSharding(mesh, PartitionSpec())
  return jax.jit(lambda x: x, out_shardings=everywhere)(tree)


# --- Batches.


def batch_share(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
  """(i, n): this process reads part i of n equal parts of every batch.

  Processes that hold the same samples (of different heads or tokens) have the
  same i.

  Args:
    mesh: from `make_mesh`.
    process: index; None: this one.

  Raises:
    ValueError: if the process's samples do not follow each other.
  """
  process = jax.process_index() if process is None else process
  ways = math.prod(mesh.shape[axis] for axis in BATCH)
  places: Mapping[Any, Any] = NamedSharding(
    mesh, PartitionSpec(BATCH)
  ).devices_indices_map((ways,))
  rows = sorted(
    {
      index[0].indices(ways)[0]
      for device, index in places.items()
      if device.process_index == process
    }
  )
  count = len(rows)
  if rows != list(range(rows[0], rows[0] + count)) or rows[0] % count:
    raise ValueError(
      f'process {process} has the parts {rows} of a batch, which do not '
      'follow each other: give data or fsdp a multiple of the processes'
    )
  return rows[0] // count, ways // count


def put_batch(batch: Any, mesh: Mesh | None) -> Any:
  """This process's share of a batch as a part of the whole, see batch_share."""
  if mesh is None:
    return batch
  sharding = NamedSharding(mesh, PartitionSpec(BATCH))
  _, shares = batch_share(mesh)

  def place(x):
    x = np.asarray(x)
    return jax.make_array_from_process_local_data(
      sharding, x, (x.shape[0] * shares, *x.shape[1:])
    )

  return jax.tree.map(place, batch)


# --- Inside of a program.


def jit_step(
  step: Callable, state: Any, mesh: Mesh | None, **kwargs: Any
) -> Callable:
  """A training step, compiled: its state is donated and stays in its places.

  Args:
    step: from (state, ...) to (state, metrics).
    state: the first one, or its shapes.
    mesh: which the constraints below are for; None: one device.
    **kwargs: of jax.jit.
  """
  if mesh is None:
    return jax.jit(step, donate_argnums=0, **kwargs)
  metrics = NamedSharding(mesh, PartitionSpec())
  compiled = jax.jit(
    step,
    donate_argnums=0,
    out_shardings=(shardings(state, mesh), metrics),
    **kwargs,
  )

  return under(mesh, compiled)


def under(mesh: Mesh | None, function: Callable) -> Callable:
  """A compiled function that is traced with the constraints for a mesh."""
  if mesh is None:
    return function

  def run(*args, **kwargs):
    with jax.set_mesh(mesh):
      return function(*args, **kwargs)

  return run


def constrain(x: jax.Array, spec: tuple) -> jax.Array:
  """x, laid out by a spec of activations; the identity without a mesh.

  An axis that does not divide its dimension is left out: the prompt of no
  caption is one sample.
  """
  mesh = traced_mesh()
  if mesh is None:
    return x
  return jax.lax.with_sharding_constraint(x, dividing(x.shape, spec, mesh))


def constrain_params(tree: Any) -> Any:
  """Gradients laid out as their parameters; the identity without a mesh."""
  mesh = traced_mesh()
  if mesh is None:
    return tree
  return jax.tree.map(
    jax.lax.with_sharding_constraint, tree, shardings(tree, mesh)
  )


def whole_everywhere(tree: Any, mesh: Mesh | None) -> Any:
  """Host arrays, the same in every process, whole on every device of a mesh."""
  if mesh is None:
    return tree
  everywhere = NamedSharding(mesh, PartitionSpec())

  def place(array):
    array = np.asarray(array)
    return jax.make_array_from_callback(
      array.shape, everywhere, lambda index: array[index]
    )

  return jax.tree.map(place, tree)


def heads_axes(num_heads: int, mesh: Any) -> tuple[str, ...]:
  """What the heads of self-attention are divided over.

  In sampling over `context` too where they divide: a device then holds that
  part of the past alone, and tokens of queries and new keys are exchanged for
  heads. Else, and in training, it has its tokens' queries and gathers the keys.

  Args:
    num_heads: of the network.
    mesh: with these axes; with others as well it is one of sampling.
  """
  both = ('tensor', 'context')
  ways = math.prod(mesh.shape[axis] for axis in both)
  if set(mesh.axis_names) > set(AXES) and num_heads % ways == 0:
    return both
  return both[:1]


def traced_mesh() -> Any:
  """The mesh that is being traced under, if it has the axes here, or None."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh if set(AXES) <= set(mesh.axis_names) else None


def dividing(
  shape: tuple[int, ...], spec: PartitionSpec | tuple, mesh: Mesh
) -> PartitionSpec:
  """The spec without what does not divide its dimension."""

  if HEADS in spec:
    over = heads_axes(shape[spec.index(HEADS)], mesh)
    # Of these heads, all tokens.
    axes = {HEADS: over, 'context': None if 'context' in over else 'context'}
    spec = tuple(axes.get(a, a) if isinstance(a, str) else a for a in spec)

  def kept(size, axes):
    names = (axes,) if isinstance(axes, str) else axes or ()
    ways = math.prod(mesh.shape[name] for name in names)
    return axes if size % ways == 0 else None

  return PartitionSpec(*map(kept, shape, spec))
