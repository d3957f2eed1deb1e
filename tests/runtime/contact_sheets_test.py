"""A sheet shows every video that it was given."""

import numpy as np
import pytest
from PIL import Image

from hiar_jax.runtime import contact_sheets


def _frames(num_frames=12, height=16, width=24):
  """A red square that moves right over blue."""
  video = np.zeros((num_frames, height, width, 3), np.uint8)
  video[..., 2] = 160
  for frame in range(num_frames):
    video[frame, 4:12, frame : frame + 8] = (220, 30, 20)
  return video


def test_contact_sheet_holds_every_video_in_rows(tmp_path):
  path = tmp_path / 'sheet.png'
  videos = [_frames(12), _frames(3)]
  contact_sheets.write(
    path, videos, captions=['a red square', 'a short one'], columns=6, scale=2
  )
  with Image.open(path) as sheet:
    pixels = np.asarray(sheet.convert('RGB'))
  assert pixels.shape[1] == 6 * (24 * 2 + 4) + 4
  blue = (pixels == (0, 0, 160)).all(-1).sum()
  expected = sum((video == (0, 0, 160)).all(-1).sum() for video in videos)
  assert blue == 4 * expected


def test_contact_sheet_needs_a_caption_for_each_video(tmp_path):
  with pytest.raises(ValueError, match='1 captions for 2 videos'):
    contact_sheets.write(
      tmp_path / 's.png', [_frames(), _frames()], captions=['one']
    )


def test_texts_are_kept_in_the_file(tmp_path):
  path = tmp_path / 'sheet.png'
  contact_sheets.write(path, _frames(), texts={'made': 'seed 3, "größer"'})
  with Image.open(path) as sheet:
    assert sheet.text['made'] == 'seed 3, "größer"'


def test_half_a_character_is_no_obstacle(tmp_path):
  path = tmp_path / 'sheet.png'
  contact_sheets.write(path, _frames(), captions='a red \udcc3 disc')
  with Image.open(path) as sheet:
    assert sheet.text['Description'] == 'a red ? disc'
