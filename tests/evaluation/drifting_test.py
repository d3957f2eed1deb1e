"""Identity in the drifting world: each defect moves its own number."""

import dataclasses

import numpy as np
import pytest
import scipy.ndimage

from hiar_jax.data import drifting
from hiar_jax.evaluation import drifting as evaluation

_FRAMES = 60
_CFG = drifting.WorldConfig(num_frames=_FRAMES)
# What counts as moved; a true video is below all of these.
_MOVED = {
  'hue': 15.0,
  'gradient': 0.15,
  'texture': 0.2,  # Of 1 - texture.
  'size': 0.2,
  'speed': 0.4,
  'sharpness': 0.4,
  'saturation': 0.2,
}


def _scene(number=0, motion='circling'):
  scenes = (drifting.sample_scene(_CFG, 5, i) for i in range(100))
  return [s for s in scenes if s.motion == motion][number]


def _changing(scene, change):
  """Frame i drawn of the scene as `change(scene, i / F)` has it."""
  frames = []
  for i in range(_FRAMES):
    one = dataclasses.replace(scene, positions=scene.positions[i : i + 1])
    frames.append(drifting.render(change(one, i / _FRAMES), _CFG)[0])
  return np.stack(frames)


def _grey(video, share):
  grey = video.mean(-1, keepdims=True)
  return np.rint(grey + (1 - share) * (video - grey)).astype(np.uint8)


def _blurred(video):
  return np.stack(
    [
      scipy.ndimage.gaussian_filter(frame, (0.015 * i, 0.015 * i, 0))
      for i, frame in enumerate(video)
    ]
  )


def _slowing(scene):
  """Half as far in the second half, and a quarter in its last."""
  time = np.cumsum(np.linspace(1, 0.1, _FRAMES))
  positions = np.stack(
    [np.interp(time, np.arange(_FRAMES), p) for p in scene.positions.T], -1
  )
  return drifting.render(dataclasses.replace(scene, positions=positions), _CFG)


def _with(**changes):
  def change(scene, share):
    return dataclasses.replace(
      scene, **{name: f(scene, share) for name, f in changes.items()}
    )

  return change


def _defects():
  scene = _scene()
  true = drifting.render(scene, _CFG)
  hue = _with(hue=lambda s, t: s.hue + 0.4 * t)
  gradient = _with(
    ground_hues=lambda s, t: tuple(h + 0.3 * t for h in s.ground_hues)
  )
  texture = _with(texture_phase=lambda s, t: s.texture_phase + t)
  size = _with(radius=lambda s, t: s.radius * (1 - 0.3 * t))
  return {
    'none': (true, set()),
    'hue': (_changing(scene, hue), {'hue'}),
    'gradient': (_changing(scene, gradient), {'gradient'}),
    'texture': (_changing(scene, texture), {'texture'}),
    'size': (_changing(scene, size), {'size'}),
    'slowing': (_slowing(scene), {'speed'}),
    'greying': (
      np.stack([_grey(f, i / _FRAMES) for i, f in enumerate(true)]),
      {'saturation', 'gradient'},
    ),
    'blurring': (_blurred(true), {'sharpness'}),
  }


@pytest.mark.parametrize('given', [False, True])
@pytest.mark.parametrize('name', _defects())
def test_a_defect_moves_its_number_and_no_other(name, given):
  video, moved = _defects()[name]
  scene = _scene()
  measured = evaluation.identity(
    *(video, scene.caption, _CFG), parts=6, truth=scene if given else None
  )
  last = {name: measured.curves[name][-1] for name in evaluation.IDENTITY}
  last['texture'] = 1 - last['texture']
  assert {n for n, most in _MOVED.items() if last[n] > most} == moved, last
  assert measured.numbers['visible'] == 1


def test_a_shape_that_vanishes_is_not_visible():
  scene = _scene()
  video = drifting.render(scene, _CFG)
  empty = np.rint(255 * drifting.background(scene, _CFG)).astype(np.uint8)
  video[30:] = empty
  measured = evaluation.identity(video, scene.caption, _CFG, parts=6)
  np.testing.assert_array_equal(measured.curves['visible'], [1, 1, 1, 0, 0, 0])
  assert np.isnan(measured.curves['hue'][-1])
  assert measured.curves['texture'][-1] > 0.95


def test_another_shape_than_the_prompts_is_seen():
  scene = _scene()
  others = {*drifting.SHAPES} - {scene.shape}
  for other in others:
    video = drifting.render(dataclasses.replace(scene, shape=other), _CFG)
    measured = evaluation.identity(video, scene.caption, _CFG, parts=6)
    assert measured.numbers['shape_ok'] < 0.1


@pytest.mark.parametrize('motion', drifting.MOTIONS)
def test_the_kind_of_motion_is_told_from_the_other(motion):
  other = next(m for m in drifting.MOTIONS if m != motion)
  for number in range(4):
    scene = _scene(number, motion)
    video = drifting.render(scene, _CFG)
    for asked, right in ((motion, 1), (other, 0)):
      prompt = f'a {scene.shape} {asked}'
      measured = evaluation.identity(video, prompt, _CFG, parts=6)
      assert measured.numbers['motion_ok'] == right


def test_a_video_that_stands_still_does_not_move_as_asked():
  scene = _scene()
  still = drifting.render(scene, _CFG)[:1].repeat(_FRAMES, 0)
  measured = evaluation.identity(still, scene.caption, _CFG, parts=6)
  assert measured.numbers['motion'] == 0
  assert measured.numbers['motion_ok'] == 0


def test_the_scores_of_the_config_measure_their_own_truth():
  scores = evaluation.open_scores({'world': {'num_frames': 15}})
  prompts, videos = scores.prompts(3), scores.true_videos(3, 30)
  assert videos.shape == (3, 30, 24, 24, 3)
  numbers = scores.score(list(videos), prompts)
  assert numbers['visible'] == numbers['shape_ok'] == 1
  assert 'texture' in scores.table({'true': numbers})
  own, curves = scores.identity(videos[2], 2, parts=5, given=3)
  assert own['hue'] < 3 and own['texture'] > 0.95
  assert {len(curve) for curve in curves.values()} == {5}


def test_videos_that_cannot_be_measured_are_named():
  scores = evaluation.open_scores({'world': {}})
  with pytest.raises(ValueError, match='too short'):
    scores.identity(scores.true_videos(1, 6)[0], 0, parts=2, given=0)
  with pytest.raises(ValueError, match='uint8'):
    scores.score([np.zeros((20, 8, 8, 3), np.uint8)], ['a disc gliding'])
  with pytest.raises(ValueError, match='world'):
    evaluation.open_scores({})
