"""The network's public edge names the shape that does not fit."""

import jax.numpy as jnp
import pytest

from tests import toy_network


def test_latents_without_a_batch_and_text_of_another_width_are_named():
  denoiser, params = toy_network.DENOISER, toy_network.params()
  size = denoiser.config
  text = denoiser.project_text(params, jnp.zeros((1, 3, size.text_dim)))
  with pytest.raises(AssertionError, match='rank'):
    denoiser.flow(params, jnp.zeros((3, 2, 4, 2)), 0.5, text)
  with pytest.raises(AssertionError, match=r'\(1, 3, 5\)'):
    denoiser.project_text(params, jnp.zeros((1, 3, 5)))
