"""Files that play: what goes in comes out, and nothing is lost on the way."""

import contextlib
import os
import pathlib
import subprocess
import sys

import av
import imageio_ffmpeg
import numpy as np
import pytest

from hiar_jax.runtime import video_io


def _frames(num_frames=12, height=16, width=24):
  """A red square that moves right over blue."""
  video = np.zeros((num_frames, height, width, 3), np.uint8)
  video[..., 2] = 160
  for frame in range(num_frames):
    video[frame, 4:12, frame : frame + 8] = (220, 30, 20)
  return video


def test_a_written_video_reads_back_with_its_colours_and_rate(tmp_path):
  path = tmp_path / 'video.mp4'
  frames = _frames()
  with video_io.VideoWriter(path, fps=12, scale=4) as writer:
    writer.append(frames[:5])
    writer.append(frames[5:])
  read, fps = video_io.read_video(path)
  assert fps == 12
  assert writer.num_frames == 12
  assert read.shape == (12, 64, 96, 3)
  # Pixel centres; H.264 at this quality is a few grey levels off.
  error = np.abs(read[:, 2::4, 2::4].astype(int) - frames)
  assert error.mean() < 4


def test_odd_sizes_become_even(tmp_path):
  path = tmp_path / 'odd.mp4'
  video_io.write_video(path, _frames(height=15, width=23), fps=24)
  read, _ = video_io.read_video(path)
  assert read.shape == (12, 16, 24, 3)


def test_header_comes_before_the_pixels_and_pixels_are_420(tmp_path):
  path = tmp_path / 'video.mp4'
  video_io.write_video(path, _frames(), fps=8)
  data = path.read_bytes()
  assert data.index(b'moov') < data.index(b'mdat')
  assert b'avc1' in data
  assert b'nclx\x00\x01\x00\x01\x00\x01' in data  # bt709 three times.


def test_a_failed_run_leaves_the_earlier_file_alone(tmp_path):
  path = tmp_path / 'video.mp4'
  path.write_bytes(b'precious')
  with (
    pytest.raises(RuntimeError, match='killed'),
    video_io.VideoWriter(path, fps=8) as writer,
  ):
    writer.append(_frames())
    raise RuntimeError('killed')
  assert path.read_bytes() == b'precious'
  assert os.listdir(tmp_path) == ['video.mp4']


def test_a_video_that_keeps_has_its_frames_after_an_error(tmp_path):
  path = tmp_path / 'video.mp4'
  writer = video_io.VideoWriter(path, fps=8, keeps=True)
  with pytest.raises(RuntimeError, match='no memory'), writer:
    writer.append(_frames())
    raise RuntimeError('no memory')
  assert writer.kept and os.listdir(tmp_path) == ['video.mp4']
  frames, fps = video_io.read_video(path)
  assert len(frames) == 12 and fps == 8


def test_a_video_that_keeps_is_closed_as_any_other(tmp_path):
  for name, keeps in (('plain.mp4', False), ('keeps.mp4', True)):
    with video_io.VideoWriter(tmp_path / name, fps=12, keeps=keeps) as writer:
      for _ in range(5):
        writer.append(_frames())
  plain, kept = (
    video_io.read_video(tmp_path / name) for name in ('plain.mp4', 'keeps.mp4')
  )
  np.testing.assert_array_equal(plain[0], kept[0])
  assert plain[1] == kept[1] == 12
  data = (tmp_path / 'keeps.mp4').read_bytes()
  assert b'moof' not in data and data.index(b'moov') < data.index(b'mdat')
  assert sorted(os.listdir(tmp_path)) == ['keeps.mp4', 'plain.mp4']


_FULL = """
import resource, sys
import numpy as np
from hiar_jax.runtime import video_io
limit = 300_000  # Bytes of a file, as a disk that is full.
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
rng = np.random.default_rng(0)
writer = video_io.VideoWriter(sys.argv[1], fps=8, keeps=True)
try:
  with writer:
    for _ in range(60):
      writer.append(rng.integers(0, 255, (8, 32, 32, 3), np.uint8))
except OSError as error:
  print(error)
print(writer.kept, writer.num_frames)
"""


def test_a_full_disk_leaves_what_was_written_playable(tmp_path):
  path = tmp_path / 'video.mp4'
  done = subprocess.run(
    [sys.executable, '-c', _FULL, path],
    capture_output=True,
    text=True,
    check=True,
  )
  message, told = done.stdout.splitlines()
  assert message.startswith(f'ffmpeg could not write {path}')
  kept, num_frames = told.split()
  assert kept == 'True' and os.listdir(tmp_path) == ['video.mp4']
  with av.open(path) as video:
    played = 0
    with contextlib.suppress(av.error.InvalidDataError):  # Its end is cut.
      for _ in video.decode(video=0):
        played += 1
  assert 8 < played < int(num_frames)


def test_a_video_without_frames_is_refused(tmp_path):
  with (
    pytest.raises(ValueError, match='no frames were written'),
    video_io.VideoWriter(tmp_path / 'video.mp4', fps=8),
  ):
    pass
  assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
  ('frames', 'message'),
  [
    (np.zeros((2, 8, 8, 3)), 'not float64'),
    (np.zeros((8, 8, 3), np.uint8), r'not uint8 \[8, 8, 3\]'),
    (np.zeros((2, 8, 10, 3), np.uint8), r'frames are \(8, 10\)'),
  ],
)
def test_frames_of_another_kind_are_refused(tmp_path, frames, message):
  writer = video_io.VideoWriter(tmp_path / 'video.mp4', fps=8)
  writer.append(np.zeros((2, 8, 8, 3), np.uint8))
  with pytest.raises(ValueError, match=message):
    writer.append(frames)
  writer.discard()
  assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
  ('argument', 'message'),
  [
    ({'fps': 0}, 'fps=0 is not positive'),
    ({'fps': float('inf')}, 'fps=inf is not positive and finite'),
    ({'fps': 1e-9}, 'fps=1e-09 is not between 0.001 and 1000'),
    ({'fps': 1e9}, 'fps=1000000000.0 is not between'),
    ({'scale': 0}, 'scale=0 is not'),
    ({'resampling': 'cubic'}, "'cubic' is not one of"),
  ],
)
def test_arguments_out_of_range_are_named(tmp_path, argument, message):
  with pytest.raises(ValueError, match=message):
    video_io.VideoWriter(tmp_path / 'video.mp4', **{'fps': 8, **argument})


def test_sizes_that_h264_does_not_have_are_refused():
  video_io.check_size(480, 832, 4)
  with pytest.raises(ValueError, match='scale=300 makes frames of 19200x19200'):
    video_io.check_size(64, 64, 300)
  with pytest.raises(ValueError, match='16x16896, larger'):
    video_io.check_size(8, 8448, 2)


@pytest.mark.parametrize('content', [None, '#!/bin/sh\nexit 1\n', 'text'])
def test_an_ffmpeg_that_does_not_run_is_named_before_the_work(
  tmp_path, monkeypatch, content
):
  ffmpeg = tmp_path / 'ffmpeg'
  if content is not None:
    ffmpeg.write_text(content)
    ffmpeg.chmod(0o755 if content.startswith('#!') else 0o644)
  monkeypatch.setenv('IMAGEIO_FFMPEG_EXE', str(ffmpeg))
  with pytest.raises(OSError, match=f'IMAGEIO_FFMPEG_EXE={ffmpeg} is no ffmpe'):
    video_io.VideoWriter(tmp_path / 'video.mp4', fps=8)


def test_no_ffmpeg_at_all_is_named_before_the_work(tmp_path, monkeypatch):
  def missing():
    raise RuntimeError('No ffmpeg exe could be found.')

  monkeypatch.setattr(imageio_ffmpeg, 'get_ffmpeg_exe', missing)
  with pytest.raises(OSError, match='there is no ffmpeg to write videos with'):
    video_io.VideoWriter(tmp_path / 'video.mp4', fps=8)


def test_an_unwritable_place_is_named_before_the_work(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(FileNotFoundError, match='no folder .*missing'):
    video_io.check_writable(tmp_path / 'missing' / 'video.mp4')
  with pytest.raises(NotADirectoryError, match='file is not a folder'):
    video_io.check_writable(tmp_path / 'file' / 'video.mp4')
  with pytest.raises(IsADirectoryError, match='it is a folder'):
    video_io.check_writable(tmp_path)
  with pytest.raises(OSError, match='its name has 251 bytes, 200 are the most'):
    video_io.check_writable(tmp_path / ('x' * 247 + '.mp4'))
  with pytest.raises(ValueError, match=r'does not end in \.mp4'):
    video_io.VideoWriter(tmp_path / 'video.avi', fps=8)
  assert os.listdir(tmp_path) == ['file']


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='needs /proc')
def test_a_read_only_place_is_named_before_the_work():
  with pytest.raises(PermissionError, match='cannot write /proc/self/v'):
    video_io.check_writable('/proc/self/video.mp4')


def test_what_is_no_video_is_named(tmp_path):
  path = tmp_path / 'text.mp4'
  path.write_text('not a video')
  with pytest.raises(ValueError, match='has no video'):
    video_io.read_video(path)
  with pytest.raises(FileNotFoundError, match='no video at'):
    video_io.read_video(tmp_path / 'missing.mp4')


def test_a_video_that_was_turned_is_read_as_it_is_shown(tmp_path):
  upright, turned = tmp_path / 'upright.mp4', tmp_path / 'turned.mp4'
  video_io.write_video(upright, _frames(height=32, width=64), fps=8)
  subprocess.run(
    [
      *(imageio_ffmpeg.get_ffmpeg_exe(), '-v', 'error'),
      *('-display_rotation', '90', '-i', upright, '-c', 'copy', turned),
    ],
    check=True,
  )
  frames, _ = video_io.read_video(turned)
  assert frames.shape == (12, 64, 32, 3)


def test_a_full_disk_is_told_with_ffmpegs_words(tmp_path, monkeypatch):
  writer = video_io.VideoWriter(tmp_path / 'video.mp4', fps=8)
  monkeypatch.setattr(writer, '_partial', pathlib.Path('/dev/full'))
  writer.append(_frames())
  with (
    pytest.raises(OSError, match='could not write .* No space left on device'),
    monkeypatch.context() as patch,
  ):
    patch.setattr(pathlib.Path, 'unlink', lambda *unused, **more: None)
    writer.close()


def test_a_cut_video_is_named(tmp_path):
  path = tmp_path / 'video.mp4'
  video_io.write_video(path, _frames(), fps=8)
  path.write_bytes(path.read_bytes()[:900])
  with pytest.raises(ValueError, match=r'video\.mp4'):
    video_io.read_video(path)


def test_html_carries_the_video_and_escapes_the_caption():
  html = video_io.to_html(_frames(3), fps=8, scale=1, caption='a < b')
  assert 'data:video/mp4;base64,' in html
  assert 'a &lt; b' in html
