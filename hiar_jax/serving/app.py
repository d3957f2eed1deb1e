"""The server's addresses: page, WebSocket, whole videos, health, numbers."""

# F frames, H W height and width

import asyncio
import collections
import contextlib
import dataclasses
import pathlib
import secrets
import tempfile
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import (
  FileResponse,
  JSONResponse,
  PlainTextResponse,
  Response,
)
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from hiar_jax.data import given_frames
from hiar_jax.sampling import video
from hiar_jax.serving import gate, numbers, protocol, whole_video
from hiar_jax.serving.maker import Maker, describe
from hiar_jax.serving.viewer import Viewer

_PAGE = pathlib.Path(__file__).with_name('page')
# Named one by one: no path of a request is ever joined to a folder.
_FILES = {
  'index.html': 'text/html',
  'live.css': 'text/css',
  'live.js': 'text/javascript',
  'curves.js': 'text/javascript',
  'grid.js': 'text/javascript',
}
_HEADERS = {
  'Cache-Control': 'no-cache',
  'Content-Security-Policy': (
    "default-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self' ws: wss:; "
    "frame-ancestors 'self'"
  ),
  'X-Content-Type-Options': 'nosniff',
}
# Sessions that are over and can still be downloaded.
_KEPT_SESSIONS = 8
_UPLOADS = ('image/', 'video/')
_MAX_UPLOADING = 4
_UPLOAD_S = 120.0
# Between two commands of a client: reading them is work for all.
_BREATH_S = 0.005


@dataclasses.dataclass
class _Upload:
  frames: np.ndarray
  notes: list[str]


class Live:
  """The application.

  Attributes:
    app: for an ASGI server.
    maker: of the videos.
  """

  def __init__(
    self,
    maker: Maker,
    rules: gate.Rules,
    *,
    prompts: tuple[str, ...],
  ):
    """Builds it; nothing runs yet.

    Args:
      maker: of the videos; is to be started by who serves.
      rules: on who may use it.
      prompts: that the page offers, the first one to begin with.
    """
    self.maker = maker
    self._limits = maker.limits
    self._prompts = prompts
    self._viewers: collections.OrderedDict[str, Viewer] = (
      collections.OrderedDict()
    )
    self._uploads: collections.OrderedDict[str, _Upload] = (
      collections.OrderedDict()
    )
    self._videos = self._uploading = 0
    # One at a time: decoding and encoding take the cores of the streams.
    self._heavy = asyncio.Semaphore(1)
    self._began = time.time()
    self.app = Starlette(
      routes=[
        Route('/', self._page),
        Route('/static/{name}', self._page),
        Route('/health', self._health),
        Route('/metrics', self._metrics),
        Route('/v1/uploads', self._upload, methods=['POST']),
        Route('/v1/videos', self._video, methods=['POST']),
        Route('/v1/sessions/{id}/video.mp4', self._download),
        WebSocketRoute('/v1/stream', self._stream),
      ],
      middleware=[Middleware(gate.Gate, rules=rules)],
      exception_handlers={
        protocol.Refused: _refused,
        HTTPException: _http_error,
        Exception: _crashed,
      },
    )

  async def drain(self) -> None:
    """Tells the viewers, and returns when whole videos are finished."""
    self.maker.drain()
    for viewer in list(self._viewers.values()):
      if not viewer.done.is_set():
        viewer.ended(
          protocol.Refused('draining', 'the server is about to end', 503)
        )
    end = time.monotonic() + self._limits.drain_s
    while self._videos and time.monotonic() < end:
      await asyncio.sleep(0.05)

  async def _page(self, request: Request) -> Response:
    name = request.path_params.get('name', 'index.html')
    if name not in _FILES:
      raise HTTPException(404)
    return FileResponse(_PAGE / name, media_type=_FILES[name], headers=_HEADERS)

  async def _health(self, request: Request) -> Response:
    del request
    told = describe(self.maker)
    status = 503 if told['state'] == 'draining' else 200
    return JSONResponse(told, status)

  async def _metrics(self, request: Request) -> Response:
    del request
    viewers = [v for v in self._viewers.values() if not v.done.is_set()]
    return PlainTextResponse(
      numbers.page(self.maker, viewers, videos=self._videos, since=self._began),
      media_type='text/plain; version=0.0.4; charset=utf-8',
    )

  async def _upload(self, request: Request) -> Response:
    """A picture or a video to go on from; its id."""
    kind = request.headers.get('content-type', '').partition(';')[0]
    if not kind.startswith(_UPLOADS):
      raise protocol.Refused(
        'kind', f'{kind[:60]!r} is neither image/... nor video/...', 415
      )
    if self._uploading >= _MAX_UPLOADING:
      raise protocol.Refused(
        'busy', f'{_MAX_UPLOADING} uploads are under way; try again', 503
      )
    self._uploading += 1
    try:
      with tempfile.TemporaryDirectory(prefix='hiar-') as folder:
        path = pathlib.Path(folder) / 'upload'
        async with asyncio.timeout(_UPLOAD_S):
          with path.open('wb') as file:
            async for part in _parts(request, self._limits.upload_bytes):
              file.write(part)
        async with self._heavy:
          upload = await asyncio.to_thread(self._read_upload, path)
    except TimeoutError as error:
      raise protocol.Refused(
        'slow', f'the upload took longer than {_UPLOAD_S:g} s', 408
      ) from error
    finally:
      self._uploading -= 1
    id = secrets.token_urlsafe(16)
    self._uploads[id] = upload
    while self._are_too_many():
      self._uploads.popitem(last=False)
    return JSONResponse(
      {'upload': id, 'frames': len(upload.frames), 'notes': upload.notes}, 201
    )

  def _are_too_many(self) -> bool:
    """Uploads; one is never too many."""
    count, most = len(self._uploads), self._limits
    size = sum(upload.frames.nbytes for upload in self._uploads.values())
    return count > most.uploads or (count > 1 and size > most.uploads_bytes)

  def _read_upload(self, path: pathlib.Path) -> _Upload:
    pipeline = self.maker.studio.pipeline
    height, width, _ = pipeline.frame_shape
    stride = pipeline.codec.temporal_stride
    size, most = pipeline.rollout.frames_per_block, pipeline.rollout.past_frames
    try:
      frames, notes = given_frames.read(
        *(path, height, width),
        fps=pipeline.fps,
        # What the past has no room for would not be looked at.
        last=1 + stride * (max(most, size) - 1),
      )
    except (OSError, ValueError) as error:
      told = str(error).replace(str(path), 'the upload')
      raise protocol.Refused('upload', told) from error
    kept = 1 + (len(frames) - 1) // stride
    if kept > size:
      # Every number of latent frames has programs of its own to be compiled.
      kept -= kept % size
    fitting = 1 + (kept - 1) * stride
    notes = [note.replace(str(path), 'the upload') for note in notes]
    return _Upload(frames[-fitting:], notes)

  async def _video(self, request: Request) -> Response:
    """One whole video as an mp4."""
    parts = _parts(request, self._limits.message_bytes)
    body = b''.join([part async for part in parts])
    asked = protocol.parse_video_request(body, self._limits)
    self._check_mode(asked.mode)
    initial = self._initial(asked.upload)
    folder = tempfile.TemporaryDirectory(prefix='hiar-')
    try:
      path = pathlib.Path(folder.name) / 'video.mp4'
      job = whole_video.WholeVideo(
        asked, self.maker, path, initial_frames=initial
      )
      self.maker.submit(job)
      self._videos += 1
      try:
        await _unless_gone(request, job.made())
      finally:
        self._videos -= 1
    except BaseException:
      folder.cleanup()
      raise
    return FileResponse(
      path,
      media_type='video/mp4',
      filename='video.mp4',
      headers={'X-Seed': str(asked.seed)},
      background=BackgroundTask(folder.cleanup),
    )

  async def _download(self, request: Request) -> Response:
    """What a session was shown so far, as an mp4."""
    viewer = self._viewers.get(request.path_params['id'])
    if viewer is None:
      raise protocol.Refused('session', 'there is no such session', 404)
    if viewer.encoder is None or not len(viewer.recording):
      raise protocol.Refused('empty', 'the video has no frames yet', 409)
    scale = video.watchable_scale(self.maker.studio.pipeline.frame_shape[0])
    folder = tempfile.TemporaryDirectory(prefix='hiar-')
    path = pathlib.Path(folder.name) / 'video.mp4'
    try:
      async with self._heavy:
        await asyncio.to_thread(
          viewer.recording.write_mp4,
          path,
          viewer.encoder.decode,
          fps=viewer.fps,
          scale=scale,
        )
    except BaseException:
      folder.cleanup()
      raise
    return FileResponse(
      path,
      media_type='video/mp4',
      filename='video.mp4',
      background=BackgroundTask(folder.cleanup),
    )

  async def _stream(self, socket: WebSocket) -> None:
    """A viewer, from the hello to the end."""
    await socket.accept()
    with contextlib.suppress(WebSocketDisconnect):
      await socket.send_json(self._hello())
      await _Conversation(self, socket).run()

  def _hello(self) -> dict[str, Any]:
    pipeline, studio = self.maker.studio.pipeline, self.maker.studio
    height, width, _ = pipeline.frame_shape
    return {
      'type': 'hello',
      'version': protocol.VERSION,
      'pipeline': pipeline.name,
      'fps': pipeline.fps,
      'height': height,
      'width': width,
      'steps': pipeline.rollout.num_steps,
      'order': pipeline.order,
      'mode': studio.mode,
      'modes': list(studio.modes),
      'reason': studio.reason,
      'formats': list(protocol.FORMATS),
      'prompts': list(self._prompts),
      'state': describe(self.maker)['state'],
      'limits': dataclasses.asdict(self._limits),
    }

  def _check_mode(self, mode: str | None) -> None:
    modes = self.maker.studio.modes
    if mode is not None and mode not in modes:
      raise protocol.Refused('mode', f'mode {mode!r} is not one of {modes}')

  def _initial(self, upload: str | None) -> np.ndarray | None:
    if upload is None:
      return None
    if upload not in self._uploads:
      raise protocol.Refused('upload', f'no upload {upload!r}, or no more', 404)
    return self._uploads[upload].frames

  def _keep(self, viewer: Viewer) -> None:
    self._viewers[viewer.id] = viewer
    over = [id for id, v in self._viewers.items() if v.done.is_set()]
    for id in over[: max(0, len(over) - _KEPT_SESSIONS)]:
      self._viewers.pop(id).recording.close()

  def begin(self, start: protocol.Start) -> Viewer:
    """A new session; errors as `Maker.submit`."""
    self._check_mode(start.mode)
    viewer = Viewer(
      start, self.maker, initial_frames=self._initial(start.upload)
    )
    self._keep(viewer)
    try:
      self.maker.submit(viewer)
    except protocol.Refused:
      self._viewers.pop(viewer.id).close()
      raise
    return viewer


class _Conversation:
  """One WebSocket: its commands, and the session that it has."""

  def __init__(self, live: Live, socket: WebSocket):
    self._live, self._socket = live, socket
    self._limits = live.maker.limits
    self._viewer: Viewer | None = None
    self._show: asyncio.Task[None] | None = None
    self._sending = asyncio.Lock()

  async def run(self) -> None:
    """Returns when the client is gone, or was sent away."""
    try:
      while True:
        message = await self._receive()
        if message is None:
          return
        try:
          command = protocol.parse_command(message, self._limits)
          await self._obey(command)
        except protocol.Refused as error:
          await self._tell(error.as_json())
        await asyncio.sleep(_BREATH_S)
    finally:
      await self._leave()

  async def _receive(self) -> str | bytes | None:
    """The next message; None: the conversation is over."""
    receive = asyncio.ensure_future(self._socket.receive())
    waits: set[asyncio.Future[Any]] = {receive}
    if self._show is not None:
      waits.add(self._show)
    idle = self._limits.idle_s if self._viewer is None else None
    done, _ = await asyncio.wait(
      waits, timeout=idle, return_when=asyncio.FIRST_COMPLETED
    )
    if receive not in done:
      receive.cancel()
      with contextlib.suppress(asyncio.CancelledError):
        await receive
      await self._say_goodbye()
      return None
    message = receive.result()
    if message['type'] != 'websocket.receive':
      return None
    text = message.get('text')
    return message['bytes'] if text is None else text

  async def _say_goodbye(self) -> None:
    """Closes a conversation that has nothing more to say."""
    code, reason = 1000, 'the video is over'
    if self._viewer is None:
      code, reason = 1008, f'no start within {self._limits.idle_s:g} s'
      await self._tell(protocol.Refused('idle', reason).as_json())
    elif self._viewer.error is not None:
      reason = str(self._viewer.error)
      code = 1012 if self._viewer.error.code == 'draining' else 1011
    with contextlib.suppress(TimeoutError):
      # A client that reads nothing would not let go.
      await asyncio.wait_for(self._socket.close(code, reason[:100]), 2.0)

  async def _obey(self, command: protocol.Command) -> None:
    if isinstance(command, protocol.Ping):
      await self._tell({'type': 'pong', 'id': command.id})
    elif isinstance(command, protocol.Start):
      await self._leave()
      self._viewer = self._live.begin(command)
      self._show = asyncio.create_task(self._viewer.run(self._send))
    elif self._viewer is None:
      raise protocol.Refused('not_started', 'the first command is start')
    elif isinstance(command, protocol.Prompt):
      number = self._viewer.prompt(command)
      notes = list(self._live.maker.studio.notes(command.prompt))
      self._viewer.tell(
        {
          'type': 'prompt',
          'number': number,
          'prompt': command.prompt,
          'notes': notes,
        }
      )
    elif isinstance(command, protocol.Pause):
      self._viewer.pause()
    elif isinstance(command, protocol.Resume):
      self._viewer.resume()
    else:
      self._viewer.close()

  async def _leave(self) -> None:
    if self._viewer is None:
      return
    self._viewer.close()
    show, self._show, self._viewer = self._show, None, None
    if show is not None:
      show.cancel()
      with contextlib.suppress(asyncio.CancelledError, WebSocketDisconnect):
        await show

  async def _tell(self, event: dict[str, Any]) -> None:
    async with self._sending:
      await self._socket.send_json(event)

  async def _send(self, message: str | bytes) -> None:
    async with self._sending:
      if isinstance(message, bytes):
        await self._socket.send_bytes(message)
      else:
        await self._socket.send_text(message)


async def _parts(request: Request, limit: int) -> AsyncIterator[bytes]:
  """A request's body, as long as it is no longer than that."""
  size = 0
  try:
    async for part in request.stream():
      size += len(part)
      if size > limit:
        raise protocol.Refused(
          'too_large', f'the body is longer than {limit} bytes', 413
        )
      yield part
  except ClientDisconnect as error:
    raise protocol.Refused('gone', 'the client left') from error


async def _unless_gone(request: Request, work: Any) -> None:
  """Waits for work, and cancels it if the client leaves."""
  task = asyncio.ensure_future(work)
  try:
    while not task.done():
      await asyncio.wait((task,), timeout=0.5)
      if not task.done() and await request.is_disconnected():
        raise protocol.Refused('gone', 'the client left')
    await task
  finally:
    if not task.done():
      task.cancel()
      with contextlib.suppress(asyncio.CancelledError):
        await task


async def _refused(request: Request, error: Exception) -> Response:
  del request
  assert isinstance(error, protocol.Refused)
  return JSONResponse(error.as_json(), error.status)


async def _http_error(request: Request, error: Exception) -> Response:
  assert isinstance(error, HTTPException)
  told = protocol.Refused(
    error.detail.lower().replace(' ', '_'),
    f'{request.method} {request.url.path[:60]}: {error.detail}',
    error.status_code,
  )
  return JSONResponse(told.as_json(), error.status_code, error.headers)


async def _crashed(request: Request, error: Exception) -> Response:
  del request
  told = protocol.Refused('crashed', f'{type(error).__name__}', 500)
  return JSONResponse(told.as_json(), 500)
