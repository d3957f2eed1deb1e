"""How much memory a compiled program is said to need."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from hiar_jax.planning import chips, compiled


def sorted_and_back(x):
  turned = jax.lax.optimization_barrier(jnp.sin(x)[::-1])
  return jnp.sum(jnp.sort(turned, 0) * turned)


def program(topology, rows):
  device = chips.describe(topology).devices[0]
  x = jax.ShapeDtypeStruct(
    (100, 1024 * rows, 1024), jnp.float32, sharding=SingleDeviceSharding(device)
  )
  return compiled.compile_program(jax.jit(sorted_and_back), (x,))


@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None, reason='needs the extra tpu'
)
def test_a_tpus_program_needs_what_it_would_be_refused_for():
  """And not the sum of all places that its compiler gives while there is room.

  A v5e gives programs 15.75 GiB.
  """
  array = 4 * 100 * 1024 * 1024
  small, large, too_large = (program('v5e:1x1', rows) for rows in (6, 9, 10))
  for rows, one in ((6, small), (9, large)):
    assert one.temporaries == pytest.approx(3.08 * rows * array, rel=0.01)
  assert too_large.temporaries is None
  refused = float(re.search(r'\(([\d.]+)G\)', too_large.refusal)[1]) * 2**30
  needed = (large.arguments + large.temporaries) * 10 / 9
  assert refused == pytest.approx(needed, rel=0.002)


def test_a_program_for_this_machine_needs_its_temporaries_and_results():
  def run(x, y):
    return jnp.sort(x)[::-1] + y[:1], y

  here = SingleDeviceSharding(jax.devices()[0])
  x, y = (
    jax.ShapeDtypeStruct((n,), jnp.float32, sharding=here) for n in (4000, 10)
  )
  found = compiled.compile_program(jax.jit(run, donate_argnums=1), (x, y))
  assert found.arguments == 4 * 4010
  # The result, and at most some arrays of that size beside it.
  assert 4 * 4000 <= found.temporaries <= 6 * 4 * 4000
