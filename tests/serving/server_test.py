"""The server as a process: who gets in, who is refused and why, how it ends."""

import asyncio
import contextlib
import http.client
import io
import json
import resource
import signal
import socket
import time

import numpy as np
import pytest
import websockets
from PIL import Image

from hiar_jax.runtime import video_io
from hiar_jax.serving import client, protocol
from tests.serving import fake_studio, running


@pytest.fixture(scope='module')
def server():
  """One for all tests that leave it as it was."""
  with running.fake(idle_s=1.5, sockets=64, prompt_chars=200) as one:
    wait_until_ready(one)
    yield one


def wait_until_ready(server):
  end = time.monotonic() + 60
  while ask(server, 'GET', '/health')[1]['state'] != 'ready':
    assert time.monotonic() < end
    time.sleep(0.05)


def ask(server, method, path, body=None, **headers):
  """(status, JSON or bytes) of a request of HTTP."""
  link = http.client.HTTPConnection('127.0.0.1', server.port, timeout=60)
  try:
    link.request(method, path, body, headers)
    reply = link.getresponse()
    data = reply.read()
    if reply.headers.get_content_type() == 'application/json':
      return reply.status, json.loads(data)
    return reply.status, data
  finally:
    link.close()


def raw(server, data, seconds=10.0):
  """What comes back for bytes."""
  with socket.create_connection(('127.0.0.1', server.port), seconds) as link:
    parts = []
    # A server that does not want the rest resets the connection.
    with contextlib.suppress(OSError):
      link.sendall(data)
      link.shutdown(socket.SHUT_WR)
      while part := link.recv(65536):
        parts.append(part)
  return b''.join(parts)


def talk(server, act, **options):
  async def run():
    async with client.connect(server.url, **options) as live:
      return await asyncio.wait_for(act(live), 30)

  return asyncio.run(run())


async def frames(live, count):
  found = []
  while len(found) < count:
    message = await live.next()
    if isinstance(message, protocol.Frame):
      found.append(message)
  return found


def test_a_conversation_from_the_hello_to_the_end(server):
  async def act(live):
    started = await live.start('red', seed=3, format='webp')
    first = await frames(live, 6)
    told = await live.prompt('a green cat', hurry=True)
    changed = await live.wait_for('changed')
    await live.send('ping', id=7)
    pong = await live.wait_for('pong')
    status, video = await asyncio.to_thread(
      ask, server, 'GET', f'/v1/sessions/{started["session"]}/video.mp4'
    )
    await live.send('stop')
    await live.wait_for('ended')
    return first, told, changed, pong, status, video

  first, told, changed, pong, status, video = talk(server, act)
  assert [frame.frame for frame in first] == list(range(6))
  assert first[0].format == 'webp'
  assert changed['block'] == told['from_block'] and pong['id'] == 7
  assert status == 200 and b'ftyp' in video[:16]


def test_the_hello_tells_what_there_is(server):
  async def act(live):
    return live.hello

  hello = talk(server, act)
  assert (hello['fps'], hello['height'], hello['width']) == (16, 32, 48)
  assert hello['prompts'] == ['red', 'blue']
  assert hello['limits']['prompt_chars'] == 200


def test_a_new_start_takes_the_place_of_the_old_one(server):
  async def act(live):
    first = await live.start('red')
    await frames(live, 3)
    second = await live.start('blue')
    while True:
      (frame,) = await frames(live, 1)
      if frame.frame == 0:
        return first, second, frame

  first, second, frame = talk(server, act)
  assert first['session'] != second['session']
  np.testing.assert_allclose(
    client.decode(frame)[0, -1], fake_studio.COLOURS['blue'], atol=12
  )


def test_a_whole_video_comes_as_a_file(server, tmp_path):
  body = json.dumps({'prompt': 'green', 'num_blocks': 5, 'scale': 2})
  status, data = ask(server, 'POST', '/v1/videos', body)
  assert status == 200
  (tmp_path / 'video.mp4').write_bytes(data)
  made, fps = video_io.read_video(tmp_path / 'video.mp4')
  assert made.shape == (20, 64, 96, 3) and fps == 16


def test_a_video_goes_on_from_an_upload(server):
  picture = io.BytesIO()
  Image.new('RGB', (96, 64), (10, 20, 200)).save(picture, 'PNG')
  status, told = ask(
    server,
    'POST',
    '/v1/uploads',
    picture.getvalue(),
    **{'Content-Type': 'image/png'},
  )
  assert (status, told['frames']) == (201, 1)

  async def act(live):
    await live.start('red', upload=told['upload'])
    return await frames(live, 2)

  given, first = talk(server, act)
  np.testing.assert_allclose(client.decode(given)[0, 0], (10, 20, 200), atol=12)
  np.testing.assert_allclose(
    client.decode(first)[0, -1], fake_studio.COLOURS['red'], atol=12
  )


@pytest.mark.parametrize(('given', 'kept'), [(3, 3), (10, 8), (40, 12)])
def test_of_a_clip_what_the_window_takes_is_kept(server, tmp_path, given, kept):
  # A block is four frames, and the window has room for twelve before one.
  path = tmp_path / 'clip.mp4'
  shades = np.linspace(20, 220, given).astype(np.uint8)
  clip = np.tile(shades[:, None, None, None], (1, 32, 48, 3))
  video_io.write_video(path, clip, fps=fake_studio.FPS)
  mime = {'Content-Type': 'video/mp4'}
  status, told = ask(server, 'POST', '/v1/uploads', path.read_bytes(), **mime)
  assert (status, told['frames']) == (201, kept)

  async def act(live):
    await live.start('red', upload=told['upload'])
    return await frames(live, kept + 1)

  shown = talk(server, act)
  # The last ones, in order, and then the video.
  seen = [client.decode(frame)[0, -1] for frame in shown]
  wanted = np.repeat(shades[-kept:, None], 3, 1)
  np.testing.assert_allclose(seen[:kept], wanted, atol=12)
  np.testing.assert_allclose(seen[kept], fake_studio.COLOURS['red'], atol=12)


def test_the_page_and_its_parts_are_there(server):
  status, page = ask(server, 'GET', '/')
  assert status == 200 and b'<title>hiar_jax live' in page
  for name in ('live.css', 'live.js', 'grid.js', 'curves.js'):
    assert ask(server, 'GET', f'/static/{name}')[0] == 200


def test_numbers_are_those_of_prometheus(server):
  status, page = ask(server, 'GET', '/metrics')
  lines = page.decode().splitlines()
  assert status == 200
  values = dict(
    line.rsplit(' ', 1) for line in lines if not line.startswith('#')
  )
  assert float(values['hiar_ready']) == 1
  assert float(values['hiar_resident_bytes']) > 1e7
  assert all(float(value) >= 0 for value in values.values())


_HTTP = [
  ('GET', '/nothing', None, {}, 404, 'Not Found'),
  ('GET', '/static/../app.py', None, {}, 404, 'Not Found'),
  ('GET', '/static/..%2f..%2fsetup.py', None, {}, 404, 'Not Found'),
  ('GET', '/static/%2e%2e/%2e%2e/etc/passwd', None, {}, 404, 'Not Found'),
  ('GET', '/static//etc/passwd', None, {}, 404, 'Not Found'),
  ('GET', '/static/app.py', None, {}, 404, 'Not Found'),
  ('GET', '/v1/sessions/../video.mp4', None, {}, 404, ''),
  ('GET', '/v1/sessions/none/video.mp4', None, {}, 404, 'no such session'),
  ('PUT', '/', None, {}, 405, 'Method Not Allowed'),
  ('GET', '/v1/videos', None, {}, 405, 'Method Not Allowed'),
  ('GET', '/v1/stream', None, {}, 404, 'Not Found'),
  ('POST', '/v1/videos', b'', {}, 400, 'not JSON'),
  ('POST', '/v1/videos', b'{"prompt": ', {}, 400, 'not JSON'),
  ('POST', '/v1/videos', b'\xff\xfe', {}, 400, 'not UTF-8'),
  ('POST', '/v1/videos', b'[]', {}, 400, 'not a JSON object'),
  ('POST', '/v1/videos', b'{}', {}, 400, "'prompt' is missing"),
  (
    *('POST', '/v1/videos', b'{"prompt": "a", "num_blocks": 401}', {}, 400),
    '401 is not in 1..400',
  ),
  (
    *('POST', '/v1/videos', b'{"prompt": "a", "path": "/etc"}', {}, 400),
    '"path" is not one of',
  ),
  (
    *('POST', '/v1/videos', b'{"prompt": "a", "mode": "fast"}', {}, 400),
    "mode 'fast' is not one of",
  ),
  (
    *('POST', '/v1/videos', b'{"prompt": "a", "upload": "no"}', {}, 404),
    "no upload 'no'",
  ),
  ('POST', '/v1/videos', b' ' * 70000, {}, 413, 'longer than 65536 bytes'),
  (
    *('POST', '/v1/videos', b'{"prompt": "refuse"}', {}, 400),
    'is not a text',
  ),
  (
    *('POST', '/v1/videos', b'{"prompt": "crash"}', {}, 500),
    'could not be made: RuntimeError',
  ),
  ('POST', '/v1/uploads', b'x', {}, 415, 'neither image/... nor video/...'),
  (
    *('POST', '/v1/uploads', b'x', {'Content-Type': 'text/html'}, 415),
    "'text/html' is neither",
  ),
  (
    *('POST', '/v1/uploads', b'no picture', {'Content-Type': 'image/png'}, 400),
    'the upload',
  ),
  (
    *('POST', '/v1/uploads', b'', {'Content-Type': 'video/mp4'}, 400),
    'the upload',
  ),
  (
    *('GET', '/metrics', None, {'Origin': 'http://evil.example'}, 403),
    "pages of 'http://evil.example' may not",
  ),
  (
    *('POST', '/v1/videos', b'{}', {'Origin': 'null'}, 403),
    "pages of 'null' may not",
  ),
  (
    *('GET', '/metrics', None, {'Host': 'evil.example'}, 421),
    "no 'evil.example'",
  ),
  ('GET', '/metrics', None, {'Host': ''}, 421, "no ''"),
]


@pytest.mark.parametrize(
  ('method', 'path', 'body', 'headers', 'status', 'says'),
  _HTTP,
  ids=[f'{case[0]} {case[1]} {case[5]}' for case in _HTTP],
)
def test_a_bad_request_is_refused_in_a_sentence(
  server, method, path, body, headers, status, says
):
  got, told = ask(server, method, path, body, **headers)
  assert got == status
  assert says in (told['message'] if isinstance(told, dict) else '')


_COMMANDS = [
  ('nothing', 'not JSON', 'bad_request'),
  (b'binary', 'text messages', 'bad_request'),
  ('{"type": "launch"}', '"launch" is not one of', 'unknown'),
  ('{"type": "prompt", "prompt": "a"}', 'first command is', 'not_started'),
  ('{"type": "start", "prompt": ["a"]}', 'is not a text', 'bad_request'),
  (
    json.dumps({'type': 'start', 'prompt': 'a' * 201}),
    '201 characters; 200 are allowed',
    'bad_request',
  ),
  ('{"type": "start", "prompt": "a", "mode": "x"}', "mode 'x'", 'mode'),
  ('{"type": "start", "prompt": "a", "upload": "x"}', 'no upload', 'upload'),
]


@pytest.mark.parametrize(
  ('message', 'says', 'code'), _COMMANDS, ids=[case[1] for case in _COMMANDS]
)
def test_a_bad_command_is_refused_and_the_conversation_goes_on(
  server, message, says, code
):
  async def act(live):
    await live._socket.send(message)
    with pytest.raises(client.LiveError, match=says) as told:
      await live.wait_for('started')
    assert told.value.code == code
    await live.start('red')

  talk(server, act)


def test_a_huge_message_ends_the_conversation(server):
  async def act(live):
    await live._socket.send('x' * 2**20)
    with pytest.raises(websockets.ConnectionClosed) as told:
      while True:
        await live.next()
    return told.value.rcvd.code

  assert talk(server, act) == 1009


def test_who_never_starts_is_sent_away(server):
  async def act(live):
    with pytest.raises(client.LiveError, match='no start within 1.5 s'):
      await live.wait_for('started')

  talk(server, act)


def test_a_foreign_page_gets_no_conversation(server):
  async def run():
    async with client.connect(server.url, origin='http://evil.example'):
      pass

  with pytest.raises(websockets.InvalidStatus) as told:
    asyncio.run(run())
  assert told.value.response.status_code == 403
  assert 'may not use' in json.loads(told.value.response.body)['message']


def test_what_is_no_http_is_answered(server):
  assert b'400' in raw(server, b'\x16\x03\x01\x02\x00\x01\x00' * 20)
  long = raw(server, b'GET / HTTP/1.1\r\n' + b'a' * 200_000)
  assert b'400' in long or not long


@pytest.mark.parametrize(
  'wanted', [500, pytest.param(10_000, marks=pytest.mark.slow)]
)
def test_idle_sockets_leave_room_for_who_speaks(server, wanted):
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
  count = min(wanted, hard - 1000)
  idle = []
  try:
    for _ in range(count):
      link = socket.socket()
      link.settimeout(60)
      link.connect(('127.0.0.1', server.port))
      idle.append(link)
    # One too many is told at once, one that says nothing in time.
    replies = [idle[i].recv(200) for i in (0, -1)]
    assert b'408' in replies[0] or b'503' in replies[0]
    assert b'503' in replies[1] and b'64 connections are open' in replies[1]
    # Connecting takes longer than an idle one may stay: some that came late
    # have the places of the first, until their time is over as well.
    end = time.monotonic() + 20
    while ask(server, 'GET', '/health')[0] != 200:
      assert time.monotonic() < end
      time.sleep(0.1)
  finally:
    for link in idle:
      link.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_after_all_that_the_server_is_as_it_was(server):
  end = time.monotonic() + 20
  while True:
    told = ask(server, 'GET', '/health')[1]
    if told == {'status': 'ok', 'state': 'ready', 'sessions': 0, 'waiting': 0}:
      break
    assert time.monotonic() < end, told
    time.sleep(0.1)

  async def act(live):
    await live.start('red')
    return len(await frames(live, 10))

  assert talk(server, act) == 10


def test_a_server_with_a_token_lets_in_who_shows_it_and_ends_well():
  with running.fake(token='secret') as server:
    wait_until_ready(server)
    assert ask(server, 'GET', '/')[0] == 200
    for path in ('/metrics', '/metrics?token=wrong', '/metrics?token='):
      status, told = ask(server, 'GET', path)
      assert (status, told['code']) == (401, 'token')
    assert ask(server, 'GET', '/metrics?token=secret')[0] == 200
    bearer = {'Authorization': 'Bearer secret'}
    assert ask(server, 'GET', '/metrics', **bearer)[0] == 200

    async def act(live):
      return await live.start('red')

    assert talk(server, act, token='secret')['prompt'] == 'red'
    with pytest.raises(websockets.InvalidStatus):
      talk(server, act, token='wrong')

    # Last: it ends the server.
    _ends_well(server, token='secret')


def _ends_well(server, token):
  """SIGTERM tells viewers, and whole videos are finished."""
  bearer = {'Authorization': f'Bearer {token}'}

  async def act(live):
    await live.start('red')
    await frames(live, 3)
    body = json.dumps({'prompt': 'slow red', 'num_blocks': 8})
    video = asyncio.create_task(
      asyncio.to_thread(ask, server, 'POST', '/v1/videos', body, **bearer)
    )
    await asyncio.sleep(0.5)
    server.process.send_signal(signal.SIGTERM)
    with pytest.raises(client.LiveError, match='about to end'):
      await live.wait_for('never')
    with pytest.raises(websockets.ConnectionClosed) as told:
      while True:
        await live.next()
    return told.value.rcvd.code, await video

  code, (status, video) = talk(server, act, token=token)
  assert (code, status) == (1012, 200) and b'ftyp' in video[:16]
  assert server.process.wait(30) == 0


@pytest.mark.slow
def test_clients_find_a_server_that_was_killed_and_started_again():
  with running.fake() as first:
    wait_until_ready(first)
    port = first.port

    async def run():
      seen, again = [], None
      messages = client.watch(f'http://127.0.0.1:{port}', 'red')
      try:
        async for message in messages:
          if isinstance(message, protocol.Frame):
            seen.append(message.frame)
          if len(seen) == 10 and again is None:
            await asyncio.to_thread(first.stop, signal.SIGKILL)
            again = running.Server('-m', 'tests.serving.fake_studio', port)
          if again and 0 in seen[1:] and len(seen) > 20:
            return seen
      finally:
        await messages.aclose()
        if again is not None:
          await asyncio.to_thread(again.close)

    seen = asyncio.run(asyncio.wait_for(run(), 60))
  assert seen[:10] == list(range(10))
