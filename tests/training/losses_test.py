"""Each loss against its equation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax import noise_schedule as ns
from hiar_jax.training import losses

RNG = np.random.default_rng(0)
X0, EPS, REAL, FAKE = (
  jnp.asarray(RNG.normal(size=(2, 3, 2, 4, 2)), jnp.float32) for _ in range(4)
)
# Levels of a straight trajectory from EPS to X0.
LEVELS = (1.0, 0.9, 0.6, 0.0)
LINE = jnp.stack([ns.add_noise(X0, EPS, sigma) for sigma in LEVELS])


def dmd(x0, fake, real, first=0):
  """Loss of the frames from one on, and the mean size of the direction."""
  direction = losses.reverse_kl_direction(x0, fake, real)
  loss = losses.reverse_kl_along(x0[:, first:], direction[:, first:])
  return loss, jnp.mean(jnp.abs(direction))


reverse_kl = jax.jit(
  jax.value_and_grad(dmd, has_aux=True), static_argnames='first'
)


def test_flow_matching_is_zero_at_the_truth_and_counts_every_number():
  assert losses.flow_matching(EPS - X0, X0, EPS) == 0
  off = losses.flow_matching(EPS - X0 + 2.0, X0, EPS)
  np.testing.assert_allclose(off, 4.0, rtol=1e-6)


def test_flow_matching_weighs_frames():
  weight = jnp.asarray([[1.0, 0.0, 0.0]])
  wrong_later = (EPS - X0).at[:, 1:].add(5.0)
  assert losses.flow_matching(wrong_later, X0, EPS, weight) == 0
  first = losses.flow_matching(EPS - X0 + 1.0, X0, EPS, weight)
  np.testing.assert_allclose(first, 1 / 3, rtol=1e-6)


def test_the_reverse_kl_has_the_gradient_of_its_equation():
  (_, size), gradient = reverse_kl(X0, FAKE, REAL)
  x0, fake, real = (np.asarray(x, np.float64) for x in (X0, FAKE, REAL))
  scale = np.abs(x0 - real).mean((1, 2, 3, 4), keepdims=True)
  direction = (fake - real) / scale
  np.testing.assert_allclose(gradient, direction / x0.size, atol=1e-7)
  np.testing.assert_allclose(size, np.abs(direction).mean(), rtol=1e-5)


def test_the_reverse_kl_reaches_neither_score():
  for argument in (1, 2):
    gradient = jax.grad(dmd, argument, has_aux=True)
    assert not np.any(gradient(X0, FAKE, REAL)[0])


def test_scores_that_agree_leave_the_student_alone():
  (loss, size), gradient = reverse_kl(X0, REAL, REAL)
  assert loss == size == 0
  assert not np.any(gradient)


def test_a_student_that_equals_the_teacher_gets_no_gradient():
  (loss, size), gradient = reverse_kl(REAL, FAKE, REAL)
  assert loss == size == 0
  assert not np.any(gradient)


def test_some_frames_keep_the_direction_and_share_the_loss():
  _, whole = reverse_kl(X0, FAKE, REAL)
  _, some = reverse_kl(X0, FAKE, REAL, first=1)
  assert not np.any(some[:, 0])
  np.testing.assert_allclose(some[:, 1:], 1.5 * whole[:, 1:], rtol=1e-5)


@pytest.mark.parametrize('target', losses.FORWARD_KL_TARGETS)
@pytest.mark.parametrize('step', [0, 1, 2])
def test_the_flow_of_a_straight_trajectory_has_no_forward_kl(target, step):
  x, sigma, answer = losses.forward_kl_pair(LINE, LEVELS, LEVELS, step, target)
  assert sigma == LEVELS[step]
  np.testing.assert_array_equal(x, LINE[step])
  loss = lambda flow: losses.forward_kl(
    flow, x, sigma, LEVELS[step + 1], answer, target
  )
  np.testing.assert_allclose(loss(EPS - X0), 0, atol=1e-10)
  assert loss(EPS - X0 + 1.0) > 1e-3


def test_targets_of_the_public_mixed_form_use_the_levels_they_are_given():
  student = (1.0, 0.8, 0.5, 0.0)
  chord = (LINE[2] - LINE[1]) / (0.6 - 0.9)
  for target, expected in (
    ('velocity', chord * (0.6 - 0.9) / (0.5 - 0.8)),
    ('chord_x0', LINE[1] - 0.9 * chord),
    ('final_x0', X0),
    ('euler', LINE[2]),
  ):
    _, sigma, answer = losses.forward_kl_pair(LINE, LEVELS, student, 1, target)
    assert sigma == 0.8
    np.testing.assert_allclose(answer, expected, atol=1e-5)


def test_regression_is_a_mean_of_squares():
  np.testing.assert_allclose(losses.regression(X0 + 3.0, X0), 9.0, rtol=1e-6)


def test_losses_of_bfloat16_flows_are_float32():
  half = (EPS - X0).astype(jnp.bfloat16)
  assert losses.flow_matching(half, X0, EPS).dtype == jnp.float32
  assert losses.regression(half, X0).dtype == jnp.float32
  loss = losses.forward_kl(half, LINE[0], 1.0, 0.9, X0, 'chord_x0')
  assert loss.dtype == jnp.float32


def test_an_unknown_target_is_refused_by_name():
  with pytest.raises(ValueError, match="'x0' is not one of"):
    losses.forward_kl_pair(LINE, LEVELS, LEVELS, 0, 'x0')


@pytest.mark.parametrize('step', [-1, 3])
def test_a_step_outside_of_the_trajectory_is_refused(step):
  with pytest.raises(ValueError, match=rf'step {step} is outside of 0..2'):
    losses.forward_kl_pair(LINE, LEVELS, LEVELS, step, 'velocity')
