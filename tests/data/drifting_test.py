"""The drifting world: exact truth, and captions that leave it open."""

import dataclasses

import numpy as np
import pytest

from hiar_jax.data import drifting

_CFG = drifting.WorldConfig()


def _scenes(count, **sizes):
  cfg = dataclasses.replace(_CFG, **sizes)
  return [drifting.sample_scene(cfg, 3, index) for index in range(count)]


def test_a_scene_is_the_same_whenever_it_is_drawn():
  first, again = _scenes(4)[3], drifting.sample_scene(_CFG, 3, 3)
  np.testing.assert_array_equal(
    drifting.render(first, _CFG), drifting.render(again, _CFG)
  )
  other = drifting.sample_scene(_CFG, 4, 3)
  assert other.hue != first.hue


def test_a_longer_video_begins_with_the_shorter_one():
  for short, long in zip(_scenes(6), _scenes(6, num_frames=40), strict=True):
    np.testing.assert_array_equal(short.positions, long.positions[:15])


def test_captions_name_shape_and_motion_and_nothing_else():
  scenes = _scenes(200)
  assert {s.caption for s in scenes} == {
    f'a {shape} {motion}'
    for shape in drifting.SHAPES
    for motion in drifting.MOTIONS
  }
  for scene in scenes:
    assert drifting.parse_prompt(scene.caption) == (scene.shape, scene.motion)


def test_no_colour_is_cut_off_at_the_ends_of_the_range():
  for scene in _scenes(300):
    for colours in (
      drifting.object_rgb(scene),
      drifting.background(scene, _CFG),
    ):
      assert colours.min() > 0 and colours.max() < 1


def test_hues_come_from_the_whole_circle():
  hues = np.array([(s.hue, *s.ground_hues) for s in _scenes(400)])
  for column in hues.T:
    counts, _ = np.histogram(column, 8, (0, 1))
    assert counts.min() > 25


def test_a_shape_stays_inside_the_frame_and_keeps_its_speed():
  for scene in _scenes(60, num_frames=60):
    assert scene.positions.min() >= scene.radius - 1e-9
    assert scene.positions.max() <= 24 - scene.radius + 1e-9
    steps = np.linalg.norm(np.diff(scene.positions, axis=0), axis=-1)
    assert np.median(steps) == pytest.approx(scene.speed, rel=0.03)


def test_a_circling_shape_keeps_its_distance_from_a_point():
  scene = next(s for s in _scenes(20, num_frames=200) if s.motion == 'circling')
  low, high = scene.positions.min(0), scene.positions.max(0)
  distance = np.linalg.norm(scene.positions - (low + high) / 2, axis=-1)
  assert distance.std() < 0.05 * distance.mean()


def test_the_ground_has_the_scenes_two_hues_at_its_ends():
  for scene in _scenes(10):
    chroma = drifting.gradient(scene, _CFG).reshape(-1, 2)
    for hue in scene.ground_hues:
      wanted = drifting.GROUND_CHROMA * drifting.chroma_of_hue(hue)
      assert np.linalg.norm(chroma - wanted, axis=-1).min() < 1e-9


def test_what_no_frame_has_room_for_is_refused():
  with pytest.raises(ValueError, match='24x20 frame'):
    drifting.WorldConfig(height=24, width=20)
  with pytest.raises(ValueError, match='period'):
    drifting.WorldConfig(period=(9.0, 6.0))
  with pytest.raises(ValueError, match='num_frames=0'):
    drifting.WorldConfig(num_frames=0)
  with pytest.raises(ValueError, match='edge=0.5'):
    drifting.WorldConfig(edge=0.5)
  with pytest.raises(ValueError, match='ring'):
    drifting.WorldConfig(shapes=('disc', 'ring'))


def test_a_world_of_fewer_and_softer_shapes_has_only_those():
  scenes = _scenes(40, edge=3.0, shapes=('disc', 'triangle'))
  assert {s.shape for s in scenes} == {'disc', 'triangle'}
  covers = [
    drifting.coverage(
      'disc', scenes[0].positions, 5.0, height=24, width=24, edge=edge
    )
    for edge in (1.0, 3.0)
  ]
  assert covers[0].sum() == pytest.approx(covers[1].sum(), rel=0.02)
  partly = [((c > 0.05) & (c < 0.95)).sum() for c in covers]
  assert partly[1] > 2 * partly[0]


def test_a_prompt_of_other_words_is_told_of():
  assert not drifting.unknown_words('a ball circling')
  lines = drifting.unknown_words('a dog running')
  assert len(lines) == 2
  assert 'disc, square, triangle' in lines[0]
