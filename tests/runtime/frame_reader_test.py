"""Reading anyone's videos frame by frame, and naming what is wrong with one."""

import subprocess
import tracemalloc

import imageio_ffmpeg
import numpy as np
import pytest

from hiar_jax.evaluation import statistics
from hiar_jax.runtime import frame_reader, video_io


def ffmpeg(*arguments):
  subprocess.run(
    [imageio_ffmpeg.get_ffmpeg_exe(), '-nostdin', '-v', 'error', *arguments],
    check=True,
  )


@pytest.fixture(scope='module')
def video(tmp_path_factory):
  """A path and its frames: 40, each of another grey, 48x64."""
  path = tmp_path_factory.mktemp('videos') / 'a.mp4'
  frames = np.zeros((40, 48, 64, 3), np.uint8)
  # Noise, so that the file has bytes to lose.
  frames[:] = np.random.default_rng(0).integers(0, 40, (40, 48, 64, 1))
  frames += (5 * np.arange(40, dtype=np.uint8))[:, None, None, None]
  video_io.write_video(path, frames, fps=16)
  return path, frames


def test_frames_come_one_by_one_and_are_those_of_read_video(video):
  path, frames = video
  with frame_reader.FrameReader(path) as reader:
    assert reader.fps == 16
    read = list(reader)
    assert reader.num_read == 40
    again = next(iter(reader))
  np.testing.assert_array_equal(read, video_io.read_video(path)[0])
  np.testing.assert_array_equal(again, read[0])
  assert np.abs(np.subtract(read, frames, dtype=float)).mean() < 3


def test_reading_a_part_leaves_no_process(video):
  with frame_reader.FrameReader(video[0]) as reader:
    frames = iter(reader)
    next(frames)
    process = reader._process
    assert process.poll() is None
  assert process.poll() is not None


@pytest.mark.parametrize('kept', [0.9, 0.5])
def test_a_truncated_video_is_named(video, tmp_path, kept):
  data = video[0].read_bytes()
  path = tmp_path / 'cut.mp4'
  path.write_bytes(data[: int(kept * len(data))])
  with (
    frame_reader.FrameReader(path) as reader,
    pytest.raises(ValueError, match=r'cut\.mp4 is truncated or damaged: \d+'),
  ):
    list(reader)
  assert 0 < reader.num_read < 40


def test_a_damaged_video_is_named(video, tmp_path):
  data = bytearray(video[0].read_bytes())
  middle = len(data) // 2
  data[middle : middle + 2000] = bytes(2000)
  path = tmp_path / 'bad.mp4'
  path.write_bytes(data)
  with (
    frame_reader.FrameReader(path) as reader,
    pytest.raises(ValueError, match=r'bad\.mp4 is truncated or damaged'),
  ):
    list(reader)


@pytest.mark.parametrize(
  ('data', 'message'),
  [
    (b'', 'x.mp4 is empty'),
    (b'no video at all', 'x.mp4 has no video that ffmpeg can read'),
  ],
)
def test_what_is_no_video_is_named(tmp_path, data, message):
  path = tmp_path / 'x.mp4'
  path.write_bytes(data)
  with pytest.raises(ValueError, match=message):
    frame_reader.FrameReader(path)


def test_a_file_cut_before_its_header_is_named(tmp_path):
  whole, path = tmp_path / 'whole.mp4', tmp_path / 'head.mp4'
  # Without faststart the header comes last.
  ffmpeg('-f', 'lavfi', '-i', 'testsrc=s=64x64:d=2', str(whole))
  path.write_bytes(whole.read_bytes()[:3000])
  with pytest.raises(ValueError, match='head.mp4 is truncated: its header'):
    frame_reader.FrameReader(path)


def test_a_file_of_sound_alone_and_a_missing_one_are_named(tmp_path):
  path = tmp_path / 'sound.mp4'
  ffmpeg('-f', 'lavfi', '-i', 'sine=d=1', str(path))
  with pytest.raises(ValueError, match='sound.mp4 has sound but no video'):
    frame_reader.FrameReader(path)
  with pytest.raises(FileNotFoundError, match=r'no video at .*none\.mp4'):
    frame_reader.FrameReader(tmp_path / 'none.mp4')


def test_sound_longer_than_the_picture_is_no_damage(tmp_path):
  path = tmp_path / 'long_sound.mp4'
  ffmpeg(
    *('-f', 'lavfi', '-i', 'testsrc=s=64x64:d=1:r=20'),
    *('-f', 'lavfi', '-i', 'sine=d=3', str(path)),
  )
  with frame_reader.FrameReader(path) as reader:
    assert len(list(reader)) == 20


def test_frames_of_uneven_pace_come_once_each(tmp_path):
  path = tmp_path / 'uneven.mkv'
  ffmpeg(
    *('-f', 'lavfi', '-i', 'testsrc=s=64x64:d=2:r=20'),
    *('-vf', "select='not(between(n,10,29))'", '-fps_mode', 'vfr', str(path)),
  )
  with frame_reader.FrameReader(path) as reader:
    assert len(list(reader)) == 20


def test_a_turned_video_is_read_as_it_is_shown(tmp_path):
  flat, path = tmp_path / 'flat.mp4', tmp_path / 'turned.mp4'
  ffmpeg('-f', 'lavfi', '-i', 'testsrc=s=64x48:d=1', str(flat))
  ffmpeg(
    *('-display_rotation', '90', '-i', str(flat), '-c', 'copy', str(path)),
  )
  with frame_reader.FrameReader(path) as reader:
    assert next(iter(reader)).shape == (64, 48, 3)


@pytest.mark.slow
def test_4k_is_measured_in_the_memory_of_few_frames(tmp_path):
  path = tmp_path / '4k.mp4'
  ffmpeg(
    *('-f', 'lavfi', '-i', 'testsrc2=s=3840x2160:d=0.4:r=25'),
    *('-preset', 'ultrafast', str(path)),
  )
  tracemalloc.start()
  with frame_reader.FrameReader(path) as reader:
    seen = statistics.measure(reader)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert (seen.height, seen.width, seen.num_frames) == (2160, 3840, 10)
  assert peak < 400e6
