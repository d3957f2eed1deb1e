"""What a client is sent, and when: the clock, the outbox, the recording."""

import asyncio
import json
import time

import numpy as np
import pytest

from hiar_jax.runtime import video_io
from hiar_jax.serving import (
  client,
  maker,
  pieces,
  protocol,
  recording,
  viewer,
)
from tests.serving import fake_studio

_VIEWERS = []


@pytest.fixture(autouse=True)
def recordings_are_closed():
  yield
  while _VIEWERS:
    _VIEWERS.pop().recording.close()


class Received:
  """A client that reads, or does not."""

  def __init__(self):
    self.frames, self.times, self.events = [], [], []
    self.reads = asyncio.Event()
    self.reads.set()

  async def send(self, message):
    await self.reads.wait()
    if isinstance(message, bytes):
      self.frames.append(protocol.unpack_frame(message))
      self.times.append(time.monotonic())
    else:
      self.events.append(json.loads(message))

  def of(self, kind):
    return [event for event in self.events if event['type'] == kind]


def watch(act, start=None, **limits):
  """Runs `act(viewer, received)` beside a viewer that is shown."""

  async def run():
    one = maker.Maker(fake_studio.Studio(), protocol.Limits(**limits))
    await asyncio.wrap_future(one.start('red'))
    shown, received = (
      viewer.Viewer(start or protocol.Start('red'), one),
      (Received()),
    )
    _VIEWERS.append(shown)
    one.submit(shown)
    task = asyncio.create_task(shown.run(received.send))
    try:
      await act(shown, received)
    finally:
      task.cancel()
      await asyncio.gather(task, return_exceptions=True)
      await asyncio.to_thread(one.close)
    return shown, received

  return asyncio.run(run())


async def until(condition, seconds=20.0):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    await asyncio.sleep(0.005)


def test_frames_come_in_order_at_their_rate():
  async def act(shown, received):
    await until(lambda: len(received.frames) >= 33)

  shown, received = watch(act)
  frames = received.frames[:33]
  assert [frame.frame for frame in frames] == list(range(33))
  assert [frame.block for frame in frames] == [i // 4 for i in range(33)]
  seconds = received.times[32] - received.times[0]
  assert 32 / seconds == pytest.approx(fake_studio.FPS, rel=0.1)
  np.testing.assert_allclose(
    [frame.due_s for frame in frames], np.arange(33) / 16, atol=0.3
  )
  # Little more is made than is shown.
  assert len(shown.recording) <= 33 + 16
  pixel = client.decode(frames[0])[0, -1]
  np.testing.assert_allclose(pixel, fake_studio.COLOURS['red'], atol=12)


@pytest.mark.parametrize('hurry', [False, True])
def test_a_prompt_is_told_its_block_and_the_time_it_took(hurry):
  async def act(shown, received):
    await until(lambda: len(received.frames) > 3)
    shown.prompt(protocol.Prompt('green', hurry=hurry))
    await until(lambda: received.of('changed'))

  shown, received = watch(act)
  (told,), (changed,) = received.of('prompted'), received.of('changed')
  assert changed['block'] == told['from_block'] and changed['number'] == 1
  green = next(frame for frame in received.frames if frame.prompt == 1)
  assert green.block == told['from_block']
  np.testing.assert_allclose(
    client.decode(green)[0, -1], fake_studio.COLOURS['green'], atol=12
  )
  indices = [frame.frame for frame in received.frames]
  skipped = indices != list(range(len(indices)))
  assert skipped == hurry
  # Two blocks of four frames were begun.
  assert (changed['latency_ms'] < 250) == hurry
  # The download has what was not shown.
  assert len(shown.recording) > indices[-1]


def test_a_slow_client_misses_frames_that_the_recording_has():
  async def act(shown, received):
    await until(lambda: len(received.frames) > 3)
    received.reads.clear()
    await asyncio.sleep(2.5)
    received.reads.set()
    await until(lambda: received.frames[-1].dropped > 10)

  shown, received = watch(act)
  indices = [frame.frame for frame in received.frames]
  missing = set(range(indices[-1])) - set(indices)
  assert 10 < len(missing) <= shown.dropped + 16
  assert len(list(shown.recording.pieces())) == len(shown.recording)
  assert len(shown.recording) > indices[-1]


def test_for_a_client_that_takes_nothing_nothing_is_made(monkeypatch):
  monkeypatch.setattr(viewer, '_STALL_S', 0.5)
  monkeypatch.setattr(viewer, '_GIVE_UP_S', 2.5)

  async def act(shown, received):
    await until(lambda: len(received.frames) > 3)
    received.reads.clear()
    await asyncio.sleep(1.2)
    seen = len(shown.recording)
    await asyncio.sleep(0.5)
    assert len(shown.recording) == seen < 40
    assert len(shown._outbox) <= fake_studio.FPS
    await asyncio.wait_for(shown.done.wait(), 5)
    assert shown.error.code == 'stalled'

  watch(act)


def test_a_place_that_others_wait_for_is_had_for_a_while_alone():
  async def act(shown, received):
    await until(lambda: len(received.frames) > 3)
    await asyncio.sleep(1.5)
    assert not shown.done.is_set()
    other = viewer.Viewer(protocol.Start('blue'), shown._maker)
    _VIEWERS.append(other)
    shown._maker.submit(other)
    await asyncio.wait_for(shown.done.wait(), 5)
    assert shown.error.code == 'time'
    await until(lambda: len(other.recording))
    other.close()

  _, received = watch(act, sessions=1, session_s=1.0)
  assert received.of('ended')[0]['code'] == 'time'


def test_a_pause_stands_still_and_goes_on_with_the_next_frame():
  async def act(shown, received):
    await until(lambda: len(received.frames) > 3)
    shown.pause()
    await asyncio.sleep(0.2)
    seen = len(received.frames)
    await asyncio.sleep(0.5)
    assert len(received.frames) <= seen + 1
    shown.resume()
    await until(lambda: len(received.frames) > seen + 8)

  _, received = watch(act)
  indices = [frame.frame for frame in received.frames]
  assert indices == list(range(len(indices)))
  assert received.of('paused') and received.of('resumed')


def test_every_block_comes_with_its_squares_and_measures():
  async def act(shown, received):
    await until(lambda: len(received.of('block')) > 3)

  _, received = watch(act)
  event = received.of('block')[2]
  assert event['block'] == 2 and event['frames'] == 4 and event['prompt'] == 0
  assert event['turns'][0] == [3, 2, 2, 1] and event['steps'] == 4
  assert event['measures']['motion'] > 0 and event['made_fps'] > 0
  assert 0 < event['measures']['saturation'] <= 1


def test_a_crash_is_told_and_ends_the_session():
  async def act(shown, received):
    await until(lambda: len(received.frames) > 3)
    shown.prompt(protocol.Prompt('crash'))
    await until(lambda: received.of('ended'))

  _, received = watch(act)
  assert received.of('ended')[0]['code'] == 'crashed'


def test_frames_that_cannot_be_kept_end_the_session(capsys):
  async def act(shown, received):
    await until(lambda: len(received.frames) > 3)

    def full(pictures):
      raise OSError('No space left on device')

    shown.recording.append = full
    await until(lambda: received.of('ended'))

  _, received = watch(act)
  assert received.of('ended')[0]['code'] == 'crashed'
  assert 'No space left' in capsys.readouterr().err


@pytest.mark.parametrize('format', list(protocol.FORMATS))
def test_a_recording_keeps_the_last_frames_and_becomes_a_video(
  tmp_path, monkeypatch, format
):
  monkeypatch.setattr(recording, '_SEGMENT_FRAMES', 10)
  kept = recording.Recording(30, 10**9)
  encoder = pieces.encoder(format, 32, 48, 16.0)
  frame = np.zeros((32, 48, 3), np.uint8)
  for i in range(80):
    frame[:] = 3 * i
    kept.append(encoder.encode(frame[None]))
  assert 30 <= len(kept) <= 40
  kept.write_mp4(tmp_path / 'video.mp4', encoder.decode, fps=16.0, scale=1)
  frames, fps = video_io.read_video(tmp_path / 'video.mp4')
  assert fps == 16 and len(frames) == len(kept)
  assert abs(int(frames[-1].mean()) - 3 * 79) < 4
  kept.close()
  kept.append([pieces.Piece(b'', 1)])
  assert not list(kept.pieces())


def test_a_recording_of_large_pictures_keeps_to_its_bytes():
  kept = recording.Recording(10**6, 8000)
  for i in range(100):
    kept.append([pieces.Piece(bytes([i]) * 500, 1)])
  assert 8000 <= 500 * len(kept) <= 9500
  assert next(kept.pieces()) == bytes([100 - len(kept)]) * 500
  kept.close()
