"""Encoded videos on disk: whole, resumable, held to their codec and world."""

import dataclasses

import numpy as np
import pytest

from hiar_jax.codecs import linear, pixels
from hiar_jax.data import bouncing, latent_files
from hiar_jax.text import word_hash

WORLD = bouncing.WorldConfig(height=32, width=32, num_frames=3)
VIDEOS = bouncing.BouncingVideos(
  WORLD, word_hash.WordHashEncoder(dim=4, length=4), seed=3, caption_dropout=0.5
)
MANIFEST = latent_files.Manifest(
  num=7,
  shard_size=3,
  world=dataclasses.asdict(WORLD),
  world_seed=3,
  codec_sha256='1234',
)


@pytest.fixture(scope='module')
def codec():
  return linear.fit_linear_codec(
    bouncing.videos(WORLD, seed=0, num=8), channels=4
  )


@pytest.fixture
def folder(codec, tmp_path):
  latent_files.make(
    tmp_path, MANIFEST, VIDEOS, pixels.encoder(codec), batch_size=2
  )
  return tmp_path


def test_elements_are_the_encoded_videos_with_their_captions(folder, codec):
  source = latent_files.EncodedVideos(folder, MANIFEST, VIDEOS)
  assert len(source) == 7
  for index in range(7):
    video = VIDEOS[index]
    latents = codec.encode(pixels.to_float(video['video'][None]))[0]
    element = source[index]
    assert element['latents'].dtype == np.float32
    np.testing.assert_allclose(element['latents'], latents, atol=5e-3)
    np.testing.assert_array_equal(element['text'], video['text'])


def test_a_cut_run_makes_only_what_is_missing(folder, codec):
  kept = (folder / 'latents-00000.npy').stat().st_mtime_ns
  (folder / 'latents-00002.npy').unlink()
  assert MANIFEST.missing(folder) == [2]
  with pytest.raises(FileNotFoundError, match='1 of 3 .* latents-00002.npy'):
    latent_files.EncodedVideos(folder, MANIFEST, VIDEOS)
  counts = []
  latent_files.make(
    folder,
    MANIFEST,
    VIDEOS,
    pixels.encoder(codec),
    batch_size=2,
    progress=counts.append,
  )
  assert counts == [1]
  assert (folder / 'latents-00000.npy').stat().st_mtime_ns == kept
  latent_files.EncodedVideos(folder, MANIFEST, VIDEOS)


@pytest.mark.parametrize(
  'change, message',
  [
    (dict(codec_sha256='5678'), 'codec_sha256: 1234 -> 5678'),
    (dict(num=9), 'num: 7 -> 9'),
  ],
)
def test_latents_of_something_else_are_refused(folder, change, message):
  other = dataclasses.replace(MANIFEST, **change)
  with pytest.raises(ValueError, match=message):
    latent_files.EncodedVideos(folder, other, VIDEOS)


def test_a_damaged_file_is_named(folder):
  path = folder / 'latents-00001.npy'
  path.write_bytes(path.read_bytes()[:40])
  with pytest.raises(ValueError, match='latents-00001.npy is damaged'):
    latent_files.EncodedVideos(folder, MANIFEST, VIDEOS)


def test_a_folder_without_latents_says_what_makes_them(tmp_path):
  with pytest.raises(FileNotFoundError, match='launch/encode_videos.py'):
    latent_files.EncodedVideos(tmp_path / 'none', MANIFEST, VIDEOS)


def test_a_stop_leaves_whole_files_only(folder, codec, tmp_path):
  out, asked = tmp_path / 'stopped', []

  def stop_in_the_second_file():
    asked.append(None)
    return len(asked) > 3

  assert not latent_files.make(
    *(out, MANIFEST, VIDEOS, pixels.encoder(codec)),
    batch_size=2,
    should_stop=stop_in_the_second_file,
  )
  assert sorted(path.name for path in out.iterdir()) == [
    'latents-00000.npy',
    'manifest.json',
  ]
  assert latent_files.make(
    out, MANIFEST, VIDEOS, pixels.encoder(codec), batch_size=2
  )
  for path in out.iterdir():
    assert path.read_bytes() == (folder / path.name).read_bytes()
