"""A batch taken in parts, one after the other, to need less memory.

The parts' gradients are averaged and make one update. All that is random is
drawn for the whole batch before, so that the parts do not matter. A loss that
is a sum may be given as its terms: each has its own backward pass then, and
lets go of its activations before the next.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hiar_jax.models import sharding

Metrics = dict[str, jax.Array]


def gradient(
  terms: Sequence[Callable[[Any, Any], tuple[jax.Array, Metrics]]],
  params: Any,
  whole: Any,
  num_parts: int,
) -> tuple[Any, Metrics]:
  """Gradient of a sum of terms(params, part), averaged over the parts.

  Args:
    terms: each to (loss, metrics), both means over the samples of a part.
    params: to differentiate by.
    whole: arrays with a leading axis of samples, which is cut.
    num_parts: how many parts there are.

  Returns:
    The gradient, and the metrics of all terms.

  Raises:
    ValueError: if the parts do not divide the samples.
  """
  if num_parts == 1:
    return _of_terms(terms, params, whole)

  def one_part(total, part):
    grads, metrics = _of_terms(terms, params, part)
    total = jax.tree.map(lambda t, g: t + g / num_parts, total, grads)
    return sharding.constrain_params(total), metrics

  zeros = sharding.constrain_params(jax.tree.map(jnp.zeros_like, params))
  grads, metrics = jax.lax.scan(one_part, zeros, _parts(whole, num_parts))
  return grads, jax.tree.map(lambda m: jnp.mean(m, 0), metrics)


def _of_terms(terms, params, part):
  """Gradient of the sum of the terms, one after the other, and metrics.

  Of a term after a gradient that is not finite nothing is computed: no update
  will come of it, and the term's metrics are NaN.
  """
  total, metrics = None, Metrics()
  for term in terms:

    def one(term=term):
      grads, metrics = jax.grad(term, has_aux=True)(params, part)
      return sharding.constrain_params(grads), metrics

    if total is None:
      total, metrics = one()
      continue
    # The condition is what makes a term wait for the gradient before it: XLA
    # would take both beside each other, and hold all that they need at a time.
    # (On GPUs it does so across an optimization_barrier.)
    grads, more = jax.lax.cond(
      jnp.isfinite(optax.tree.norm(total)), one, lambda one=one: _nothing(one)
    )
    grads = jax.tree.map(jnp.add, total, grads)
    total = sharding.constrain_params(grads)
    metrics |= more
  return total, metrics


def _nothing(one):
  """What a term gives that is not computed."""
  return jax.tree.map(
    lambda a: jnp.full(a.shape, jnp.nan, a.dtype), jax.eval_shape(one)
  )


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
