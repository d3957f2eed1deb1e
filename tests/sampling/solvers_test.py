"""Solvers: their order of convergence, their limits, their tables."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax import noise_schedule
from hiar_jax.sampling import solvers

# A Gaussian world: x0 ~ N(MEAN, STD^2), where everything is known.
MEAN, STD = 0.7, 0.4


def spread(sigma):
  """Standard deviation of x at a level."""
  return ((1 - sigma) ** 2 * STD**2 + sigma**2) ** 0.5


def flow(x, sigma):
  """E[eps - x0 | x]: the marginal's mean and spread, moved along."""
  slope = (sigma - (1 - sigma) * STD**2) / spread(sigma) ** 2
  return -MEAN + slope * (x - (1 - sigma) * MEAN)


def exact(x, start, end):
  """The ODE's solution: a sample keeps its quantile."""
  quantile = (x - (1 - start) * MEAN) / spread(start)
  return (1 - end) * MEAN + spread(end) * quantile


def solved(name, x, levels):
  return jax.jit(
    lambda x: solvers.solve(solvers.SOLVERS[name], flow, x, levels)
  )(x)


@pytest.mark.parametrize(
  'name, order, end', [('euler', 1, 0.0), ('unipc', 2, 0.0), ('unipc', 2, 0.2)]
)
def test_error_falls_with_the_solvers_order(name, order, end):
  x = jnp.linspace(-2.0, 2.0, 9)
  errors = []
  for num_steps in (32, 64, 128):
    levels = np.linspace(0.9, end, num_steps + 1)
    y = solved(name, x, levels)
    errors.append(float(abs(y - exact(x, 0.9, end)).max()))
  rates = np.log2(np.divide(errors[:-1], errors[1:]))
  np.testing.assert_allclose(rates, order, atol=0.2)
  assert errors[-1] < (1.5e-2 if name == 'euler' else 3e-4)


@pytest.mark.parametrize('name', solvers.SOLVERS)
def test_a_straight_flow_is_solved_exactly_in_any_steps(name):
  noise = jax.random.normal(jax.random.key(0), (2, 5))
  clean = jax.random.normal(jax.random.key(1), (2, 5))
  for levels in ((1.0, 0.0), (1.0, 0.6, 0.5, 0.0), (1.0, 0.9, 0.8, 0.3)):
    y = solvers.solve(
      solvers.SOLVERS[name], lambda x, sigma: noise - clean, noise, levels
    )
    wanted = noise_schedule.add_noise(clean, noise, jnp.float32(levels[-1]))
    np.testing.assert_allclose(y, wanted, atol=1e-6)


def test_the_level_1_is_the_limit_of_levels_below_it():
  tables = [
    solvers.SOLVERS['unipc'].table([start, 0.9, 0.6, 0.3, 0.0])
    for start in (1.0, 1 - 1e-12)
  ]
  assert all(np.isfinite(a).all() for table in tables for a in table)
  # Logarithmically slow: the second step knows how far away the first level is.
  for ours, limit in zip(*tables):
    np.testing.assert_allclose(ours, limit, atol=0.05)


def test_weights_of_a_step_leave_a_clean_constant_where_it_is():
  levels = solvers.unipc_levels(7, 5.0)
  table = solvers.SOLVERS['unipc'].table(levels)
  alpha = 1 - levels
  # x = alpha c and x0 = c at every level.
  np.testing.assert_allclose(
    table.predictor @ [0, 1, 1] + table.predictor[:, 0] * alpha[:-1],
    alpha[1:],
    atol=1e-6,
  )
  np.testing.assert_allclose(
    table.corrector[1:] @ [0, 0, 1, 1, 1] + table.corrector[1:, 1] * alpha[:-2],
    alpha[1:-1],
    atol=1e-6,
  )


def test_a_loop_on_the_host_takes_the_steps_of_solve():
  levels = solvers.unipc_levels(5, 3.0)
  for solver in solvers.SOLVERS.values():
    x = jnp.linspace(-1.0, 1.0, 5)
    table, state = solver.table(levels), solver.init(x)
    for i in range(5):
      state = solver.step(
        flow, state, jax.tree.map(operator.itemgetter(i), table)
      )
    np.testing.assert_allclose(
      state.x, solvers.solve(solver, flow, x, levels), atol=1e-6
    )


@pytest.mark.parametrize(
  'levels', [(1.0,), (0.5, 0.5), (0.0, 1.0), (1.1, 0.0), (1.0, -0.1)]
)
@pytest.mark.parametrize('name', solvers.SOLVERS)
def test_bad_levels_are_refused(name, levels):
  with pytest.raises(ValueError, match='do not fall within'):
    solvers.SOLVERS[name].table(levels)


def test_bad_schedules_are_refused():
  with pytest.raises(ValueError, match='num_steps=0 is not at least 1'):
    solvers.unipc_levels(0, 5.0)
  with pytest.raises(ValueError, match='shift=-1.0 is not positive'):
    solvers.unipc_levels(4, -1.0)
