"""Noise levels and the formulas that move a sample between them.

Flow matching (Lipman et al. 2022, arXiv:2210.02747) with the shifted schedule
of Esser et al. 2024 (arXiv:2403.03206): a level is sigma in [0, 1], 1 = pure
noise, x_sigma = (1 - sigma) x0 + sigma eps, and the network predicts the flow
v = eps - x0. The timestep that the network is given is 1000 sigma, exactly.

Levels are arrays whose axes are the leading axes of the sample, e.g. [B, F]
beside x_BFHWC; `expand` adds the missing trailing axes.
"""

from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

TIMESTEPS = 1000.0

# What comes in comes out: NumPy's are float64, and are for tables.
Levels = TypeVar('Levels', jax.Array, np.ndarray)


def expand(sigma: ArrayLike, x: jax.Array) -> jax.Array:
  """Returns `sigma` in float32 with trailing axes of size 1 up to x.ndim."""
  sigma = jnp.asarray(sigma, jnp.float32)
  return sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))


def shift_sigmas(sigmas: Levels, shift: float) -> Levels:
  """Moves sampling effort toward high noise: s*shift / (1 + (shift-1)*s).

  Args:
    sigmas: noise levels in [0, 1].
    shift: > 0; 5.0 for the student and 8.0 for the teacher's trajectories.

  Returns:
    Same shape, same end points.

  Raises:
    ValueError: if shift is not positive.

  Source: Esser et al. 2024 (arXiv:2403.03206), resolution-dependent shifting.
  """
  if shift <= 0:
    raise ValueError(f'shift={shift} is not positive')
  return shift * sigmas / (1 + (shift - 1) * sigmas)


def sampling_sigmas(num_steps: int, shift: float) -> np.ndarray:
  """Levels of a `num_steps` sampler: shifted linspace(1, 0), float64 [n + 1].

  The last entry is 0 (clean); the first `num_steps` are what Wan2.1 calls the
  scheduler's sigmas.
  """
  if num_steps < 1:
    raise ValueError(f'num_steps={num_steps} is not at least 1')
  return shift_sigmas(np.linspace(1.0, 0.0, num_steps + 1), shift)


def warped_levels(
  indices: Sequence[int], shift: float, num_train: int = 1000
) -> tuple[float, ...]:
  """Levels of few-step denoising: `indices` warped through the fine schedule.

  Args:
    indices: strictly falling step indices in (0, num_train], e.g.
      (1000, 750, 500, 250).
    shift: of the schedule with `num_train` steps.
    num_train: number of steps of the fine schedule.

  Returns:
    S + 1 sigmas, the last of them 0. For the indices above and shift 5:
    (1, 0.9375, 0.8333, 0.625, 0).

  Raises:
    ValueError: if the indices are empty, do not fall or leave the range.
  """
  indices = [int(i) for i in indices]
  falling = all(a > b for a, b in zip(indices, indices[1:], strict=False))
  if not indices or not falling or indices[0] > num_train or indices[-1] <= 0:
    raise ValueError(
      f'denoising indices {indices} must fall strictly within '
      f'({num_train}, ..., 1)'
    )
  sigmas = sampling_sigmas(num_train, shift)
  return tuple(float(sigmas[num_train - i]) for i in indices) + (0.0,)


def warp_timestep(u: jax.Array, shift: float) -> jax.Array:
  """Sigma of a uniform draw u in [0, 1): the law of training timesteps."""
  return shift_sigmas(u, shift)


def add_noise(x0: jax.Array, eps: jax.Array, sigma: ArrayLike) -> jax.Array:
  """(1 - sigma) x0 + sigma eps; exactly x0 at sigma = 0."""
  sigma = expand(sigma, x0)
  return (1 - sigma) * x0 + sigma * eps


def flow_to_x0(x: jax.Array, flow: jax.Array, sigma: ArrayLike) -> jax.Array:
  """Clean estimate of a sample at level sigma: x - sigma v."""
  return x - expand(sigma, x) * flow


def x0_to_flow(x: jax.Array, x0: jax.Array, sigma: ArrayLike) -> jax.Array:
  """Flow that leads from x0 to x at level sigma > 0: (x - x0) / sigma."""
  return (x - x0) / expand(sigma, x)


def euler_step(
  x: jax.Array, flow: jax.Array, sigma: ArrayLike, sigma_next: ArrayLike
) -> jax.Array:
  """One step of the probability-flow ODE from sigma to sigma_next."""
  return x + (expand(sigma_next, x) - expand(sigma, x)) * flow


def bell_weight(
  sigma: jax.Array, shift: float, num_train: int = 1000
) -> jax.Array:
  """Flow-matching loss weight that favours the middle of the schedule.

  A Gaussian of the timestep around 500, lowered to 0 at its smallest and
  scaled to mean 1 over the `num_train` levels (the training weight of the
  Wan2.1 recipes).

  Args:
    sigma: levels, any shape.
    shift: of the schedule over which the weight is normalised.
    num_train: number of levels of that schedule.

  Returns:
    Weights, shape of `sigma`, float32.
  """

  def bell(s):
    return np.exp(-2 * (s - 0.5) ** 2)

  table = bell(sampling_sigmas(num_train, shift)[:-1])
  low = table.min()
  scale = num_train / (table - low).sum()
  return (jnp.exp(-2 * (sigma - 0.5) ** 2) - low) * scale
