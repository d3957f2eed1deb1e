"""Pipelines, videos and streams as the objects that people handle."""

import pathlib

import numpy as np
import pytest

import hiar_jax
from hiar_jax.sampling import taught
from hiar_jax.sampling.video import Video


@pytest.fixture(scope='module')
def pipe():
  return hiar_jax.load('bouncing')


def _video(count=5):
  frames = np.arange(count, dtype=np.uint8)[:, None, None, None]
  return Video(np.broadcast_to(frames, (count, 64, 64, 3)).copy(), 12.0, 'a')


def test_a_video_is_indexed_iterated_and_turned_into_an_array():
  video = _video()
  assert video[2].shape == (64, 64, 3) and video[2][0, 0, 0] == 2
  assert video[-1][0, 0, 0] == 4
  part = video[1:3]
  assert isinstance(part, Video) and len(part) == 2 and part.fps == 12.0
  assert [frame[0, 0, 0] for frame in video] == [0, 1, 2, 3, 4]
  np.testing.assert_array_equal(np.asarray(video), video.frames)
  assert np.asarray(video, np.float32).dtype == np.float32


@pytest.mark.parametrize('name', ['~/x.mp4', '~/X.MP4'])
def test_a_video_is_saved_at_home_and_under_capitals(
  tmp_path, monkeypatch, name
):
  monkeypatch.setenv('HOME', str(tmp_path))
  _video().save(name)
  assert pathlib.Path(name).expanduser().stat().st_size > 100


def test_a_pipeline_is_shown_in_one_line(pipe):
  shown = repr(pipe)
  assert 'bouncing' in shown and '\n' not in shown and len(shown) < 200


def test_given_frames_may_be_one_picture_or_a_video(pipe):
  video = _video()
  one = pipe.encode(video[0])
  np.testing.assert_array_equal(one, pipe.encode(video.frames[:1]))
  np.testing.assert_array_equal(pipe.encode(video), pipe.encode(video.frames))


def test_how_many_given_frames_would_do_is_said(pipe):
  with pytest.raises(ValueError, match='8 given frames are not 1 .* last 5 wo'):
    pipe.encode(_video(8))


def test_a_stream_closes_and_refuses_what_is_no_prompt(pipe):
  with pipe.stream('a red disc', mode='serial') as stream:
    for wrong in ('', '  ', ['']):
      with pytest.raises(ValueError, match='is not a text'):
        stream.send(wrong)
    with pytest.raises(ValueError, match='prompt 3 is not a text'):
      stream.send([3])
    assert stream.send('a blue disc') == 0
  with pytest.raises(StopIteration):
    next(stream)
  with pytest.raises(ValueError, match='the stream is closed'):
    stream.send('a red disc')
  stream.close()


def test_a_synonym_asks_for_the_word_that_was_taught(pipe, capsys):
  given, taught = pipe.encoder.encode(
    ['a big red box over black', 'a large red square over black']
  )
  np.testing.assert_array_equal(given, taught)
  assert not capsys.readouterr().err


def test_a_word_that_was_not_taught_is_named_once_whoever_asks(pipe, capsys):
  with pipe.stream('a red disc over pink', mode='serial') as stream:
    stream.send('a red disc over pink')
    stream.send('a blue cat over black')
  *notes, last = capsys.readouterr().err.splitlines()
  assert len(notes) == 2
  assert notes[0].startswith("note: 'a red disc over pink' has words")
  assert 'names no shape' in notes[1] and last.endswith('not taught: cat')


def test_other_models_prompts_are_left_alone(capsys):
  class Encoder:
    dim = 3

    def encode(self, captions):
      return captions

  encoder = taught.TaughtEncoder(Encoder(), 'file')
  assert encoder.encode(['a big cat']) == ['a big cat'] and encoder.dim == 3
  assert not capsys.readouterr().err


def test_what_a_long_prompt_loses_is_said(pipe, capsys):
  pipe.encoder.encode(['a red disc over black ' * 4])
  assert 'does not see its last 4 tokens' in capsys.readouterr().err
