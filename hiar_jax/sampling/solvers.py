"""Solvers of the probability-flow ODE dx/dsigma = v(x, sigma), noise to clean.

A solver turns falling levels into a table with a row for each step, and a
state and a row into the next state. Rows are traced: a loop on the host
compiles one step, and `solve` scans over the table.

Source of UniPC: Zhao et al. 2023 (arXiv:2302.04867), data prediction,
B(h) = e^-h - 1, with alpha = 1 - sigma as in flow matching.
"""

# n steps

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax import noise_schedule

# (x, sigma) -> v, shape of x; sigma is a float32 scalar.
Flow = Callable[[jax.Array, jax.Array], jax.Array]


class State(NamedTuple):
  """Between two steps.

  Attributes:
    x: float32 sample at the level that was reached.
    memory: what the solver remembers of earlier steps.
  """

  x: jax.Array
  memory: tuple[jax.Array, ...] = ()


class Solver(NamedTuple):
  """How to step.

  Attributes:
    table: falling levels [n + 1] to a tree of float32 arrays [n, ...].
    init: x at the first level to the first state.
    step: (flow, state, row of the table) to the next state; one evaluation.
    evaluated: (state, next state) to the sample at the level between them, at
      which the flow was evaluated, as good as the solver knows it.
  """

  table: Callable[[Sequence[float] | np.ndarray], Any]
  init: Callable[[jax.Array], State]
  step: Callable[[Flow, State, Any], State]
  evaluated: Callable[[State, State], jax.Array]


def solve(
  solver: Solver, flow: Flow, x: jax.Array, levels: Sequence[float]
) -> jax.Array:
  """Takes x from the first level to the last, one evaluation of v a step.

  Args:
    solver: of SOLVERS.
    flow: v.
    x: sample at levels[0].
    levels: [n + 1], falling strictly within [0, 1].

  Returns:
    float32, shape of x.

  Raises:
    ValueError: if the levels are fewer than 2, do not fall or leave the range.
  """

  def step(state: State, row: Any) -> tuple[State, None]:
    return solver.step(flow, state, row), None

  state, _ = jax.lax.scan(step, solver.init(x), solver.table(levels))
  return state.x


def unipc_levels(num_steps: int, shift: float) -> np.ndarray:
  """Levels that Wan2.1 ships UniPC with, float64 [n + 1], the last one 0.

  They start at 0.999 before the shift: at 1 the log-ratio of signal to noise
  is infinite, and the second step would have to be of first order, too.

  Raises:
    ValueError: if num_steps is not at least 1, or shift is not positive.
  """
  if num_steps < 1:
    raise ValueError(f'num_steps={num_steps} is not at least 1')
  return noise_schedule.shift_sigmas(
    np.linspace(0.999, 0.0, num_steps + 1), shift
  )


class _EulerTable(NamedTuple):
  sigma: Any  # An array; in a step its row, which may be traced.
  sigma_next: Any


def _euler_table(levels: Sequence[float] | np.ndarray) -> _EulerTable:
  sigmas = _checked(levels).astype(np.float32)
  return _EulerTable(sigmas[:-1], sigmas[1:])


def _euler_init(x: jax.Array) -> State:
  return State(x.astype(jnp.float32))


def _euler_step(flow: Flow, state: State, row: _EulerTable) -> State:
  v = flow(state.x, row.sigma)
  return State(noise_schedule.euler_step(state.x, v, row.sigma, row.sigma_next))


class _UniPCTable(NamedTuple):
  """Weights of a step; x0 is the clean estimate, |last| at the step before.

  Attributes:
    sigma: [n] level at which the flow is evaluated.
    corrector: [n, 5] of x, last corrected x, x0, last x0, x0 before that.
    predictor: [n, 3] of corrected x, x0, last x0.
  """

  sigma: Any
  corrector: Any
  predictor: Any


def _unipc_table(levels: Sequence[float] | np.ndarray) -> _UniPCTable:
  """UniPC's coefficients: the solver is a linear two-step method in x and x0.

  The first step and the last are of first order, the others of second. The
  corrector of a step is of the predictor's order, applied once x0 is known at
  the step's end; none follows the last step, which needs no evaluation.
  """
  sigma = _checked(levels)
  num_steps = len(sigma) - 1
  # Infinite at the levels 1 and 0; every formula below has its limit there.
  with np.errstate(divide='ignore'):
    lam = np.log1p(-sigma) - np.log(sigma)
  corrector = np.zeros((num_steps, 5))
  predictor = np.zeros((num_steps, 3))
  corrector[0, 0] = 1.0
  for i in range(num_steps):
    h = lam[i + 1] - lam[i]
    scale = sigma[i + 1] / sigma[i]
    # -alpha (e^-h - 1), the weight of x0 in a step of first order.
    gain = -(1 - sigma[i + 1]) * np.expm1(-h)
    first_order = i in (0, num_steps - 1)
    # 1 / r of the paper's differences (last x0 - x0) / r.
    q = 0.0 if first_order else h / (lam[i - 1] - lam[i])
    slope = gain * q / 2
    predictor[i] = scale, gain - slope, slope
    if i == num_steps - 1:
      break
    if first_order:
      new, old = 0.5, 0.0
    else:
      # rho of the paper: new + rho = b1, new + rho / q = b2, old = rho q.
      phi = np.expm1(-h)
      b1 = (-phi / h - 1) / phi
      b2 = 2 * ((phi / h + 1) / h - 0.5) / phi
      rho = (b2 - b1) * q / (1 - q)
      new, old = b1 - rho, rho * q
    corrector[i + 1] = 0, scale, gain * new, gain * (1 - new - old), gain * old
  return _UniPCTable(
    *(a.astype(np.float32) for a in (sigma[:-1], corrector, predictor))
  )


def _unipc_init(x: jax.Array) -> State:
  x = x.astype(jnp.float32)
  return State(x, (jnp.zeros_like(x), jnp.zeros_like(x), jnp.zeros_like(x)))


def _unipc_step(flow: Flow, state: State, row: _UniPCTable) -> State:
  x, (x_last, x0_last, x0_before) = state
  x0 = noise_schedule.flow_to_x0(x, flow(x, row.sigma), row.sigma)
  x = _mix(row.corrector, x, x_last, x0, x0_last, x0_before)
  return State(_mix(row.predictor, x, x0, x0_last), (x, x0, x0_last))


def _mix(weights: jax.Array, *arrays: jax.Array) -> jax.Array:
  return sum(w * a for w, a in zip(weights, arrays, strict=True))


def _checked(levels: Sequence[float] | np.ndarray) -> np.ndarray:
  array = np.asarray(levels, np.float64)
  if (
    array.ndim != 1
    or len(array) < 2
    or array[0] > 1
    or array[-1] < 0
    or not np.all(np.diff(array) < 0)
  ):
    raise ValueError(f'levels {array.tolist()} do not fall within [0, 1]')
  return array


SOLVERS = {
  'euler': Solver(
    _euler_table, _euler_init, _euler_step, lambda state, _: state.x
  ),
  # After its step it has the corrected sample, not only the predicted one.
  'unipc': Solver(
    _unipc_table, _unipc_init, _unipc_step, lambda _, after: after.memory[0]
  ),
}
