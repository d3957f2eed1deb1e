"""Displacements: of textures, shapes and edges, and of what does not move."""

import numpy as np
import pytest
import scipy.ndimage

from hiar_jax.data import bouncing
from hiar_jax.evaluation import motion

RNG = np.random.default_rng(0)
# Smooth, so that it can be shifted by parts of a pixel.
TEXTURE = scipy.ndimage.gaussian_filter(RNG.normal(size=(96, 96)), 2.0)
TEXTURE = (128 + 30 * TEXTURE / TEXTURE.std()).astype(np.float32)


def shifted(dy, dx):
  return scipy.ndimage.shift(TEXTURE, (dy, dx), order=3, mode='nearest')


@pytest.mark.parametrize(
  'shift', [(0, 0.3), (0.4, -0.6), (1, 0), (-2.5, 1.2), (3.7, 3.7), (0, -6.4)]
)
def test_a_shifted_texture_moves_by_the_shift_in_the_middle(shift):
  lengths = motion.displacements(TEXTURE, shifted(*shift)).reshape(12, 12)
  inner = lengths[1:-1, 1:-1]
  assert np.median(inner) == pytest.approx(np.hypot(*shift), rel=0.1)
  assert np.mean(np.abs(inner - np.hypot(*shift)) < 0.5) > 0.8


@pytest.mark.parametrize('speed', [0.3, 1.0, 2.5])
def test_a_disc_moves_as_fast_as_it_does(speed):
  cover = bouncing.coverage(
    'disc', np.array([[32, 30], [32, 30 + speed]]), 12.0, height=64, width=64
  )
  before, after = (200 * cover + 20).astype(np.float32)
  most = np.sort(motion.displacements(before, after))[-8:]
  assert np.median(most) == pytest.approx(speed, rel=0.3)


def test_an_edge_moves_across_and_not_along_itself():
  y, x = np.mgrid[:64, :64]
  before, after = (
    200 / (1 + np.exp(-((x - y) / 2**0.5 - shift))) for shift in (0, 2)
  )
  lengths = motion.displacements(before, after)
  assert np.median(lengths[lengths > 0]) == pytest.approx(2, abs=0.3)


def test_what_does_not_change_or_only_in_noise_is_still():
  noise = RNG.uniform(-2, 2, TEXTURE.shape).astype(np.float32)
  for after in (TEXTURE, TEXTURE + noise):
    assert not motion.displacements(TEXTURE, after).any()


def test_what_vanishes_or_flickers_does_not_move():
  cover = bouncing.coverage(
    'disc', np.array([[32, 30]]), 12.0, height=64, width=64
  )
  there = 100 * cover[0] + 100
  gone = np.full((64, 64), 100.0)
  assert not motion.displacements(there, gone).any()
  assert not motion.displacements(TEXTURE, TEXTURE + 40).any()


def test_sides_need_not_be_multiples_of_a_block():
  lengths = motion.displacements(TEXTURE[:61, :43], shifted(0, 1)[:61, :43])
  assert lengths.shape == (7 * 5,)
  assert np.median(lengths) == pytest.approx(1, abs=0.1)


def test_a_frame_without_a_block_is_refused():
  with pytest.raises(ValueError, match='7x90 have no block of 8x8'):
    motion.displacements(np.zeros((7, 90)), np.zeros((7, 90)))
