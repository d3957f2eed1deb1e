"""A folder of videos: every file has its caption, and mistakes are named."""

import json

import numpy as np
import pytest

from hiar_jax.data import videos
from hiar_jax.runtime import video_io

SIZE = dict(num_frames=5, height=16, width=24, fps=8)
CAPTIONS = {'b.mp4': 'a cat 🎈', 'a/1.mp4': '一只猫', 'c.mkv.mp4': 'a dog'}


def write_video(path, value=100, num=5):
  path.parent.mkdir(parents=True, exist_ok=True)
  with video_io.VideoWriter(path, fps=8, crf=0) as writer:
    writer.append(np.full((num, 32, 48, 3), value, np.uint8))


@pytest.fixture
def texts(tmp_path):
  folder = tmp_path / 'texts'
  for number, (name, caption) in enumerate(CAPTIONS.items()):
    write_video(folder / name, 50 * number)
    (folder / name).with_suffix('.txt').write_text(caption + '\r\n')
  return folder


@pytest.fixture
def listed(tmp_path):
  folder = tmp_path / 'listed'
  for number, name in enumerate(CAPTIONS):
    write_video(folder / name, 50 * number)
  lines = [
    json.dumps({'file': name, 'caption': caption})
    for name, caption in CAPTIONS.items()
  ]
  (folder / videos.CAPTIONS).write_text('\n'.join(lines))
  return folder


def everything(source):
  return [
    (source.path(i).name, source.captions[i], int(source[i].mean().round()))
    for i in range(len(source))
  ]


def test_captions_are_beside_the_videos_or_in_one_file(texts, listed):
  source = videos.FolderVideos(texts, **SIZE)
  assert source[0].shape == source.shape == (5, 16, 24, 3)
  found = everything(source)
  assert [name for name, *_ in found] == ['1.mp4', 'b.mp4', 'c.mkv.mp4']
  # The file's own order.
  wanted = everything(videos.FolderVideos(listed, **SIZE))
  assert [name for name, *_ in wanted] == ['b.mp4', '1.mp4', 'c.mkv.mp4']
  assert sorted(found) == sorted(wanted)
  assert [caption for _, caption, _ in wanted] == list(CAPTIONS.values())
  values = [value for *_, value in wanted]
  assert np.abs(np.subtract(values, [0, 50, 100])).max() <= 2
  elsewhere = texts / '..' / 'c.txt'
  elsewhere.write_bytes((listed / videos.CAPTIONS).read_bytes())
  again = videos.FolderVideos(texts, **SIZE, captions=elsewhere)
  assert everything(again) == wanted


def test_identity_tells_captions_files_and_sizes_apart(texts):
  def identity(**change):
    return videos.FolderVideos(texts, **(SIZE | change)).identity()

  first = identity()
  assert identity() == first == json.loads(json.dumps(first))
  assert identity(fps=4) != first
  assert identity(num_frames=3) != first
  (texts / 'b.txt').write_text('a fox')
  second = identity()
  assert second != first
  write_video(texts / 'b.mp4', num=7)
  assert identity() != second


def test_a_broken_video_is_named_when_it_is_read(listed):
  (listed / 'b.mp4').write_bytes(b'x' * 300)
  write_video(listed / 'c.mkv.mp4', num=3)
  source = videos.FolderVideos(listed, **SIZE)
  source[1]
  with pytest.raises(ValueError, match=r'b.mp4 cannot be decoded'):
    source[0]
  with pytest.raises(ValueError, match=r'c.mkv.mp4 is too short'):
    source[2]


def test_mistakes_are_named_before_a_video_is_opened(texts, listed, tmp_path):
  def message(folder, **options):
    with pytest.raises((ValueError, FileNotFoundError)) as info:
      videos.open_videos({'path': str(folder), **SIZE, **options}, {})
    return str(info.value)

  assert 'no such folder' in message(tmp_path / 'none')
  (tmp_path / 'empty').mkdir()
  assert 'no file ends in one of .avi' in message(tmp_path / 'empty')
  assert 'videos.height is missing' in message(texts, height=0)
  assert 'videos.fps=-1 is not positive' in message(texts, fps=-1)
  assert 'no such file' in message(texts, captions='none.jsonl')
  (texts / 'b.txt').write_bytes(b'\n')
  assert 'b.txt is empty' in message(texts)
  (texts / 'b.txt').write_bytes(b'caf\xe9')
  assert 'b.txt is not UTF-8: byte 4 is 0xe9' in message(texts)
  (texts / 'b.txt').unlink()
  assert '1 of 3 videos in' in message(texts)
  assert 'the first is b.mp4: write b.txt beside it' in message(texts)
  (texts / 'b.mp4').unlink()
  (texts / 'z.txt').write_text('a cow')
  assert '1 captions in' in message(texts) and 'is z.txt' in message(texts)
  (texts / 'z.mp4').write_bytes(b'')
  (texts / 'z.mov').write_bytes(b'')
  assert '4 videos in' in message(texts) and 'share 3' in message(texts)
  (listed / 'b.mp4').unlink()
  assert 'captions of 1 videos that are not in' in message(listed)
  assert "the first is 'b.mp4'" in message(listed)
  (listed / videos.CAPTIONS).write_text('{"file": "a/1.mp4"}')
  assert 'line 1 of' in message(listed)
  assert "no text 'caption'" in message(listed)
