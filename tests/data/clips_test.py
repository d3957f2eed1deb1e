"""Clips of video files are what people see, at one rate and one size."""

import subprocess

import imageio_ffmpeg
import numpy as np
import pytest

from hiar_jax.data import clips
from hiar_jax.runtime import video_io

# Frame k is grey 20 + 5 k, so that it can be told by its brightness.
NUM, FPS = 33, 16


def write(path, num=NUM, fps=FPS, height=32, width=48, pixels=None):
  if pixels is None:
    grey = (20 + 5 * np.arange(num)).astype(np.uint8)[:, None, None, None]
    pixels = np.broadcast_to(grey, (num, height, width, 3))
  with video_io.VideoWriter(path, fps=fps, crf=0) as writer:
    writer.append(pixels)
  return path


def numbers(frames):
  """Which frame of `write` each of these is."""
  return np.rint((frames.mean((1, 2, 3)) - 20) / 5).astype(int).tolist()


def read(path, fps=FPS, num_frames=NUM, height=32, width=48):
  return clips.read(
    path, fps=fps, num_frames=num_frames, height=height, width=width
  )


def ffmpeg(*arguments):
  subprocess.run(
    [
      imageio_ffmpeg.get_ffmpeg_exe(),
      '-v',
      'error',
      '-y',
      *map(str, arguments),
    ],
    check=True,
  )


def test_pixels_are_those_of_another_decoder(tmp_path):
  rng = np.random.default_rng(0)
  coarse = rng.integers(0, 256, (9, 4, 6, 3), np.uint8)
  path = write(tmp_path / 'a.mp4', pixels=coarse.repeat(8, 1).repeat(8, 2))
  wanted, _ = video_io.read_video(path)
  found = read(path, num_frames=9)
  assert found.dtype == np.uint8 and found.shape == (9, 32, 48, 3)
  difference = np.abs(found.astype(int) - wanted)
  assert difference.mean() < 1 and difference.max() < 12, difference.max()


@pytest.mark.parametrize('suffix', ['.mp4', '.mkv', '.webm', '.mov'])
def test_the_same_rate_gives_every_frame_once(tmp_path, suffix):
  # Matroska counts milliseconds: 1 / 16 s is not a whole number of them.
  path = write(tmp_path / 'a.mp4')
  if suffix != '.mp4':
    options = ('-c:v', 'libvpx') if suffix == '.webm' else ('-c', 'copy')
    ffmpeg('-i', path, *options, tmp_path / f'b{suffix}')
    path = tmp_path / f'b{suffix}'
  assert numbers(read(path)) == list(range(NUM))


@pytest.mark.parametrize('fps, num', [(8, 16), (16, 33), (4, 9), (32, 65)])
def test_other_rates_take_the_nearest_frame(tmp_path, fps, num):
  found = numbers(read(write(tmp_path / 'a.mp4'), fps=fps, num_frames=num))
  wanted = np.arange(num) * 16 / fps
  assert np.abs(found - wanted).max() <= 0.5


def test_a_variable_rate_is_taken_by_the_time_stamps(tmp_path):
  path = write(tmp_path / 'a.mp4')
  # The second half at half the speed.
  slow = "setpts='if(lt(N,16),N,16+2*(N-16))/16/TB'"
  ffmpeg('-i', path, '-vf', slow, '-fps_mode', 'vfr', tmp_path / 'b.mp4')
  found = numbers(read(tmp_path / 'b.mp4', num_frames=41))
  wanted = [k if k < 16 else 16 + (k - 16) / 2 for k in range(41)]
  assert np.abs(np.subtract(found, wanted)).max() <= 0.5


@pytest.mark.parametrize('degrees', [90, 180, 270])
def test_a_turned_video_is_read_as_it_is_shown(tmp_path, degrees):
  rng = np.random.default_rng(1)
  coarse = rng.integers(0, 256, (5, 4, 6, 3), np.uint8)
  path = write(tmp_path / 'a.mp4', pixels=coarse.repeat(8, 1).repeat(8, 2))
  turned = tmp_path / 'b.mp4'
  ffmpeg('-display_rotation', degrees, '-i', path, '-c', 'copy', turned)
  wanted, _ = video_io.read_video(turned)
  height, width = wanted.shape[1:3]
  assert (height, width) == ((48, 32) if degrees % 180 else (32, 48))
  found = read(turned, num_frames=5, height=height, width=width)
  assert np.abs(found.astype(int) - wanted).mean() < 1


def test_the_middle_is_kept_at_the_wanted_size(tmp_path):
  # Columns from dark to bright, with borders that are to be cut off.
  row = np.concatenate([np.full(16, 255), np.linspace(0, 240, 64)])
  row = np.concatenate([row, np.full(16, 255)]).astype(np.uint8)
  pixels = np.broadcast_to(row[None, None, :, None], (5, 64, 96, 3))
  path = write(tmp_path / 'a.mp4', pixels=pixels)
  found = read(path, num_frames=5, height=16, width=16)
  wanted = np.linspace(0, 240, 64).reshape(16, 4).mean(1)
  assert np.abs(found[0, 8, 1:-1, 0] - wanted[1:-1]).max() < 6
  # And of a tall one, its middle rows.
  write(tmp_path / 'b.mp4', pixels=pixels.swapaxes(1, 2))
  found = read(tmp_path / 'b.mp4', num_frames=5, height=16, width=16)
  assert np.abs(found[0, 1:-1, 8, 0] - wanted[1:-1]).max() < 6


def test_pixels_that_are_not_square_are_made_so(tmp_path):
  wide = tmp_path / 'b.mp4'
  pixels = np.zeros((5, 32, 48, 3), np.uint8)
  pixels[:, :, 12:36] = 255  # Of a 32 x 96 frame the middle 32 x 48.
  path = write(tmp_path / 'c.mp4', pixels=pixels)
  ffmpeg('-i', path, '-vf', 'setsar=2/1', '-crf', 0, wide)
  assert read(wide, num_frames=5)[0, :, 4:-4].min() > 240
  whole = read(wide, num_frames=5, width=96)[0]
  assert whole[:, :20].max() < 15 and whole[:, 28:68].min() > 240


@pytest.mark.parametrize(
  'content, message',
  [
    (b'', 'cannot be decoded'),
    (b'x' * 5000, 'cannot be decoded'),
  ],
)
def test_what_is_no_video_is_named(tmp_path, content, message):
  path = tmp_path / 'a.mp4'
  path.write_bytes(content)
  with pytest.raises(ValueError, match=f'a.mp4 {message}'):
    read(path)


def test_a_cut_file_is_named(tmp_path):
  path = write(tmp_path / 'a.mp4', height=128, width=128)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  with pytest.raises(ValueError, match=r'a.mp4 (is too short|cannot be dec)'):
    read(path)


def test_a_file_with_sound_alone_is_named(tmp_path):
  path = tmp_path / 'a.mp4'
  ffmpeg('-f', 'lavfi', '-i', 'sine=duration=0.2', path)
  with pytest.raises(ValueError, match='a.mp4 has no video in it'):
    read(path)


def test_a_short_video_is_named_with_both_lengths(tmp_path):
  path = write(tmp_path / 'a.mp4')
  with pytest.raises(
    ValueError, match=r'has 2.06 s, and 34 frames at 16 a second are 2.12 s'
  ):
    read(path, num_frames=34)
  with pytest.raises(FileNotFoundError, match='no video at .*none.mp4'):
    read(tmp_path / 'none.mp4')
