"""uvicorn around the application: sockets that wait, signals, the end."""

import asyncio
import contextlib
import json
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import (
  WebSocketsSansIOProtocol,
)

from hiar_jax.serving import protocol
from hiar_jax.serving.app import Live

# A client that reads nothing is noticed when these are full.
_SEND_BUFFER = 2**18
_PING_S = 15.0
_BACKLOG = 1024
_ABORT_S = 5.0


def bind(host: str, port: int) -> socket.socket:
  """A listening socket; port 0 is any free one.

  Raises:
    OSError: in one sentence.
  """
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  try:
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # What it accepts inherits it.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
    listening.bind((host, port))
    # Who comes before the weights are read waits for them.
    listening.listen(_BACKLOG)
  except OSError as error:
    raise OSError(
      f'cannot listen on {host}:{port}: {error.strerror or error}'
    ) from error
  return listening


async def serve(
  live: Live, listening: socket.socket, prompt: str, *, says: str = ''
) -> None:
  """Serves until SIGTERM or Ctrl-C, and lets go of everything.

  Args:
    live: the application.
    listening: from `bind`.
    prompt: of the video that compiles the programs.
    says: a line before the address, once there is somebody to ask.

  Raises:
    Exception: of the first video, if the pipeline makes none.
  """
  limits = live.maker.limits
  config = uvicorn.Config(
    live.app,
    http=_http(limits),
    ws=_WebSocket,
    ws_max_size=limits.message_bytes,
    ws_per_message_deflate=False,
    ws_ping_interval=_PING_S,
    ws_ping_timeout=_PING_S,
    lifespan='off',
    log_level='error',
    access_log=False,
    server_header=False,
    backlog=_BACKLOG,
    timeout_graceful_shutdown=5,
  )
  server = _Server(config)
  loop = asyncio.get_running_loop()
  ending = asyncio.Event()
  for number in (signal.SIGINT, signal.SIGTERM):
    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
      loop.add_signal_handler(number, ending.set)
  host, port = listening.getsockname()[:2]
  if says:
    print(says)
  shown = f'[{host}]' if ':' in host else host
  print(f'http://{shown}:{port}/ (Ctrl-C ends it)', flush=True)
  ready = asyncio.wrap_future(live.maker.start(prompt))
  serving = asyncio.create_task(server.serve([listening]))
  stop = asyncio.create_task(ending.wait())
  try:
    await asyncio.wait(
      (ready, stop, serving), return_when=asyncio.FIRST_COMPLETED
    )
    if ready.done():
      ready.result()
      print('ready: the programs are compiled', flush=True)
      await asyncio.wait((stop, serving), return_when=asyncio.FIRST_COMPLETED)
    if ending.is_set():
      print('ending: viewers are told', file=sys.stderr, flush=True)
      await live.drain()
  finally:
    server.should_exit = True
    await asyncio.to_thread(live.maker.close)
    await serving
    stop.cancel()


class _Server(uvicorn.Server):
  """Leaves signals to `serve`, which has more to do at the end."""

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    yield


def _http(limits: protocol.Limits) -> type[asyncio.Protocol]:
  """A protocol of HTTP that knows the limits on sockets."""

  class Http(H11Protocol):
    """Sends away who says nothing, and who is one too many."""

    def connection_made(self, transport: Any) -> None:
      super().connection_made(transport)
      self._patience = None
      if len(self.connections) > limits.sockets:
        self._refuse(503, f'{limits.sockets} connections are open')
        return
      self._patience = self.loop.call_later(
        limits.idle_s,
        lambda: self._refuse(408, f'no request within {limits.idle_s:g} s'),
      )

    def data_received(self, data: bytes) -> None:
      super().data_received(data)
      if self.cycle is not None or self.transport.get_protocol() is not self:
        self._be_patient()

    def connection_lost(self, exc: Exception | None) -> None:
      self._be_patient()
      super().connection_lost(exc)

    def _be_patient(self) -> None:
      if self._patience is not None:
        self._patience.cancel()
        self._patience = None

    def _refuse(self, status: int, reason: str) -> None:
      if self.transport.is_closing():
        return
      told = protocol.Refused('sockets', reason, status).as_json()
      body = json.dumps(told).encode()
      self.transport.write(
        b'HTTP/1.1 %d Refused\r\nContent-Type: application/json\r\n'
        b'Content-Length: %d\r\nConnection: close\r\n\r\n%b'
        % (status, len(body), body)
      )
      self.transport.close()

  return Http


class _WebSocket(WebSocketsSansIOProtocol):
  """Lets go of a client that does not read, whatever is left to send."""

  async def send(self, message: Any) -> None:
    if message['type'] == 'websocket.close':
      self.loop.call_later(_ABORT_S, self._abort)
    await super().send(message)

  def keepalive_timeout(self) -> None:
    super().keepalive_timeout()
    self.loop.call_later(_ABORT_S, self._abort)

  def _abort(self) -> None:
    if self.transport is not None:
      self.transport.abort()
