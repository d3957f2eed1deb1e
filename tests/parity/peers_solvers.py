"""The solvers against the schedulers of diffusers, on a flow that bends."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from hiar_jax import noise_schedule
from hiar_jax.sampling import solvers
from tests.parity import peers_lib


def flow(x, sigma):
  """Of a Gaussian world, N(0.7, 0.4^2), and an oscillation across it."""
  spread = (1 - sigma) ** 2 * 0.16 + sigma**2
  slope = (sigma - (1 - sigma) * 0.16) / spread
  x = x - 0.7 * (1 - sigma)
  return slope * x - 0.7 + 0.1 * (x**2 + 1) ** 0.5


def schedulers(num_steps: int, shift: float) -> dict[str, Any]:
  """The peers by our names, over the levels that Wan2.1 uses."""
  import diffusers

  unipc = diffusers.UniPCMultistepScheduler(
    use_flow_sigmas=True, flow_shift=shift, prediction_type='flow_prediction'
  )
  # Before the shift, which is theirs.
  unipc.set_timesteps(sigmas=np.linspace(0.999, 0, num_steps + 1)[:-1])
  euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
  euler.set_timesteps(sigmas=np.linspace(1, 0, num_steps + 1)[:-1])
  return {'unipc': unipc, 'euler': euler}


def solver_comparisons(
  *, num_steps: int, shift: float
) -> Iterator[peers_lib.Comparison]:
  """The levels, and samples that were taken through them."""
  import torch

  own = {
    'unipc': solvers.unipc_levels(num_steps, shift),
    'euler': noise_schedule.sampling_sigmas(num_steps, shift),
  }
  start = np.random.default_rng(4).normal(size=(2, 3, 8, 8))
  for name, scheduler in schedulers(num_steps, shift).items():
    names = (
      f'{name}, {num_steps} steps, shift {shift:g}',
      f'diffusers {type(scheduler).__name__}',
    )
    x = torch.from_numpy(start.astype(np.float32))
    for sigma, timestep in zip(scheduler.sigmas, scheduler.timesteps):
      x = scheduler.step(flow(x, sigma), timestep, x).prev_sample
    sigmas = scheduler.sigmas.numpy()
    yield peers_lib.Comparison(
      *names, 'levels', ours=own[name].astype(np.float32), theirs=sigmas
    )
    ours = solvers.solve(
      solvers.SOLVERS[name], flow, start.astype(np.float32), own[name]
    )
    yield peers_lib.Comparison(
      *names, 'samples', ours=np.asarray(ours), theirs=peers_lib.to_numpy(x)
    )
