"""Encoded videos on disk: whole, resumable, held to their codec and videos."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from hiar_jax.data import latents

NUM, SHARD = 8, 3
BROKEN = (3, 7)


class Captions:
  def __len__(self):
    return NUM

  def __getitem__(self, index):
    return f'video\n{index} 猫 🎈'


class Videos:
  """Video i is grey i; some are broken."""

  captions = Captions()
  shape = (3, 4, 4, 3)

  def __init__(self, broken=BROKEN):
    self.broken = broken

  def __len__(self):
    return NUM

  def __getitem__(self, index):
    if index in self.broken:
      raise ValueError(f'{index}.mp4 cannot be decoded')
    return np.full(self.shape, index, np.uint8)


MANIFEST = latents.Manifest(
  num=NUM,
  shard_size=SHARD,
  videos={'source': 'test'},
  codec_sha256='1234',
  shape=(3, 2, 2, 3),
)


def encode(frames):
  assert len(frames) == 2
  return frames[:, :, ::2, ::2].astype(np.float32) / 7


def make(directory, videos=None, manifest=MANIFEST, **options):
  options = {'batch_size': 2, 'encode': encode, 'num_threads': 3} | options
  return latents.make(directory, manifest, videos or Videos(), **options)


@pytest.fixture
def folder(tmp_path):
  problems, counts = [], []
  assert make(tmp_path / 'set', report=problems.append, progress=counts.append)
  assert problems == ['3.mp4 cannot be decoded', '7.mp4 cannot be decoded']
  assert sum(counts) == NUM
  return tmp_path / 'set'


def contents(directory):
  return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_elements_are_the_good_videos_with_their_captions(folder):
  source = latents.EncodedVideos(folder)
  good = [i for i in range(NUM) if i not in BROKEN]
  assert len(source) == len(source.captions) == len(good)
  for element, index in enumerate(good):
    assert source[element].dtype == np.float32
    assert source[element].shape == MANIFEST.shape
    np.testing.assert_allclose(source[element], index / 7, rtol=1e-3)
    assert source.captions[element] == f'video\n{index} 猫 🎈'
  assert latents.verify(folder) == []
  assert latents.problems(folder) == [
    f'{index}.mp4 cannot be decoded' for index in BROKEN
  ]


def test_a_file_of_broken_videos_alone_is_no_end(tmp_path):
  make(tmp_path, Videos(broken=(0, 1, 2, 6, 7)))
  source = latents.EncodedVideos(tmp_path)
  assert [source[i].max().round(2) for i in range(3)] == [0.43, 0.57, 0.71]
  assert latents.verify(tmp_path) == []
  make(tmp_path / 'none', Videos(broken=range(NUM)))
  with pytest.raises(ValueError, match='no video could be read'):
    latents.EncodedVideos(tmp_path / 'none')


def test_a_cut_run_makes_only_what_is_missing(folder):
  before = contents(folder)
  kept = (folder / 'latents-00000.array_record').stat().st_mtime_ns
  (folder / 'latents-00001.array_record').unlink()
  with pytest.raises(FileNotFoundError, match='1 of 3 .*latents-00001'):
    latents.EncodedVideos(folder)
  assert latents.verify(folder) == ['latents-00001.array_record is missing']
  counts = []
  make(folder, progress=counts.append)
  assert sum(counts) == SHARD
  assert contents(folder) == before
  assert (folder / 'latents-00000.array_record').stat().st_mtime_ns == kept


def test_a_stop_leaves_whole_files_only(folder, tmp_path):
  out, asked = tmp_path / 'stopped', []

  def stop_in_the_second_file():
    asked.append(None)
    return len(asked) > 2

  assert not make(out, should_stop=stop_in_the_second_file)
  assert sorted(contents(out)) == [
    'captions-00000.jsonl',
    'latents-00000.array_record',
    'manifest.json',
  ]
  assert make(out)
  assert contents(out) == contents(folder)


def test_processes_share_the_files(folder, tmp_path):
  for i in (2, 0, 1):
    make(tmp_path / 'shared', shard_index=i, num_shards=3)
  assert contents(tmp_path / 'shared') == contents(folder)


@pytest.mark.parametrize(
  'change, message',
  [
    (dict(codec_sha256='5678'), 'codec_sha256: 1234 -> 5678'),
    (dict(videos={'source': 'x'}), 'videos.source: test -> x'),
    (dict(num=9), 'num: 8 -> 9'),
  ],
)
def test_latents_of_something_else_are_refused(folder, change, message):
  before = contents(folder)
  with pytest.raises(ValueError, match=message):
    latents.EncodedVideos(folder, change)
  with pytest.raises(ValueError, match=message):
    make(folder, manifest=dataclasses.replace(MANIFEST, **change))
  assert contents(folder) == before


def _garbage(folder: pathlib.Path):
  (folder / 'latents-00001.array_record').write_bytes(b'x' * 300)


def _swapped(folder: pathlib.Path):
  path = folder / 'latents-00001.array_record'
  path.write_bytes((folder / 'latents-00000.array_record').read_bytes())


def _captions(folder: pathlib.Path):
  path = folder / 'captions-00001.jsonl'
  path.write_text(json.dumps({'index': 3, 'caption': 'a'}) + '\n')


@pytest.mark.parametrize(
  'damage, message',
  [
    (_garbage, 'latents-00001.array_record is damaged'),
    (_swapped, 'latents-00001.array_record has not the latents of its'),
    (_captions, 'captions-00001.jsonl has not the captions of latents-00001'),
    (
      lambda folder: (folder / 'captions-00001.jsonl').unlink(),
      'captions-00001.jsonl',
    ),
  ],
)
def test_a_planted_fault_is_found_and_the_set_not_opened(
  folder, damage, message
):
  damage(folder)
  problems = latents.verify(folder)
  assert any(message in problem for problem in problems), problems
  with pytest.raises((ValueError, FileNotFoundError)):
    source = latents.EncodedVideos(folder)
    assert source.identity() != source.identity(), 'opened'


def test_values_that_are_not_finite_are_an_error(tmp_path):
  def overflow(frames):
    return encode(frames) + 1e6

  with pytest.raises(ValueError, match='latents of video 0 are not finite'):
    make(tmp_path, encode=overflow)
  assert list(contents(tmp_path)) == ['manifest.json']


def test_a_folder_without_latents_says_what_makes_them(tmp_path):
  with pytest.raises(FileNotFoundError, match='hiar-jax encode videos makes'):
    latents.EncodedVideos(tmp_path / 'none')
