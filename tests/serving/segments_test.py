"""Fragmented MP4: what a client gets, and what a slow one misses."""

import io
import json
import subprocess
import sys
import time

import av
import numpy as np
import pytest

from hiar_jax.serving import client, fragments, protocol
from tests.serving import fake_studio, running, viewer_test

recordings_are_closed = viewer_test.recordings_are_closed
_START = protocol.Start('red', format='mp4')


def decoded(segments):
  """Frames of each message."""
  decoder = client.Segments()
  return [decoder.decode(segment) for segment in segments]


@pytest.fixture(scope='module')
def watched():
  """(frames that were made, messages, events) of ten blocks."""

  async def act(shown, received):
    await viewer_test.until(lambda: len(received.frames) >= 10)

  _, received = viewer_test.watch(act, _START)
  while viewer_test._VIEWERS:
    viewer_test._VIEWERS.pop().recording.close()
  made = fake_studio.Making('red', None)
  frames = [made.first, *(made.next() for _ in range(9))]
  return frames, received.frames[:10], received


def test_segments_decode_to_the_frames_that_were_made(watched):
  made, messages, _ = watched
  shown = decoded(messages)
  assert [message.frames for message in messages] == [len(b) for b in made]
  for block, wanted in zip(shown, made, strict=True):
    # A white bar of four pixels over red; colours have half the sides.
    assert block.shape == wanted.shape
    assert np.abs(block.astype(int) - wanted).mean() < 12
  assert [message.frame for message in messages] == list(range(0, 40, 4))
  assert [message.block for message in messages] == list(range(10))


def test_a_segment_comes_when_its_first_frame_is_due(watched):
  _, messages, received = watched
  seconds = received.times[9] - received.times[0]
  assert 36 / seconds == pytest.approx(fake_studio.FPS, rel=0.1)
  np.testing.assert_allclose(
    [message.due_s for message in messages], np.arange(10) / 4, atol=0.3
  )


def test_segments_one_after_the_other_are_a_file_without_gaps(watched):
  _, messages, received = watched
  data = b''.join(message.picture for message in messages)
  with av.open(io.BytesIO(data)) as file:
    times = [float(frame.time) for frame in file.decode(video=0)]
    assert file.streams.video[0].average_rate == 16
  np.testing.assert_allclose(times, np.arange(40) / 16, atol=1e-4)
  (started,) = received.of('started')
  assert started['mime'].startswith('video/mp4; codecs="avc1.')


def test_any_segment_is_decoded_without_those_before_it(watched):
  _, messages, _ = watched
  decoder = client.Segments()
  with pytest.raises(ValueError, match='the first segment'):
    decoder.decode(messages[3])
  decoder.decode(messages[0])
  np.testing.assert_array_equal(
    decoder.decode(messages[7]), decoded(messages)[7]
  )


def test_a_slow_client_misses_whole_segments_and_decodes_the_rest():
  async def act(shown, received):
    await viewer_test.until(lambda: len(received.frames) > 3)
    received.reads.clear()
    end = time.monotonic() + 2.5
    most = 0
    while time.monotonic() < end:
      most = max(most, sum(e[3].frames for e in shown._outbox))
      await viewer_test.asyncio.sleep(0.01)
    assert 0 < most <= fake_studio.FPS
    received.reads.set()
    await viewer_test.until(lambda: received.frames[-1].dropped > 10)
    seen = len(received.frames)
    await viewer_test.until(lambda: len(received.frames) > seen)

  shown, received = viewer_test.watch(act, _START)
  assert {len(block) for block in decoded(received.frames)} == {4}
  starts = [message.frame for message in received.frames]
  missing = set(range(0, starts[-1], 4)) - set(starts)
  assert 10 < 4 * len(missing) <= shown.dropped + 16
  # What was left out leaves no gap in the times of what was sent.
  data = b''.join(message.picture for message in received.frames)
  with av.open(io.BytesIO(data)) as file:
    times = [float(frame.time) for frame in file.decode(video=0)]
  np.testing.assert_allclose(times, np.arange(len(times)) / 16, atol=1e-4)


def test_frames_of_odd_sides_get_even_ones():
  segments = fragments.Segments(17, 23, 12.5)
  frames = np.full((3, 17, 23, 3), (200, 100, 50), np.uint8)
  shown = fragments.decode(segments.begin, segments.encode(frames))
  assert shown.shape == (3, 18, 24, 3)
  np.testing.assert_allclose(shown[2, -1, -1], (200, 100, 50), atol=6)


def test_the_client_program_saves_a_video_that_plays(tmp_path):
  path = tmp_path / 'seen.mp4'
  with running.fake() as server:
    told = subprocess.run(
      [
        *(sys.executable, '-m', 'hiar_jax.serving.client', server.url),
        *('--prompt=red', '--seconds=2.5', f'--save={path}'),
      ],
      capture_output=True,
      text=True,
      timeout=60,
    )
  assert told.returncode == 0, told.stderr
  assert any(
    json.loads(line).get('mime')
    for line in told.stdout.splitlines()
    if line.startswith('{"type": "started"')
  )
  with av.open(str(path)) as file:
    assert len(list(file.decode(video=0))) >= 16
