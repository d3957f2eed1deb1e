"""Noise levels and the formulas on them against the public scheduler."""

import functools

import jax.numpy as jnp
import numpy as np

from hiar_jax import noise_schedule as ns
from tests.parity.golden_lib import FORMULA, cases, load, stored


def _run(shift: float) -> dict[str, np.ndarray]:
  """Every stored array of one schedule."""
  golden = load('scheduler')
  here = f'out/shift{shift:.0f}'
  x0, eps, flow = (golden[f'in/{name}'] for name in ('x0', 'eps', 'flow'))
  table = golden[f'{here}/train1000/timesteps']

  def snapped(timesteps):
    # The public code uses the nearest level of its table, ours the level.
    index = np.abs(table - np.reshape(timesteps, (-1, 1))).argmin(1)
    return golden[f'{here}/train1000/sigmas'][index]

  sigma = snapped(golden['in/timesteps'])
  target = snapped(golden['in/target_timesteps'])
  x = ns.add_noise(x0, eps, sigma)

  def step(sigma_next, rows=slice(None)):
    return ns.euler_step(x[rows], flow[rows], sigma[rows], sigma_next)

  fine = ns.sampling_sigmas(1000, shift)
  following = [np.abs(fine - s).argmin() + 1 for s in sigma[:4]]
  ours = {
    'train1000/linear_timesteps_weights': ns.bell_weight(
      jnp.asarray(fine[:-1], jnp.float32), shift
    ),
    'warped_denoising_step_list': ns.TIMESTEPS
    * np.asarray(ns.warped_levels((1000, 750, 500, 250), shift)[:-1]),
    'add_noise': x,
    'step_target': step(target),
    'step_target_scalar833': step(snapped(833.3333)),
    'step_target_int0': step(snapped(0)),
    'step_to_final': step(0.0),
    'step_plain': step(fine[following], slice(4)),
    'flow_to_x0': ns.flow_to_x0(x, flow, sigma),
    'x0_to_flow': ns.x0_to_flow(x, x0, sigma),
    'training_weight': ns.bell_weight(sigma, shift),
  }
  for name, num_steps in (('train1000', 1000), ('infer48', 48)):
    sigmas = ns.sampling_sigmas(num_steps, shift)[:-1]
    ours[f'{name}/sigmas'] = sigmas
    ours[f'{name}/timesteps'] = ns.TIMESTEPS * sigmas
  return {f'{here}/{name}': array for name, array in ours.items()}


CASES = [
  case
  for shift in (5.0, 8.0)
  for case in cases(
    'scheduler',
    functools.partial(_run, shift),
    stored('scheduler', f'out/shift{shift:.0f}/'),
    FORMULA,
    relative=True,
  )
]
