"""The page in a browser: it plays, takes a prompt, and hands out the video.

Skipped where there is no Chromium. With HIAR_SCREENSHOTS=FOLDER the pictures of
docs/live.md are left there.
"""

import os
import pathlib
import signal
import time

import pytest
from PIL import Image

from hiar_jax.runtime import video_io
from tests.serving import browser, running

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(browser.find() is None, reason='no Chromium here'),
]


def _set(page, id, value):
  page.evaluate(f"document.getElementById('{id}').value = {value!r}")


def _click(page, id):
  page.evaluate(f"document.getElementById('{id}').click()")


def _text(page, id):
  return page.evaluate(f"document.getElementById('{id}').textContent")


def _pixels(page):
  """Mean (red, green, blue) of what is on the canvas."""
  return page.evaluate("""(() => {
    const canvas = document.getElementById('video');
    const c = canvas.getContext('2d');
    const data = c.getImageData(0, 0, canvas.width, canvas.height).data;
    const sum = [0, 0, 0];
    data.forEach((v, i) => { if (i % 4 < 3) sum[i % 4] += v; });
    return sum.map((s) => 4 * s / data.length);
  })()""")


def _shot(page, name):
  folder = os.environ.get('HIAR_SCREENSHOTS')
  if folder:
    page.screenshot(pathlib.Path(folder) / name)


def test_a_video_plays_changes_and_is_downloaded(tmp_path):
  with (
    running.fake() as server,
    browser.opened(server.url, downloads=tmp_path) as page,
  ):
    page.wait_until('live.frames > 20')
    picture = "document.getElementById('video').toDataURL()"
    first = page.evaluate(picture)
    page.wait_until(f'{picture} != {first!r}')
    red, green, _ = _pixels(page)
    assert red > 150 > green

    _set(page, 'prompt', 'a green cat')
    _click(page, 'send')
    latency = page.wait_until('live.latencies[0]')
    assert 0 < latency < 5000
    red, green, _ = _pixels(page)
    assert green > 150 > red
    assert 'first changed frame after' in _text(page, 'answer')
    assert _text(page, 'note') == 'it knows no cats'
    assert _text(page, 'caption') == 'a green cat'

    _click(page, 'pause')
    page.wait_until('live.paused')
    # What is on its way may take a while on a busy machine.
    stood = -1
    while (seen := page.evaluate('live.frames')) != stood:
      stood = seen
      time.sleep(0.4)
    time.sleep(0.6)
    assert page.evaluate('live.frames') <= stood + 1
    _click(page, 'pause')
    page.wait_until(f'live.frames > {stood + 5}')

    _click(page, 'download')
    page.wait_until(
      "document.getElementById('answer').textContent == 'downloaded'"
    )
    file = tmp_path / 'hiar.mp4'
    end = time.monotonic() + 20
    while not file.exists():
      assert time.monotonic() < end, list(tmp_path.iterdir())
      time.sleep(0.1)
    frames, fps = video_io.read_video(file)
    assert len(frames) > 20 and fps == 16
    assert frames[0].mean((0, 1))[0] > 150 > frames[-1].mean((0, 1))[0]

    picture = tmp_path / 'blue.png'
    Image.new('RGB', (48, 32), (0, 0, 255)).save(picture)
    document = page.call('DOM.getDocument')['root']['nodeId']
    node = page.call('DOM.querySelector', nodeId=document, selector='#upload')[
      'nodeId'
    ]
    page.call('DOM.setFileInputFiles', nodeId=node, files=[str(picture)])
    page.wait_until(
      "document.getElementById('answer').textContent == 'goes on from 1 frame'"
    )
    page.wait_until('live.events.started == 2')
    page.wait_until('live.upload && live.frame.frame > 8')

    _set(page, 'seed', '5')
    _click(page, 'restart')
    page.wait_until('live.frame.frame < 8')
    assert not page.complaints
    assert not page.evaluate('live.errors.length')


def test_the_page_waits_in_the_queue_and_finds_a_server_again(tmp_path):
  with running.fake(sessions=1) as server:
    port = server.port
    with (
      browser.opened(server.url, downloads=tmp_path) as first,
      browser.opened(server.url, downloads=tmp_path) as second,
    ):
      first.wait_until('live.frames > 5')
      second.wait_until('live.events.queued')
      assert '1 in the queue' in _text(second, 'veil-text')
      _shot(second, 'live_queue.png')
      first.call('Page.navigate', url='about:blank')
      second.wait_until('live.frames > 5')

      server.stop(signal.SIGKILL)
      second.wait_until('live.reconnects > 0')
      again = running.Server('-m', 'tests.serving.fake_studio', port)
      try:
        seen = second.evaluate('live.frames')
        second.wait_until(f'live.frames > {seen + 5}')
        second.wait_until('live.reconnects == 0')
      finally:
        again.close()


def test_the_weights_that_come_with_the_package_are_seen_to_change(tmp_path):
  server = running.Server('-m', 'hiar_jax', 'serve', '--port=0')
  try:
    with browser.opened(
      server.url, downloads=tmp_path, width=1240, height=1020
    ) as page:
      page.wait_until('live.frames > 40', 300)
      red, _, blue = _pixels(page)
      assert red > 40 or blue > 40
      for prompt in (
        'a large yellow triangle drifting fast over dark purple',
        'a large cyan square drifting slowly over black',
      ):
        _set(page, 'prompt', prompt)
        _click(page, 'send')
        count = page.evaluate('live.latencies.length')
        page.wait_until(f'live.latencies.length > {count}')
        time.sleep(8)
        _shot(page, f'live_{prompt.split()[3]}.png')
      red, green, blue = _pixels(page)
      assert min(green, blue) > red + 5
      assert page.evaluate('Object.keys(live.events)').count('block') == 1
      assert float(_text(page, 'now-shown_fps')) == pytest.approx(16, abs=1.5)
      assert not page.complaints
    assert server.stop() == 0
  finally:
    server.close()


_PLAYER = """(async () => {
  const socket = new WebSocket(`ws://${location.host}/v1/stream`);
  socket.binaryType = 'arraybuffer';
  const video = document.createElement('video');
  video.muted = true;
  document.body.append(video);
  const source = new MediaSource(), waiting = [];
  video.src = URL.createObjectURL(source);
  const seen = window.seen = {video, source, frames: 0, errors: []};
  let buffer = null;
  const feed = () => {
    if (buffer && !buffer.updating && waiting.length) {
      try { buffer.appendBuffer(waiting.shift()); }
      catch (error) { seen.errors.push(String(error)); }
    }
  };
  socket.onopen = () => socket.send(JSON.stringify(
    {type: 'start', prompt: 'red', format: 'mp4'}));
  socket.onmessage = ({data}) => {
    if (typeof data === 'string') {
      const event = JSON.parse(data);
      if (event.type === 'started') {
        seen.mime = event.mime;
        buffer = source.addSourceBuffer(event.mime);
        buffer.onupdateend = feed;
        video.play();
      }
      return;
    }
    const view = new DataView(data);
    seen.frames += view.getUint32(32);
    waiting.push(data.slice(view.getUint16(6)));
    feed();
  };
})()"""


def test_a_browser_plays_segments_as_they_come(tmp_path):
  with (
    running.fake() as server,
    browser.opened(server.url, downloads=tmp_path) as page,
  ):
    # The page itself shows pictures, and lets no media in.
    page.call('Page.setBypassCSP', enabled=True)
    page.call('Page.reload')
    page.wait_until('window.live && live.hello')
    page.evaluate(_PLAYER)
    page.wait_until('window.seen && seen.mime')
    if not page.evaluate('MediaSource.isTypeSupported(seen.mime)'):
      pytest.skip('this browser has no H.264')
    page.wait_until('seen.frames >= 40 && seen.video.currentTime > 1')
    assert not page.evaluate('seen.errors.length')
    assert not page.evaluate('seen.video.error && seen.video.error.message')
    assert page.evaluate('seen.video.videoWidth') == 48
    # One range: there are no gaps to stop in.
    assert page.evaluate('seen.video.buffered.length') == 1
    seconds = page.evaluate('seen.video.buffered.end(0)')
    assert abs(16 * seconds - page.evaluate('seen.frames')) <= 8
