"""The model-free measures: each known defect moves its numbers, no others."""

import tracemalloc

import numpy as np
import pytest

from hiar_jax.evaluation import statistics
from tests.evaluation import made_videos

# From here on a number has moved: motion as a share of a good video's, the
# others as they are.
_MOVED = {
  'motion': 0.15,
  'motion_drift': 0.5,
  'jump': 0.03,
  'saturation': 0.05,
  'sharpness': 0.07,
  'contrast': 0.04,
  'colour': 0.05,
  'similarity': 0.06,
  'difference': 0.06,
}
_MOVES = {
  'perfect': set(),
  'frozen': {'motion'},
  # Frames of what comes to rest grow alike.
  'slowing': {'motion', 'motion_drift', 'similarity', 'difference'},
  'turning_hue': {'colour'},
  'greying': {'saturation', 'colour'},
  'blurring': {'sharpness'},
  # A Laplacian fades with the contrast, and so does any difference.
  'fading': {'contrast', 'sharpness', 'difference'},
  # The texture that stays changes more, for its contrast, than the disc did.
  'vanishing': {'contrast', 'similarity'},
  'teleporting': {'jump'},
}


@pytest.fixture(scope='module')
def good():
  return statistics.summarise(statistics.measure(made_videos.perfect()))


@pytest.mark.parametrize('defect', _MOVES)
def test_a_defect_moves_its_numbers_and_no_others(defect, good):
  video = getattr(made_videos, defect)()
  seen = statistics.summarise(statistics.measure(video))
  numbers = {
    'motion': seen.motion / good.motion - 1,
    'motion_drift': seen.motion_drift,
    'jump': seen.jump,
  } | seen.drift_parts
  moved = {name for name, x in numbers.items() if abs(x) > _MOVED[name]}
  assert moved == _MOVES[defect], numbers
  drifts = moved & set(statistics.DRIFT_WEIGHTS)
  for score in (seen.drift, seen.drift_ends, seen.drift_first):
    assert (score > 0.06) == bool(drifts)
  assert seen.drift == pytest.approx(sum(seen.drift_parts.values()))


def test_drift_grows_evenly_with_what_drifts(good):
  scores = []
  for turns in (1 / 16, 1 / 8):
    video = made_videos.turning_hue(turns)[::4]
    scores.append(statistics.summarise(statistics.measure(video)).drift)
  assert good.drift < 0.01
  assert scores[1] == pytest.approx(2 * scores[0], rel=0.15)


def test_numbers_of_a_frame_are_those_of_their_definitions():
  red = np.zeros((16, 16, 3), np.uint8)
  red[:, :8] = (200, 100, 100)  # Half of it, saturation .5; the rest black.
  seen = statistics.measure([red] * 10)
  luma = 0.299 * 200 + 0.701 * 100
  assert seen.num_frames == 10
  assert (seen.height, seen.width) == (16, 16)
  np.testing.assert_allclose(seen.saturation, 0.25)
  np.testing.assert_allclose(seen.contrast, luma / 2 / 255, rtol=1e-5)
  # 14 columns inside, two of them at the edge, with +luma and -luma.
  np.testing.assert_allclose(seen.sharpness, luma**2 / 7, rtol=1e-5)
  red_difference = (200 - luma) / 2 / 255 / 1.402
  np.testing.assert_allclose(seen.colour[0, 2], red_difference, rtol=1e-5)
  np.testing.assert_allclose(seen.colour[0, 0], luma / 2 / 255, rtol=1e-5)
  np.testing.assert_allclose(seen.similarity, 1)
  assert not seen.difference.any()
  assert not seen.motion.any()


def test_difference_and_similarity_of_two_frames():
  dark, bright = (np.full((16, 16, 3), v, np.uint8) for v in (10, 61))
  seen = statistics.measure([dark, bright] * 5)
  np.testing.assert_allclose(seen.difference, 0.2)
  np.testing.assert_allclose(seen.similarity, 1)  # Neither has contrast.
  wave = np.zeros((16, 16, 3), np.uint8)
  wave[:, ::2] = 255
  seen = statistics.measure([wave, 255 - wave] * 5)
  np.testing.assert_allclose(seen.similarity, -1, atol=0.01)


def test_a_video_without_colour_contrast_or_motion_has_finite_numbers():
  for level in (0, 255):
    video = np.full((10, 16, 16, 3), level, np.uint8)
    seen = statistics.summarise(statistics.measure(video))
    assert (seen.motion, seen.motion_drift) == (0, 0)
    assert seen.drift == pytest.approx(0, abs=1e-9)
    assert seen.similarity == 1


def test_motion_is_a_share_of_the_side_whatever_the_size():
  twice = made_videos.perfect()[:10].repeat(2, axis=1).repeat(2, axis=2)
  eightfold = twice.repeat(4, axis=1).repeat(4, axis=2)
  seen = [
    statistics.measure(video).motion.mean() for video in (twice, eightfold)
  ]
  assert seen[0] > 1
  assert seen[1] == pytest.approx(seen[0], rel=1e-3)


def test_memory_does_not_grow_with_the_length():
  frame = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
  peaks = []
  for count in (10, 20):
    tracemalloc.start()
    statistics.measure(np.roll(frame, n // 9, axis=1) for n in range(count))
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
  assert peaks[1] < peaks[0] + frame.nbytes


def test_segments_are_fifths():
  video = made_videos.perfect()[:50].copy()
  video[40:] = 0
  segments = statistics.measure(video).by_segment()
  assert segments['contrast'].shape == (5,)
  assert segments['colour'].shape == (5, 3)
  assert segments['contrast'][3] > 0.05
  assert segments['contrast'][4] == 0


@pytest.mark.parametrize(
  ('video', 'message'),
  [
    (np.zeros((9, 32, 32, 3), np.uint8), '9 frames; at least 10'),
    (np.zeros((1, 32, 32, 3), np.uint8), '1 frame; at least 10'),
    (np.zeros((20, 32, 32, 3)), 'frame 0 must be uint8 .* not float64'),
    (
      np.zeros((20, 32, 32), np.uint8),
      r'frame 0 must be .* not uint8 \[32, 32',
    ),
    (np.zeros((20, 8, 32, 3), np.uint8), '8x32 px are too small'),
    (
      [np.zeros((s, 32, 3), np.uint8) for s in (32, 32, 48)],
      'frame 2 is 48x32 px, those before it are 32x32',
    ),
  ],
)
def test_what_cannot_be_measured_is_refused(video, message):
  with pytest.raises(ValueError, match=message):
    statistics.measure(video)
