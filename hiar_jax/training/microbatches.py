"""A batch taken in parts, one after the other, to need less memory.

The parts' gradients are averaged and make one update. All that is random is
drawn for the whole batch before, so that the parts do not matter.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hiar_jax.models import sharding

Metrics = dict[str, jax.Array]


def gradient(
  loss_fn: Callable[[Any, Any], tuple[jax.Array, Metrics]],
  params: Any,
  whole: Any,
  num_parts: int,
) -> tuple[Any, Metrics]:
  """Gradient and metrics of loss_fn(params, part), averaged over the parts.

  Args:
    loss_fn: to (loss, metrics), both means over the samples of a part.
    params: to differentiate by.
    whole: arrays with a leading axis of samples, which is cut.
    num_parts: how many parts there are.

  Raises:
    ValueError: if the parts do not divide the samples.
  """
  gradient_of = jax.grad(loss_fn, has_aux=True)
  if num_parts == 1:
    grads, metrics = gradient_of(params, whole)
    return sharding.constrain_params(grads), metrics

  def one_part(total, part):
    grads, metrics = gradient_of(params, part)
    total = jax.tree.map(lambda t, g: t + g / num_parts, total, grads)
    return sharding.constrain_params(total), metrics

  zeros = sharding.constrain_params(jax.tree.map(jnp.zeros_like, params))
  grads, metrics = jax.lax.scan(one_part, zeros, _parts(whole, num_parts))
  return grads, jax.tree.map(lambda m: jnp.mean(m, 0), metrics)


def _parts(tree, num_parts):
  """[B, ...] to [num_parts, B / num_parts, ...].

  Part i has the samples i, i + num_parts, ...: divided over devices, each of
  them finds its part of every part at home.
  """

  def cut(x):
    if x.shape[0] % num_parts:
      raise ValueError(
        f'a batch of {x.shape[0]} is not divisible by microbatches={num_parts}'
      )
    return jnp.moveaxis(x.reshape(-1, num_parts, *x.shape[1:]), 1, 0)

  return jax.tree.map(cut, tree)
