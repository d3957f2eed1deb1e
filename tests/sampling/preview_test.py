"""The preview, without a notebook: what it shows, and when it ends."""

import io
import sys
import time

import numpy as np
import pytest
from IPython import display
from PIL import Image

from hiar_jax.sampling import preview


class Stream:
  """Frames of a brightness that counts the blocks."""

  def __init__(self, blocks=10**6, fps=40.0):
    self.prompts, self.fps, self.ahead = ['a'], fps, 1
    self.made, self.left = 0, blocks
    self.sent = []

  def __iter__(self):
    return self

  def __next__(self):
    if self.made == self.left:
      raise StopIteration
    self.made += 1
    return np.full((1, 4, 16, 24, 3), min(255, 10 * self.made), np.uint8)

  def compile_recache(self):
    self.compiled = True

  def send(self, prompt):
    if not prompt:
      raise ValueError('that is no prompt')
    self.prompts = [prompt]
    return self.made + 1


class Screen:
  """What is displayed, by the order of the displays."""

  def __init__(self):
    self.shown = []

  def display(self, what, display_id=False):
    self.shown.append([what])
    handle = type('Handle', (), {})()
    index = len(self.shown) - 1
    handle.update = lambda what: self.shown[index].append(what)
    return handle


@pytest.fixture(params=['widgets', 'plain'])
def screen(request, monkeypatch):
  """A notebook, with ipywidgets and without."""
  one = Screen()
  monkeypatch.setattr(display, 'display', one.display)
  if request.param == 'plain':
    monkeypatch.setitem(sys.modules, 'ipywidgets', None)
  return one


def picture(shown):
  (data,) = shown._repr_mimebundle_().values()
  return np.asarray(Image.open(io.BytesIO(data)))


def test_it_plays_at_the_rate_until_it_is_stopped(screen):
  stream = Stream()
  one = preview.Preview(stream)
  one.wait(0.5)
  began, seen = time.monotonic(), len(one.video)
  one.wait(1.0)
  rate = (len(one.video) - seen) / (time.monotonic() - began)
  assert rate == pytest.approx(40, rel=0.2)
  one.stop()
  assert not one.playing and stream.ahead == 0
  # One block more than was shown at most: it is made in time, not in advance.
  assert 4 * stream.made <= len(one.video) + 8
  np.testing.assert_array_equal(one.video.frames[0], np.full((16, 24, 3), 10))
  # The last display is the picture that stays: a sheet of the last seconds.
  assert picture(screen.shown[-1][-1]).shape[0] > 60


def test_a_prompt_is_told_when_it_shows(screen):
  one = preview.Preview(Stream())
  one.wait(0.2)
  assert one.send('b') > 0
  assert 'shows from block' in one._said
  one.wait(0.5)
  one.stop()
  assert 'first changed frame after' in one._said
  assert one.video.prompt == 'b'


def test_it_ends_with_the_stream(screen):
  one = preview.Preview(Stream(blocks=3))
  one.wait(60)
  assert not one.playing and len(one.video) == 12


def test_a_video_of_hours_keeps_its_last_seconds(screen):
  one = preview.Preview(Stream(fps=400.0), keep_s=0.1)
  one.wait(0.5)
  one.stop()
  assert len(one.video) == 40


def test_a_last_picture_that_cannot_be_saved_is_told(screen, capsys):
  stream = Stream()
  one = preview.Preview(stream)
  one.wait(0.3)

  def fail(what):
    raise OSError('the client is gone')

  one._picture.update = fail
  one.stop()
  assert 'the picture of the end was not saved: the client' in one._said
  assert isinstance(one.error, OSError)
  assert 'the client is gone' in capsys.readouterr().err
  assert stream.compiled


def test_box_and_buttons_do_what_they_say(monkeypatch):
  pytest.importorskip('ipywidgets')
  monkeypatch.setattr(display, 'display', Screen().display)
  stream = Stream()
  one = preview.Preview(stream)
  widgets = one._widgets
  widgets._prompt.value = ''
  widgets._send.click()
  assert widgets.told.value == 'that is no prompt'
  widgets._prompt.value = 'c'
  widgets._send.click()
  assert stream.prompts == ['c']
  widgets._stop.click()
  one.wait(60)
  assert widgets._send.disabled


def test_what_cannot_be_shown_is_refused(screen):
  stream = Stream()
  stream.prompts = ['a', 'b']
  with pytest.raises(ValueError, match='a stream of 2 videos'):
    preview.Preview(stream)
  with pytest.raises(ValueError, match='fps=None'):
    preview.Preview(Stream(fps=None))
  one = preview.Preview(Stream(blocks=0))
  with pytest.raises(ValueError, match='nothing was shown yet'):
    _ = one.video
