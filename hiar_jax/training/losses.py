"""Losses, each with its equation. All run in float32 and are means.

x0, eps, flow: [B, F, h, w, C]; sigma: [B or 1, F or 1].
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hiar_jax import noise_schedule

FORWARD_KL_TARGETS = ('velocity', 'chord_x0', 'final_x0', 'euler')


def flow_matching(
  flow: jax.Array,
  x0: jax.Array,
  eps: jax.Array,
  weight: jax.Array | None = None,
) -> jax.Array:
  """mean w || v - (eps - x0) ||^2.

  The teacher's loss on videos, and the critic's on rollouts (the "fake score"
  denoising loss, DMD2, arXiv:2405.14867). `weight` is [B or 1, F or 1].
  """
  error = jnp.square(flow.astype(jnp.float32) - (eps - x0))
  if weight is not None:
    error = noise_schedule.expand(weight, error) * error
  return jnp.mean(error)


def reverse_kl_direction(
  x0: jax.Array, fake_x0: jax.Array, real_x0: jax.Array
) -> jax.Array:
  """Where DMD pushes x0: (fake - real) / mean |x0 - real|, a constant.

  Args:
    x0: the student's output.
    fake_x0: the critic's clean estimate of the re-noised output.
    real_x0: the teacher's (guided) clean estimate of the same.

  Source: eqs. 7-8 of DMD (arXiv:2311.18828), with the normaliser of its
  public code, over all frames; a normaliser of 0 gives 0.
  """
  x0, fake_x0, real_x0 = (x.astype(jnp.float32) for x in (x0, fake_x0, real_x0))
  axes = tuple(range(1, x0.ndim))
  scale = jnp.mean(jnp.abs(x0 - real_x0), axis=axes, keepdims=True)
  direction = jnp.nan_to_num(
    (fake_x0 - real_x0) / scale, posinf=0.0, neginf=0.0
  )
  return jax.lax.stop_gradient(direction)


def reverse_kl_along(x0: jax.Array, direction: jax.Array) -> jax.Array:
  """A loss whose gradient in x0 is `direction` / n, and its size that of DMD.

  Args:
    x0: the student's output, or some of its frames.
    direction: of `reverse_kl_direction`, of the same frames.
  """
  x0 = x0.astype(jnp.float32)
  error = jnp.square(x0 - jax.lax.stop_gradient(x0 - direction))
  return 0.5 * jnp.mean(error)


def forward_kl_pair(
  trajectory: Sequence[jax.Array] | jax.Array,
  point_sigmas: Sequence[float],
  student_sigmas: Sequence[float],
  step: int | jax.Array,
  target: str,
) -> tuple[jax.Array, float | jax.Array, jax.Array]:
  """What the student gets and must answer at one step of a trajectory.

  Args:
    trajectory: S + 1 latents of a teacher ODE trajectory, noise first; one
      array for a traced step.
    point_sigmas: the S + 1 levels at which those points lie.
    student_sigmas: the S + 1 levels given to the student. Equal to
      `point_sigmas` unless the public code's mixed form is wanted (spec 9).
    step: i, the step that the student must make; a traced one is not compared
      with the length of the trajectory.
    target: 'velocity' (eq. 10): the chord (x_{i+1} - x_i) / (s_{i+1} - s_i);
      'chord_x0': x_i - s_i * chord at the points' levels; 'final_x0': the
      trajectory's end; 'euler': x_{i+1}, as the student's Euler end point.

  Returns:
    (input x_i, its level, target).

  Raises:
    ValueError: for an unknown target or a step outside the trajectory.
  """
  num_steps = len(point_sigmas) - 1
  if target not in FORWARD_KL_TARGETS:
    raise ValueError(
      f'forward_kl target {target!r} is not one of {FORWARD_KL_TARGETS}'
    )
  if isinstance(step, int) and not 0 <= step < num_steps:
    raise ValueError(f'step {step} is outside of 0..{num_steps - 1}')
  points: Any = trajectory  # An array, where the step is traced.
  x, x_next = points[step], points[step + 1]
  if target == 'velocity':
    answer = (x_next - x) / number_at(_widths(student_sigmas), step)
  elif target == 'chord_x0':
    chord = (x_next - x) / number_at(_widths(point_sigmas), step)
    answer = x - number_at(point_sigmas, step) * chord
  elif target == 'final_x0':
    answer = points[num_steps]
  else:
    answer = x_next
  return x, number_at(student_sigmas, step), answer


def number_at(
  numbers: Sequence[float], index: int | jax.Array
) -> float | jax.Array:
  """One of some numbers; a float32 scalar if the index is traced."""
  if isinstance(index, int):
    return numbers[index]
  return jnp.asarray(numbers, jnp.float32)[index]


def _widths(sigmas: Sequence[float]) -> list[float]:
  return [after - before for before, after in itertools.pairwise(sigmas)]


def forward_kl(
  flow: jax.Array,
  x: jax.Array,
  sigma: float | jax.Array,
  sigma_next: float | jax.Array,
  answer: jax.Array,
  target: str,
) -> jax.Array:
  """mean || answer of the student - answer of the teacher ||^2 (eq. 10).

  Args:
    flow: the student's flow at (x, sigma), all frames at once.
    x: the trajectory's point.
    sigma: the student's level there.
    sigma_next: the student's next level.
    answer: from `forward_kl_pair`.
    target: as there; it decides in which space the two are compared.

  Source: HiAR (arXiv:2603.08703), eq. 10 for 'velocity'; the other targets are
  those of its public code.
  """
  flow = flow.astype(jnp.float32)
  if target == 'velocity':
    predicted = flow
  elif target == 'euler':
    predicted = noise_schedule.euler_step(x, flow, sigma, sigma_next)
  else:
    predicted = noise_schedule.flow_to_x0(x, flow, sigma)
  return jnp.mean(jnp.square(predicted - answer))


def regression(x0_hat: jax.Array, x0: jax.Array) -> jax.Array:
  """mean || x0_hat - x0 ||^2: the ODE regression of the student's start."""
  return jnp.mean(jnp.square(x0_hat.astype(jnp.float32) - x0))
