"""A client of the live server, for tests and for programs without a page.

  async with client.connect('http://127.0.0.1:8000') as live:
    await live.start('a red disc')
    async for message in live:
      ...

`python -m hiar_jax.serving.client URL --prompt=...` shows what arrives.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import pathlib
import time
import urllib.parse
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import numpy as np
import websockets

from hiar_jax.serving import fragments, pieces, protocol

_RETRY_S = (0.2, 0.5, 1.0, 2.0)


class LiveError(Exception):
  """The server refused something.

  Attributes:
    code: one word.
  """

  def __init__(self, code: str, message: str):
    super().__init__(message)
    self.code = code


class Client:
  """One conversation; made by `connect`.

  Attributes:
    hello: the server's first event.
  """

  def __init__(self, socket: websockets.ClientConnection):
    self._socket = socket
    self._read: collections.deque[Any] = collections.deque()
    self.hello: dict[str, Any] = {}

  async def send(self, kind: str, **values: Any) -> None:
    """A command; None is left out."""
    told = {name: value for name, value in values.items() if value is not None}
    await self._socket.send(json.dumps({'type': kind, **told}))

  async def start(self, prompt: str, **values: Any) -> dict[str, Any]:
    """Begins a video, and waits until it is being made.

    Args:
      prompt: what it shows.
      **values: see `protocol.Start`.

    Returns:
      The event `started`.

    Raises:
      LiveError: if the server refuses it.
    """
    await self.send('start', prompt=prompt, **values)
    return await self.wait_for('started')

  async def prompt(self, prompt: str, hurry: bool = False) -> dict[str, Any]:
    """Changes the prompt; returns the event `prompted`."""
    await self.send('prompt', prompt=prompt, hurry=hurry)
    return await self.wait_for('prompted')

  async def wait_for(self, kind: str) -> dict[str, Any]:
    """The next event of a kind; what comes before it is read later.

    Raises:
      LiveError: if an error, or the end, comes instead.
    """
    before = []
    try:
      while True:
        message = await self._receive()
        if isinstance(message, dict):
          if message['type'] == kind:
            return message
          if message['type'] == 'error' or (
            message['type'] == 'ended' and 'code' in message
          ):
            raise LiveError(message['code'], message['message'])
        before.append(message)
    finally:
      self._read.extendleft(reversed(before))

  async def next(self) -> dict[str, Any] | protocol.Frame:
    """The next event or frame, in the order of the server.

    Raises:
      websockets.ConnectionClosed: if there is none any more.
    """
    return self._read.popleft() if self._read else await self._receive()

  async def __aiter__(self) -> AsyncIterator[dict[str, Any] | protocol.Frame]:
    """All of them, until the conversation is over."""
    with contextlib.suppress(websockets.ConnectionClosed):
      while True:
        yield await self.next()

  async def _receive(self) -> dict[str, Any] | protocol.Frame:
    message = await self._socket.recv()
    if isinstance(message, bytes):
      return protocol.unpack_frame(message)
    return json.loads(message)


@contextlib.asynccontextmanager
async def connect(
  url: str, *, token: str | None = None, **options: Any
) -> AsyncIterator[Client]:
  """A conversation with the server at an address such as http://host:8000.

  Args:
    url: of the server.
    token: that it asks for.
    **options: of `websockets.connect`.
  """
  parts = urllib.parse.urlsplit(url)
  scheme = 'wss' if parts.scheme == 'https' else 'ws'
  headers = {} if token is None else {'Authorization': f'Bearer {token}'}
  async with websockets.connect(
    f'{scheme}://{parts.netloc}/v1/stream',
    additional_headers=headers,
    **{'max_size': None, 'compression': None, **options},
  ) as socket:
    live = Client(socket)
    live.hello = await live.wait_for('hello')
    yield live


async def watch(
  url: str, prompt: str, *, token: str | None = None, **values: Any
) -> AsyncGenerator[dict[str, Any] | protocol.Frame, None]:
  """Events and frames without end: a lost server is looked for again.

  Args:
    url: of the server.
    prompt: of every video; a lost one begins anew.
    token: that the server asks for.
    **values: see `protocol.Start`.
  """
  tries = 0
  while True:
    try:
      async with connect(url, token=token) as live:
        await live.send('start', prompt=prompt, **values)
        while True:
          yield await live.next()
          tries = 0
    except (OSError, websockets.WebSocketException):
      pass
    await asyncio.sleep(_RETRY_S[min(tries, len(_RETRY_S) - 1)])
    tries += 1


def decode(frame: protocol.Frame) -> np.ndarray:
  """Pixels of a frame that is a picture, uint8 [H, W, 3]."""
  return pieces.read_picture(frame.picture)


class Segments:
  """Pixels of a session's segments, in format 'mp4'.

  Any may be missing but the first, which has what all of them need.
  """

  def __init__(self) -> None:
    self._begin = b''

  def decode(self, frame: protocol.Frame) -> np.ndarray:
    """uint8 [F, H, W, 3].

    Raises:
      ValueError: if the message is no segment, or the first one was not seen.
    """
    if frame.format != 'mp4':
      raise ValueError(f'a message of format {frame.format!r} is no segment')
    begin, segment = fragments.split(frame.picture)
    self._begin = begin or self._begin
    if not self._begin:
      raise ValueError('the first segment, which has the moov, was not seen')
    return fragments.decode(self._begin, segment)


def main() -> None:
  """Shows a line a second of what a server sends."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('url')
  parser.add_argument('--prompt', required=True)
  parser.add_argument('--token')
  parser.add_argument('--seconds', type=float, default=10.0)
  parser.add_argument(
    '--save', type=pathlib.Path, help='the video as it comes, an mp4'
  )
  given = parser.parse_args()
  values = {} if given.save is None else {'format': 'mp4'}

  async def run():
    began = said = time.monotonic()
    frames = 0
    messages = watch(given.url, given.prompt, token=given.token, **values)
    async with contextlib.aclosing(messages):
      async for message in messages:
        now = time.monotonic()
        if isinstance(message, protocol.Frame):
          frames += message.frames
          if given.save is not None:
            # Of a server that was lost the video begins anew.
            with given.save.open('ab' if message.frame else 'wb') as file:
              file.write(message.picture)
          if now - said >= 1:
            said = now
            print(
              f'{now - began:5.1f} s  block {message.block}  frame '
              f'{message.frame}  {frames} frames so far'
            )
        elif message['type'] != 'block':
          print(json.dumps(message))
        if now - began >= given.seconds:
          return

  with contextlib.suppress(KeyboardInterrupt):
    asyncio.run(run())


if __name__ == '__main__':
  main()
