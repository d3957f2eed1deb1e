"""Attention on a mesh: what of queries and keys each device works on.

See models/sharding.py for what lies where.
"""

# B batch, F frames, P tokens per frame, S keys, H heads, K head width

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from hiar_jax.models import sharding


def split_queries(
  attend: Callable[..., jax.Array],
  q_BFPHK: jax.Array,
  keys_BSHK: jax.Array,
  values_BSHK: jax.Array,
  *,
  rotation: Any = None,
  mask_FPS: jax.Array | None = None,
  rows: Any = None,
  common: Any = None,
  spec: tuple = sharding.QUERIES_BFPHK,
) -> jax.Array:
  """attend(...) with every device's own queries and heads over whole keys.

  Done by hand: a TPU kernel cannot be divided by XLA, and a loop over queries
  would be divided badly.

  Args:
    attend: from the arguments below, in their order, to an array like q.
    q_BFPHK: queries.
    keys_BSHK: keys.
    values_BSHK: values.
    rotation: of the queries, two arrays [F, P, K / 2], or None.
    mask_FPS: bool or None.
    rows: more keys and values, [..., B, S, H, K], each row those of a layer.
    common: arrays that are whole on every device.
    spec: of the queries.
  """
  arguments = (
    *(q_BFPHK, keys_BSHK, values_BSHK),
    *(rotation, mask_FPS, rows, common),
  )
  mesh = sharding.traced_mesh()
  if mesh is None:
    return attend(*arguments)
  queries = sharding.dividing(q_BFPHK.shape, spec, mesh)
  batch, _, tokens, heads, _ = queries
  keys = PartitionSpec(batch, None, heads)
  by_token = PartitionSpec(None, tokens)
  lead = len(jax.tree.leaves(rows)[0].shape) - 4 if rows is not None else 0
  of_rows = PartitionSpec(*[None] * lead, batch, None, heads)
  specs = (queries, keys, keys, by_token, by_token, of_rows, PartitionSpec())
  return jax.shard_map(
    attend,
    in_specs=tuple(
      jax.tree.map(lambda _, spec=spec: spec, argument)
      for argument, spec in zip(arguments, specs, strict=True)
    ),
    out_specs=queries,
    axis_names=_free_axes(mesh),
    # Pallas kernels do not say over which axes their results vary.
    check_vma=False,
  )(*arguments)


def map_keys(
  function: Callable[[jax.Array], jax.Array], x_BSHK: jax.Array
) -> jax.Array:
  """function(x), shaped like x, of every device's own samples and heads.

  For what XLA cannot divide: it would gather the keys of all samples on every
  device first.
  """
  mesh = sharding.traced_mesh()
  if mesh is None:
    return function(x_BSHK)
  spec = sharding.dividing(x_BSHK.shape, sharding.KEYS_BSHK, mesh)
  return jax.shard_map(
    function,
    in_specs=(spec,),
    out_specs=spec,
    axis_names=_free_axes(mesh),
    check_vma=False,
  )(x_BSHK)


def _free_axes(mesh: Any) -> set[str]:
  """Axes that are not divided by hand already, as sampling's stages may be.

  All of them, whatever is divided over them: a TPU kernel takes no other.
  """
  return {
    name
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if kind != AxisType.Manual
  }
