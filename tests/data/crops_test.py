"""Clips that a codec is trained on: crops that show what they should."""

import numpy as np
import pytest

from hiar_jax.data import bouncing, crops

WORLD = bouncing.WorldConfig(num_frames=5)


def shape_pixels(frames, scene):
  distance = np.abs(frames.astype(int) - np.array(scene.background_rgb))
  return int((distance.sum(-1) > 30).sum())


def test_crops_have_the_object_and_follow_from_the_index():
  clips = bouncing.ObjectClips(WORLD, seed=3, crop=32)
  for index in range(20):
    element = clips[index]
    assert element['crop'].shape == (5, 32, 32, 3)
    scene = clips.scene(index)
    # A fifth of what a small shape covers in five frames.
    assert shape_pixels(element['crop'], scene) > 200
    np.testing.assert_array_equal(clips[index]['crop'], element['crop'])


def test_a_crop_larger_than_the_frame_is_refused():
  with pytest.raises(ValueError, match=r'crop=65 is not in \[1, 64\]'):
    bouncing.ObjectClips(WORLD, seed=3, crop=65)


def test_random_crops_are_cut_from_their_video_and_follow_from_the_index():
  scenes = bouncing.Scenes(WORLD, seed=3, length=8)
  clips = crops.RandomCrops(scenes, crop=63)
  assert len(clips) == 8
  assert clips.shape == (5, 64, 64, 3)
  corners = set()
  for index in range(8):
    element = clips[index]
    np.testing.assert_array_equal(element['video'], scenes[index])
    np.testing.assert_array_equal(clips[index]['crop'], element['crop'])
    corners |= {
      (top, left)
      for top in range(2)
      for left in range(2)
      if np.array_equal(
        element['video'][:, top : top + 63, left : left + 63], element['crop']
      )
    }
  # To the last row and column.
  assert corners == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_a_random_crop_larger_than_the_frame_is_refused():
  with pytest.raises(ValueError, match=r'clips.crop=65 is not in \[1, 64\]'):
    crops.RandomCrops(bouncing.Scenes(WORLD, seed=3), crop=65)
