"""Noise levels and the formulas that move a sample between them."""

import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax import noise_schedule as ns

RNG = np.random.default_rng(0)
X0, EPS = (
  jnp.asarray(RNG.normal(size=(2, 3, 2, 4, 2)), jnp.float32) for _ in range(2)
)


@pytest.mark.parametrize('shift', [0.5, 1.0, 5.0, 8.0])
def test_shifting_keeps_the_ends_and_the_order(shift):
  sigmas = ns.shift_sigmas(np.linspace(0, 1, 11), shift)
  assert sigmas[0] == 0.0
  assert sigmas[-1] == 1.0
  assert (np.diff(sigmas) > 0).all()


def test_a_shift_above_one_moves_levels_toward_noise():
  sigmas = np.linspace(0.1, 0.9, 9)
  assert (ns.shift_sigmas(sigmas, 5.0) > sigmas).all()
  np.testing.assert_array_equal(ns.shift_sigmas(sigmas, 1.0), sigmas)


def test_the_four_public_levels_come_from_the_fine_schedule():
  levels = ns.warped_levels((1000, 750, 500, 250), 5.0)
  np.testing.assert_allclose(levels, (1, 15 / 16, 5 / 6, 5 / 8, 0), rtol=1e-12)


def test_timesteps_of_training_follow_the_shift():
  assert ns.warp_timestep(0.5, 5.0) == pytest.approx(5 / 6)


def test_noise_and_its_removal_are_inverse_at_a_level_per_frame():
  sigma = jnp.asarray([[0.2, 0.5, 1.0], [0.9, 0.1, 0.7]])
  x = ns.add_noise(X0, EPS, sigma)
  np.testing.assert_allclose(ns.flow_to_x0(x, EPS - X0, sigma), X0, atol=1e-6)
  np.testing.assert_allclose(ns.x0_to_flow(x, X0, sigma), EPS - X0, atol=1e-5)


def test_no_noise_changes_nothing_and_full_noise_leaves_nothing():
  np.testing.assert_array_equal(ns.add_noise(X0, EPS, 0.0), X0)
  np.testing.assert_array_equal(ns.add_noise(X0, EPS, 1.0), EPS)


def test_an_euler_step_stays_on_the_straight_line():
  x = ns.add_noise(X0, EPS, 0.8)
  np.testing.assert_allclose(
    ns.euler_step(x, EPS - X0, 0.8, 0.3),
    ns.add_noise(X0, EPS, 0.3),
    atol=1e-6,
  )


def test_an_euler_step_to_zero_is_the_clean_estimate():
  np.testing.assert_allclose(
    ns.euler_step(X0, EPS, 0.6, 0.0), ns.flow_to_x0(X0, EPS, 0.6), atol=1e-6
  )


def test_bell_weights_have_mean_one_and_their_top_in_the_middle():
  sigmas = ns.sampling_sigmas(1000, 5.0)[:-1]
  weights = np.asarray(ns.bell_weight(jnp.asarray(sigmas), 5.0))
  assert weights.mean() == pytest.approx(1.0, abs=1e-5)
  assert weights.min() == pytest.approx(0.0, abs=1e-5)
  assert abs(sigmas[weights.argmax()] - 0.5) < 1e-3


@pytest.mark.parametrize('shift', [0.0, -1.0])
def test_a_shift_that_is_not_positive_is_refused(shift):
  with pytest.raises(ValueError, match=f'shift={shift} is not positive'):
    ns.shift_sigmas(0.5, shift)


def test_a_sampler_without_steps_is_refused():
  with pytest.raises(ValueError, match='num_steps=0'):
    ns.sampling_sigmas(0, 5.0)


@pytest.mark.parametrize(
  'indices', [(), (500, 750), (500, 500), (1001, 500), (500, 0)]
)
def test_step_indices_that_do_not_fall_within_the_schedule_are_refused(indices):
  with pytest.raises(ValueError, match=r'must fall strictly within \(1000'):
    ns.warped_levels(indices, 5.0)
