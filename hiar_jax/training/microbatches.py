"""A batch taken in parts, one after the other, to need less memory.

The parts' gradients are averaged and make one update. All that is random is
drawn for the whole batch before, so that the parts do not matter. A loss that
is a sum may be given as its terms: each has its own backward pass then, which
adds to the gradient in place and lets go of its activations before the next.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hiar_jax.models import sharding

Metrics = dict[str, jax.Array]
# (params, start, read) to (loss, metrics), see `gradient`.
Term = Callable[[Any, Any, Any], tuple[jax.Array, Metrics]]


def _as_it_is(params: Any, part: Any) -> tuple[Any, Any, Metrics]:
  del params
  return part, (), {}


def gradient(
  terms: Sequence[Term],
  params: Any,
  whole: Any,
  num_parts: int,
  prepare: Callable[[Any, Any], tuple[Any, Any, Metrics]] = _as_it_is,
  *,
  in_place: bool = True,
) -> tuple[Any, Metrics]:
  """Gradient of a sum of terms, averaged over the parts of a batch.

  Args:
    terms: each (params, start, read) to (loss, metrics), means over the samples
      of a part; metrics of one name are added.
    params: to differentiate by.
    whole: arrays with a leading axis of samples, which is cut.
    num_parts: how many parts there are.
    prepare: (params, part) to what the terms' passes start from, what they
      only read, which may be large, and metrics. No gradient goes through it.
      Without it they start from the part, and have nothing to read.
    in_place: whether a layer's gradient is added where the sum lies, so that
      one stack of gradients is held, and not a term's beside it. It must be
      False where the layers do not take `params` as they are: adapters.

  Returns:
    The gradient, and all metrics.

  Raises:
    ValueError: if the parts do not divide the samples.
  """
  zeros = sharding.constrain_params(jax.tree.map(jnp.zeros_like, params))
  total = jax.tree.map(jax.new_ref, zeros)

  def add(term, read, start):
    backward: Any  # jax declares it without its with_refs.
    loss, backward, metrics = jax.vjp(
      lambda params: term(params, start, read), params, has_aux=True
    )
    share = jnp.full_like(loss, 1 / num_parts)
    if in_place:
      # Of a scan's arrays jax 0.10 must find those with a ref first. flax's
      # layers have their parameters there; scaled ones would have none.
      backward.with_refs(total)(share)
    else:
      jax.tree.map(
        lambda ref, grad: jax.ref.addupdate(ref, ..., grad),
        *(total, backward(share)[0]),
      )
    return metrics

  def one_part(part):
    start, read, metrics = jax.lax.stop_gradient(prepare(params, part))
    for term in terms:
      so_far = jax.tree.map(lambda ref: ref[...], total)
      finite = jnp.isfinite(optax.tree.norm((so_far, metrics)))
      _, shapes = jax.eval_shape(term, params, start, read)
      run = functools.partial(add, term, read)
      more = _once_if(finite, run, start, shapes)
      for name, value in more.items():
        metrics[name] = metrics[name] + value if name in metrics else value
    return metrics

  if num_parts == 1:
    metrics = one_part(whole)
  else:
    _, metrics = jax.lax.scan(
      lambda _, part: (None, one_part(part)), None, _parts(whole, num_parts)
    )
    metrics = jax.tree.map(lambda m: jnp.mean(m, 0), metrics)
  grads = jax.tree.map(jax.freeze, total)
  return sharding.constrain_params(grads), metrics


def _once_if(finite, run, start, shapes):
  """What run(start) gives, once all that comes before it is there and finite.

  If it is not finite no update will come of it, and this gives NaN.

  A loop that runs once or not at all: what XLA keeps of a term then begins and
  ends in the loop, and the gradient is added to in place. Without it XLA takes
  the terms beside each other and holds all that they need at a time (on GPUs
  across an optimization_barrier too), and a branch would copy the gradient.
  """

  def body(state):
    # Or XLA for TPUs takes what no turn changes out of the loop, which is the
    # whole forward pass, and makes it a second time inside. What goes through
    # the barrier may be copied.
    turn, of_turn = jax.lax.optimization_barrier((state[0], start))
    return turn + 1, run(of_turn)

  nothing = jax.tree.map(lambda a: jnp.full(a.shape, jnp.nan, a.dtype), shapes)
  _, results = jax.lax.while_loop(
    lambda state: (state[0] < 1) & finite,
    body,
    (jnp.zeros((), jnp.int32), nothing),
  )
  return results


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
