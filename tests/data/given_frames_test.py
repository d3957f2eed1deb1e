"""The picture or video to go on from, read as people see it."""

import fractions
import subprocess
import zlib

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from hiar_jax.data import given_frames

av = pytest.importorskip('av')

RED, GREEN = (255, 0, 0), (0, 255, 0)


def read(path, height=16, width=32, fps=8.0, last=None):
  return given_frames.read(path, height, width, fps=fps, last=last)


def ramp(count, height=16, width=32):
  """Frame i is grey, 5 i bright; its left half red."""
  frames = np.zeros((count, height, width, 3), np.uint8)
  frames[:] = (5 * np.arange(count) % 250)[:, None, None, None]
  frames[:, :, : width // 2, 0] = 250
  return frames


def write_video(path, frames, times):
  """A lossless video with frames at given seconds."""
  with av.open(str(path), 'w', format='mp4') as container:
    stream = container.add_stream('libx264rgb', rate=30)
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = 'rgb24'
    stream.options = {'crf': '0', 'g': '8', 'bf': '0'}
    base = fractions.Fraction(1, 1000)
    stream.codec_context.time_base = base
    for frame, time in zip(frames, times):
      picture = av.VideoFrame.from_ndarray(frame, format='rgb24')
      picture.time_base, picture.pts = base, round(time * 1000)
      for packet in stream.encode(picture):
        container.mux(packet)
    for packet in stream.encode():
      container.mux(packet)


def brightness(frames):
  """Number of each frame in `ramp`."""
  return np.round(frames[:, 2:-2, -4:, 1].mean((1, 2)) / 5).astype(int).tolist()


def test_exif_orientation_is_obeyed(tmp_path):
  pixels = np.zeros((32, 16, 3), np.uint8)
  pixels[16:, :] = RED
  exif = Image.Exif()
  exif[0x0112] = 6  # To be turned by a quarter, to the right.
  Image.fromarray(pixels).save(tmp_path / 'x.png', exif=exif)
  frames, notes = read(tmp_path / 'x.png')
  assert frames.shape == (1, 16, 32, 3) and not notes
  np.testing.assert_array_equal(frames[0, 8, 4], RED)
  np.testing.assert_array_equal(frames[0, 8, 28], (0, 0, 0))


def test_what_is_transparent_is_white_and_shows_no_hidden_colour(tmp_path):
  pixels = np.zeros((16, 32, 4), np.uint8)
  pixels[..., :3] = GREEN
  pixels[:, 16:, 3] = 255
  Image.fromarray(pixels).save(tmp_path / 'x.png')
  frames, _ = read(tmp_path / 'x.png')
  np.testing.assert_array_equal(frames[0, 8, 4], (255, 255, 255))
  np.testing.assert_array_equal(frames[0, 8, 28], GREEN)


def test_sixteen_bits_of_grey_are_scaled_not_clipped(tmp_path):
  grey = np.full((16, 32), 0x8080, np.uint16)
  Image.fromarray(grey).save(tmp_path / 'x.png')
  frames, _ = read(tmp_path / 'x.png')
  assert np.unique(frames).tolist() == [128]


@pytest.mark.parametrize('suffix', ['gif', 'webp', 'png'])
def test_of_an_animated_picture_the_last_frames_are_read(tmp_path, suffix):
  colours = [(0, 0, 200), (200, 0, 0), (0, 200, 0)]
  pictures = [Image.new('RGB', (32, 16), colour) for colour in colours]
  pictures[0].save(
    tmp_path / f'x.{suffix}',
    save_all=True,
    append_images=pictures[1:],
    duration=250,
    **({'lossless': True} if suffix == 'webp' else {}),
  )
  frames, notes = read(tmp_path / f'x.{suffix}', last=1)
  np.testing.assert_allclose(frames[0, 8, 8], colours[-1], atol=4)
  frames, notes = read(tmp_path / f'x.{suffix}')
  # 0.25 s each, at 8 a second; the last one is the end.
  shown = [colours.index(tuple(c)) for c in (frames[:, 8, 8] // 50 * 50)]
  assert shown == [0, 0, 1, 1, 2]
  assert '4 frames a second, read at 8' in notes[0]


@pytest.mark.parametrize('rotation', [90, -90, 180])
def test_a_turned_video_is_read_upright(tmp_path, rotation):
  shown = ramp(4)
  stored = np.rot90(shown, -rotation // 90, (1, 2))
  write_video(tmp_path / 'stored.mp4', stored, np.arange(4) / 8)
  path = tmp_path / 'turned.mp4'
  subprocess.run(
    [
      *(imageio_ffmpeg.get_ffmpeg_exe(), '-v', 'error'),
      *('-display_rotation', str(rotation), '-i', tmp_path / 'stored.mp4'),
      *('-c', 'copy', path),
    ],
    check=True,
  )
  frames, notes = read(path)
  assert not any('cut off' in note for note in notes)
  np.testing.assert_array_equal(frames, shown)


def test_frames_are_chosen_by_their_times(tmp_path):
  # A clip of a screen: two frames in a second, then many.
  times = [0.0, 0.6, 1.0, *(1.0 + np.arange(1, 9) / 16)]
  write_video(tmp_path / 'x.mp4', ramp(len(times)), times)
  frames, _ = read(tmp_path / 'x.mp4', fps=4.0)
  wanted = [int(np.argmin(np.abs(np.array(times) - k / 4))) for k in range(7)]
  assert brightness(frames) == wanted


def test_another_rate_is_resampled_and_said(tmp_path):
  write_video(tmp_path / 'x.mp4', ramp(31), np.arange(31) / 30)
  frames, notes = read(tmp_path / 'x.mp4', fps=10.0)
  assert brightness(frames) == list(range(0, 31, 3))
  assert notes == [f'{tmp_path}/x.mp4: 30 frames a second, read at 10']
  frames, _ = read(tmp_path / 'x.mp4', fps=10.0, last=3)
  assert brightness(frames) == [24, 27, 30]


def test_only_the_end_is_decoded(tmp_path, monkeypatch):
  count = 240
  write_video(tmp_path / 'x.mp4', ramp(count), np.arange(count) / 30)
  decoded = []
  timed = given_frames.clips.timed

  def counted(*arguments):
    for item in timed(*arguments):
      decoded.append(item[0])
      yield item

  monkeypatch.setattr(given_frames.clips, 'timed', counted)
  frames, _ = read(tmp_path / 'x.mp4', fps=30.0, last=5)
  assert brightness(frames) == [i % 50 for i in range(count - 5, count)]
  assert len(decoded) < 60


@pytest.mark.parametrize('name', ['10:30:00.mp4', 'http:x.mp4', '-x.mp4'])
def test_a_name_is_no_protocol(tmp_path, monkeypatch, name):
  write_video(tmp_path / name, ramp(2), [0, 0.125])
  monkeypatch.chdir(tmp_path)
  assert len(read(name)[0]) == 2


def test_another_shape_is_cut_at_the_edges_and_said(tmp_path):
  pixels = np.zeros((18, 32, 3), np.uint8)
  pixels[0] = RED
  Image.fromarray(pixels).save(tmp_path / 'x.png')
  frames, notes = read(tmp_path / 'x.png', 16, 32)
  assert not frames.any()
  assert '32x18 is not the shape of 32x16; 11% of its height' in notes[0]


@pytest.mark.parametrize(
  ('fit', 'said', 'corner'),
  [
    ('pad', '50% of the width is black bars', (0, 0, 0)),
    ('stretch', 'its height is made 50% less, beside its width', GREEN),
  ],
)
def test_another_shape_is_padded_or_stretched_on_request(
  tmp_path, fit, said, corner
):
  pixels = np.full((32, 32, 3), GREEN, np.uint8)
  pixels[:4] = pixels[-4:] = RED
  Image.fromarray(pixels).save(tmp_path / 'x.png')
  frames, (note,) = given_frames.read(
    tmp_path / 'x.png', 16, 32, fps=8.0, fit=fit
  )
  assert frames.shape == (1, 16, 32, 3) and note.endswith(said), note
  assert tuple(frames[0, 8, 0]) == corner
  # All of its height is there.
  assert tuple(frames[0, 0, 16]) == RED and tuple(frames[0, -1, 16]) == RED
  with pytest.raises(ValueError, match="fit='fill' is not one of"):
    given_frames.read(tmp_path / 'x.png', 16, 32, fps=8.0, fit='fill')


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'mp4'])
def test_a_damaged_file_is_named(tmp_path, suffix):
  path = tmp_path / f'cut.{suffix}'
  if suffix == 'mp4':
    write_video(path, ramp(4), np.arange(4) / 8)
  else:
    noise = np.random.default_rng(0).integers(0, 255, (64, 128, 3), np.uint8)
    Image.fromarray(noise).save(path)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
  with pytest.raises(ValueError, match=f'cut.{suffix} is (damaged|neither)'):
    read(path)


def test_what_is_neither_is_named(tmp_path):
  (tmp_path / 'x.txt').write_text('hello')
  with pytest.raises(ValueError, match='x.txt is neither a picture nor a vid'):
    read(tmp_path / 'x.txt')
  with pytest.raises(FileNotFoundError, match='no image or video at'):
    read(tmp_path / 'nowhere.png')
  with pytest.raises(ValueError, match='at least 1 is needed'):
    read(tmp_path / 'x.txt', last=0)


def _ffmpeg(*arguments):
  subprocess.run(
    [
      *(imageio_ffmpeg.get_ffmpeg_exe(), '-nostdin', '-v', 'error', '-y'),
      *map(str, arguments),
    ],
    check=True,
  )


def test_a_cover_picture_is_not_the_video(tmp_path):
  video, cover = tmp_path / 'v.mp4', tmp_path / 'cover.png'
  write_video(video, ramp(8), np.arange(8) / 8)
  Image.new('RGB', (40, 40), GREEN).save(cover)
  for name, disposition in (
    ('first.mp4', ('-disposition:v:0', 'attached_pic')),
    ('plain.mkv', ()),
  ):
    path = tmp_path / name
    inputs = ('-i', video, '-i', cover, '-map', '1', '-map', '0')
    _ffmpeg(*inputs, '-c', 'copy', *disposition, path)
    frames, _ = read(path)
    assert brightness(frames) == list(range(8)), name
  song = tmp_path / 'song.mp3'
  sound = ('-f', 'lavfi', '-i', 'sine=d=1', '-i', cover, '-map', '0')
  picture = ('-map', '1', '-c:v', 'png', '-disposition:v:0', 'attached_pic')
  _ffmpeg(*sound, *picture, song)
  with pytest.raises(ValueError, match=r'song\.mp3 has no video in it'):
    read(song)


def test_the_end_of_a_broadcast_s_recording_is_found(tmp_path):
  write_video(tmp_path / 'v.mp4', ramp(40), np.arange(40) / 8)
  late = ('-c:v', 'libx264', '-qp', '0', '-output_ts_offset', '36000')
  _ffmpeg('-i', tmp_path / 'v.mp4', *late, tmp_path / 'v.ts')
  frames, _ = read(tmp_path / 'v.ts', last=3)
  assert len(frames) == 3


def test_a_picture_of_too_many_pixels_is_not_called_damaged(tmp_path):
  path = tmp_path / 'x.png'
  # All that says its size: the header.
  Image.new('1', (8, 8)).save(path)
  data = bytearray(path.read_bytes())
  data[16:24] = (20_000).to_bytes(4, 'big') * 2
  data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, 'big')
  path.write_bytes(data)
  with pytest.raises(ValueError, match=r'x\.png is too large: .*400000000'):
    read(path)


def test_pixels_of_floating_point_are_refused(tmp_path):
  Image.fromarray(np.full((16, 32), 0.5, np.float32)).save(tmp_path / 'x.tif')
  with pytest.raises(ValueError, match='pixels of floating point'):
    read(tmp_path / 'x.tif')


def test_heic_is_told_under_any_name(tmp_path):
  data = b'\0\0\0\x18ftypheic\0\0\0\0mif1heic' + bytes(99)
  (tmp_path / 'x.png').write_bytes(data)
  with pytest.raises(ValueError, match=r'x\.png is a HEIC picture'):
    read(tmp_path / 'x.png')
