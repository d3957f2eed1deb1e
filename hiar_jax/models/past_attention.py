"""Attention over a block's own tokens and what there is of the past.

The slots of a past fill from the first on, and are full for ever after. How
many frames there are is known when a program runs and not before; so a program
has a branch for each of a few prefixes of the slots and takes the shortest that
holds them. Only the attention is in the branches: a pass is compiled once.
"""

# B batch, T own tokens, S past tokens, H heads, K head width, R rows

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from hiar_jax.models import attention, quantised, rope
from hiar_jax.models.config import WanConfig
from hiar_jax.models.kv_cache import KV, KVCache, Picked

# Prefixes beside that of no slot. More waste less and are more to compile: six,
# those of a window of seven blocks, add a tenth to the time of a program for
# CPUs.
_MOST = 6


@flax.struct.dataclass
class Place:
  """Where the past of a layer is, and how much of it there is.

  Attributes:
    row: int32 scalars, the indices of its keys and values before [B, S, H, K].
    filled: int32 scalar, frames that are there.
    branch: from `branch_of`.
    sink_rotation: by which the first tokens are to be read later than they are,
      two arrays [t, K / 2]: none as long as the past is not full; None: never.
  """

  row: tuple[jax.Array | int, ...]
  filled: jax.Array
  branch: jax.Array
  sink_rotation: Any


def prefixes(slots: int, step: int) -> tuple[int, ...]:
  """Numbers of slots that a program has a branch for, rising from 0 to all.

  Args:
    slots: of the past.
    step: frames by which it fills.
  """
  steps = -(-slots // step)
  parts = min(steps, _MOST)
  ends = {step * -(-steps * part // parts) for part in range(1, parts + 1)}
  return (0, *sorted({min(end, slots) for end in ends})) if slots else (0,)


def branch_of(filled: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
  """Index of the shortest prefix that holds the filled slots, int32 scalar.

  Under `vmap` it is the same for all, that of the longest: indices of their own
  would have every branch computed.

  Args:
    filled: int32 scalar.
    sizes: from `prefixes`.
  """
  return jnp.sum(_most(filled) > jnp.array(sizes[:-1], jnp.int32))


def place_of(
  past: KVCache | Picked, sizes: tuple[int, ...], config: WanConfig
) -> Place:
  """Where pasts of layers are, their own indices aside.

  Args:
    past: of all layers.
    sizes: from `prefixes`.
    config: of the network.
  """
  rows, shift, rotation = past.rows, past.sink_shift, None
  if shift is not None:
    tokens = past.sink * config.tokens_per_frame
    rotation = tuple(
      jnp.broadcast_to(a, (tokens, a.shape[-1]))
      for a in rope.frame_shift(shift, config.head_dim)
    )
  branch = branch_of(rows.filled, sizes)
  return Place(rows.lead, rows.filled, branch, rotation)


@jax.custom_batching.custom_vmap
def _most(x):
  """The largest of all that a `vmap` maps over."""
  return x


@_most.def_vmap
def _most_of_batch(unused_size, is_mapped, x):
  (mapped,) = is_mapped
  return _most(jnp.max(x, 0) if mapped else x), False


def attend_past(
  q_BTHK: jax.Array,
  k_BTHK: jax.Array,
  v_BTHK: jax.Array,
  rows: KV,
  place: Place,
  *,
  sizes: tuple[int, ...],
  tokens_per_frame: int,
  backend: str,
) -> jax.Array:
  """Queries over their own keys and a layer's past.

  Args:
    q_BTHK: queries.
    k_BTHK: own keys.
    v_BTHK: own values.
    rows: pasts, [..., B, S, H, K] each, of which one is this layer's.
    place: which, and how much of it there is.
    sizes: from `prefixes`.
    tokens_per_frame: of the keys.
    backend: see `attention.attend`.

  Returns:
    As q.
  """

  def over(slots: int) -> jax.Array:
    if not slots:
      return attention.attend(q_BTHK, k_BTHK, v_BTHK, backend=backend)
    past = jax.tree.map(
      lambda a: _cut(a, place.row, slots * tokens_per_frame), rows
    )
    past_k, past_v = (
      quantised.restore(x, k_BTHK.dtype) for x in (past.k, past.v)
    )
    sink = []
    if place.sink_rotation is not None and slots == sizes[-1]:
      end = place.sink_rotation[0].shape[0]
      sink = [rope.rotate(past_k[:, :end], place.sink_rotation)]
      past_k = past_k[:, end:]
    # Own tokens first: the valid keys are then a prefix.
    return attention.attend(
      q_BTHK,
      jnp.concatenate([k_BTHK, *sink, past_k], 1),
      jnp.concatenate([v_BTHK, past_v], 1),
      length=k_BTHK.shape[1] + place.filled * tokens_per_frame,
      backend=backend,
    )

  if len(sizes) == 1:
    return over(sizes[0])
  branches = [functools.partial(over, size) for size in sizes]
  shortest = functools.partial(jax.lax.switch, place.branch, branches)
  if backend not in ('cudnn', 'auto') or attention.cudnn_refusal(
    q_BTHK, k_BTHK, v_BTHK
  ):
    return shortest()
  # cuDNN skips by length itself; a GPU's host would wait for the branch.
  return jax.lax.platform_dependent(cuda=branches[-1], default=shortest)


def _cut(rows: jax.Array, row: tuple[Any, ...], size: int) -> jax.Array:
  """The first tokens of a row, [B, size, H, K]."""
  batch, _, *heads = rows.shape[len(row) :]
  shape = (batch, size, *heads)
  start = (*row, *[0] * len(shape))
  cut = jax.lax.dynamic_slice(rows, start, (*[1] * len(row), *shape))
  return cut.reshape(shape)
