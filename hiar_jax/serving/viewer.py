"""One viewer's session: blocks in, frames out at their rate, whoever looks.

The maker's thread hands over blocks; a thread of the session encodes, measures
and records them; on the event loop a clock puts each piece that is due, a frame
or a segment of some, into an outbox, and a writer sends what is in there. The
outbox is short: for a client that reads too slowly the oldest pieces are
dropped from the display, never from the recording. A client that takes nothing
for a while gets nothing made.
"""

# F frames, H W height and width

import asyncio
import collections
import concurrent.futures
import contextlib
import json
import secrets
import threading
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

from hiar_jax.evaluation import motion, statistics
from hiar_jax.serving import pieces, protocol, recording, studio
from hiar_jax.serving.maker import Maker

_OUTBOX_S = 1.0
# A client that took nothing for so long is no reason to make more.
_STALL_S = 10.0
_GIVE_UP_S = 60.0
_WATCH_S = 0.5
# Frames that came too late follow each other a little faster until they are on
# time again; later than this, the clock is set anew.
_CATCH_UP = 0.8
_TOO_LATE_S = 2.0
# How long before a session runs dry its next block is asked for, besides the
# time that it takes; a session that ran dry has more for a while.
_LEAD_S = 0.25
_MARGIN = 1.5
_LEAD_DECAY = 0.9995  # a frame
_MAX_EVENTS = 512
_MAX_ASKED = 64
_GOODBYE_S = 2.0  # for the last events
_EVENT_S = 5.0  # over which rates are taken

Send = Callable[[str | bytes], Awaitable[None]]


class Viewer:
  """A job of the maker whose frames go to a client as they fall due.

  Attributes:
    id: a secret that names the session, for the download.
    start: what was asked for.
    initial_frames: that the video goes on from, or None.
    fps: frames a second.
    recording: of all frames, shown or not.
    encoder: of its frames, once it has started.
    dropped: frames that the client was too slow for.
    done: set when the session is over.
  """

  def __init__(
    self,
    start: protocol.Start,
    maker: Maker,
    *,
    initial_frames: np.ndarray | None = None,
  ):
    """Must be made on the event loop that will show it."""
    self.id = secrets.token_urlsafe(16)
    self.start, self.initial_frames = start, initial_frames
    self.fps = maker.studio.pipeline.fps
    self.recording = recording.Recording(
      maker.limits.record_frames, maker.limits.record_bytes
    )
    self.encoder: pieces.Encoder | None = None
    self.dropped = self.shown = 0
    self.done = asyncio.Event()
    self.error: protocol.Refused | None = None
    self._maker = maker
    self._loop = asyncio.get_running_loop()
    self._finisher = concurrent.futures.ThreadPoolExecutor(1, 'hiar-finish')
    self._making: studio.Making | None = None
    self._last: np.ndarray | None = None
    self._num_frames = 0
    # [block, frames not yet taken by the clock]; the maker's thread appends,
    # the loop takes.
    self._lock = threading.Lock()
    self._ahead: collections.deque[list[int]] = collections.deque()
    # (block, first frame, prompt, piece); in the outbox and when it is due.
    self._frames: collections.deque[tuple[int, int, int, pieces.Piece]] = (
      collections.deque()
    )
    self._arrived = asyncio.Event()
    self._outbox: collections.deque[
      tuple[int, int, int, pieces.Piece, float]
    ] = collections.deque()
    self._events: collections.deque[dict[str, Any]] = collections.deque()
    self._to_write = asyncio.Event()
    self._unpaused = asyncio.Event()
    self._unpaused.set()
    self._due: float | None = None
    self._lead = _LEAD_S
    self._began = 0.0
    # Prompts: number -> when it was asked for; (first block, number).
    self._asked: dict[int, float] = {}
    self._served = [(0, 0)]
    self._hurry: set[int] = set()
    self._skip_before = 0
    self._sent_at: collections.deque[tuple[float, int]] = collections.deque(
      maxlen=round(_EVENT_S * self.fps) + 1
    )
    self._made: collections.deque[tuple[int, float]] = collections.deque(
      maxlen=8
    )
    self._writing_since: float | None = None

  # Of the client, on the loop.

  def prompt(self, command: protocol.Prompt) -> int:
    """Asks for another prompt; errors as `Maker.prompt`."""
    number = self._maker.prompt(self, command)
    self._asked[number] = time.monotonic()
    while len(self._asked) > _MAX_ASKED:  # Those that were refused later.
      del self._asked[min(self._asked)]
    if command.hurry:
      self._hurry.add(number)
    return number

  def pause(self) -> None:
    """Stands still."""
    self._unpaused.clear()
    self.tell({'type': 'paused'})

  def resume(self) -> None:
    """Goes on where it stood."""
    self._due = None
    self._unpaused.set()
    self.tell({'type': 'resumed'})
    self._maker.wake()

  def tell(self, event: dict[str, Any]) -> None:
    """Puts an event into the outbox."""
    if len(self._events) >= _MAX_EVENTS:
      self._events.popleft()
    self._events.append(event)
    self._to_write.set()

  def close(self) -> None:
    """Leaves the maker; the recording stays."""
    self._maker.leave(self)
    self._finish()

  async def run(self, send: Send) -> None:
    """Shows the video until it is over; to be cancelled by who is gone.

    Args:
      send: an awaitable call that takes a text or binary message.
    """
    write = asyncio.create_task(self._write(send))
    over = asyncio.create_task(self.done.wait())
    tasks = [
      *(write, over),
      asyncio.create_task(self._tick()),
      asyncio.create_task(self._watch()),
    ]
    try:
      await asyncio.wait((write, over), return_when=asyncio.FIRST_COMPLETED)
      await asyncio.wait((write,), timeout=_GOODBYE_S)
    finally:
      self.close()
      for task in tasks:
        task.cancel()
      results = await asyncio.gather(*tasks, return_exceptions=True)
    for error in results:
      if isinstance(error, Exception):
        raise error

  # Of the maker, on its threads.

  def wants_at(self) -> float | None:
    """See `maker.Job`."""
    if not self._unpaused.is_set() or self._stalled_s() > _STALL_S:
      return None
    due = self._due
    with self._lock:
      ahead = [tuple(entry) for entry in self._ahead]
    if due is None:
      return None if ahead else 0.0
    ready = sum(n for block, n in ahead if block >= self._skip_before)
    lead = self._lead + _MARGIN * self._maker.turn_s
    return due + ready / self.fps - lead

  def queued(self, place: int) -> None:
    """See `maker.Job`."""
    state = 'queued' if place else 'preparing'
    self._soon(self.tell, {'type': state, 'place': place})

  def started(self, making: studio.Making) -> None:
    """See `maker.Job`."""
    self._making = making
    height, width, _ = self._maker.studio.pipeline.frame_shape
    self.encoder = pieces.encoder(self.start.format, height, width, self.fps)
    event = {
      'type': 'started',
      'mime': self.encoder.mime,
      'session': self.id,
      'prompt': self.start.prompt,
      'seed': self.start.seed,
      'mode': making.mode,
      'notes': list(self._maker.studio.notes(self.start.prompt)),
    }
    self._soon(self.tell, event)
    if making.given is not None:
      self._submit(0, making.given, 0.0, None)

  def block(self, block: int, frames: np.ndarray, seconds: float) -> None:
    """See `maker.Job`."""
    assert self._making is not None
    self._submit(block, frames, seconds, self._making.turns(block))

  def prompted(self, number: int, at: int) -> None:
    """See `maker.Job`."""
    self._soon(self._serve, at, number)
    if number in self._hurry:
      self._hurry.discard(number)
      self._skip_before = at
    self._soon(
      self.tell, {'type': 'prompted', 'number': number, 'from_block': at}
    )

  def restarted(self, at: int) -> None:
    """See `maker.Job`."""
    self._soon(self.tell, {'type': 'restarted', 'from_block': at})

  def refused(self, error: protocol.Refused) -> None:
    """See `maker.Job`."""
    self._soon(self.tell, error.as_json())

  def ended(self, error: protocol.Refused | None) -> None:
    """See `maker.Job`."""
    self._soon(self._finish, error)

  def _submit(self, block, frames, seconds, turns):
    with self._lock:
      self._ahead.append([block, len(frames)])
    with contextlib.suppress(RuntimeError):  # Over meanwhile.
      self._finisher.submit(self._prepare, block, frames, seconds, turns)

  def _soon(self, act: Callable[..., None], *arguments: Any) -> None:
    with contextlib.suppress(RuntimeError):  # The loop is closed.
      self._loop.call_soon_threadsafe(act, *arguments)

  # On the session's own thread.

  def _prepare(self, *block):
    try:
      self._encode(*block)
    except Exception as error:
      # Such as a full disk; its frames would be waited for in vain.
      traceback.print_exception(error)
      told = f'the frames could not be kept: {type(error).__name__}'
      self._soon(self._finish, protocol.Refused('crashed', told, 500))

  def _encode(self, block, frames, seconds, turns):
    assert self.encoder is not None
    encoded = self.encoder.encode(frames)
    self.recording.append(encoded)
    event = None
    if turns is not None:
      event = {
        'type': 'block',
        'block': block,
        'frames': len(frames),
        'made_ms': round(1000 * seconds, 1),
        'measures': self._measure(frames),
        **turns,
      }
    self._last = frames[-1]
    self._soon(self._deliver, block, encoded, event, seconds)

  def _measure(self, frames: np.ndarray) -> dict[str, float]:
    """Of the block's last two frames: a block costs no more at any length."""
    if min(frames.shape[1:3]) < 2 * motion.BLOCK:
      return {}
    before = frames[-2] if len(frames) > 1 else self._last
    if before is None:
      return {}
    numbers = statistics.of_pair(before, frames[-1])
    return {name: round(value, 5) for name, value in numbers.items()}

  # On the loop.

  def _serve(self, at: int, number: int) -> None:
    self._served.append((at, number))

  def _number(self, block: int) -> int:
    """Of the prompt that a block is made for."""
    return max(number for first, number in self._served if first <= block)

  def _deliver(self, block, encoded, event, seconds):
    number = self._number(block)
    if block >= self._skip_before:
      self._skip()
    for piece in encoded:
      self._frames.append((block, self._num_frames, number, piece))
      self._num_frames += piece.frames
    if event is not None:
      if seconds:
        self._made.append((event['frames'], seconds))
      self.tell({**event, 'prompt': number, **self._rates()})
    self._served = [
      entry
      for i, entry in enumerate(self._served)
      if i + 1 == len(self._served) or self._served[i + 1][0] > block
    ]
    self._arrived.set()

  def _skip(self) -> None:
    """Drops what a hurried prompt made stale."""
    while self._frames and self._frames[0][0] < self._skip_before:
      self._take()

  def _take(self) -> tuple[int, int, int, pieces.Piece]:
    """The next piece, off the books."""
    entry = self._frames.popleft()
    with self._lock:
      self._ahead[0][1] -= entry[-1].frames
      if not self._ahead[0][1]:
        self._ahead.popleft()
    return entry

  def _put(self, entry: tuple[int, int, int, pieces.Piece], due: float) -> None:
    """Into the outbox; what finds no room there any more is dropped."""
    room = max(1, round(_OUTBOX_S * self.fps)) - entry[-1].frames
    while self._outbox and sum(e[3].frames for e in self._outbox) > room:
      late = self._outbox.popleft()[3].frames
      self.dropped += late
      self._maker.counts['dropped'] += late
    self._outbox.append((*entry, due))
    self._to_write.set()

  def _rates(self) -> dict[str, float]:
    frames = sum(count for count, _ in self._made)
    seconds = sum(seconds for _, seconds in self._made)
    shown = 0.0
    if len(self._sent_at) > 1:
      span = self._sent_at[-1][0] - self._sent_at[0][0]
      sent = sum(frames for _, frames in self._sent_at)
      shown = (sent - self._sent_at[-1][1]) / max(span, 1e-9)
    return {
      'made_fps': round(frames / seconds, 2) if seconds else 0.0,
      'shown_fps': round(shown, 2),
      'dropped': self.dropped,
    }

  async def _tick(self) -> None:
    """Takes frame after frame when it is due."""
    ran_dry = False
    while True:
      await self._unpaused.wait()
      if not self._frames:
        ran_dry = self._due is not None
        self._arrived.clear()
        await self._arrived.wait()
        continue
      now = time.monotonic()
      if self._due is None:
        self._due = now
        self._began = self._began or now
      late = now - self._due
      if late < 0:
        await asyncio.sleep(-late)
        continue
      if ran_dry and late > 1 / self.fps:
        # The next blocks are asked for sooner.
        self._lead = min(1.5 * self._lead, max(2 * self._block_s, _LEAD_S))
      self._lead = max(_LEAD_S, _LEAD_DECAY * self._lead)
      ran_dry = False
      entry = self._take()
      self._put(entry, self._due - self._began)
      self._due = now if late > _TOO_LATE_S else self._due
      lasts = entry[-1].frames / self.fps
      self._due += lasts
      self._maker.wake()
      if late > 1 / self.fps:
        await asyncio.sleep(_CATCH_UP * lasts)

  @property
  def _block_s(self) -> float:
    pipeline = self._maker.studio.pipeline
    frames = pipeline.rollout.frames_per_block * pipeline.codec.temporal_stride
    return frames / self.fps

  async def _write(self, send: Send) -> None:
    while True:
      await self._to_write.wait()
      self._to_write.clear()
      while self._events or self._outbox:
        self._writing_since = time.monotonic()
        if self._events:
          await send(json.dumps(self._events.popleft()))
        else:
          await self._show(send, *self._outbox.popleft())
        if self._stalled_s() > _STALL_S:
          self._maker.wake()
        self._writing_since = None
      if self.done.is_set():
        return

  async def _show(self, send, block, index, number, piece, due):
    assert self.encoder is not None
    message = protocol.pack_frame(
      self.encoder.load(piece),
      format=self.start.format,
      block=block,
      frame=index,
      prompt=number,
      dropped=self.dropped,
      due_s=due,
      frames=piece.frames,
    )
    await send(message)
    self.shown += piece.frames
    self._maker.counts['shown'] += piece.frames
    now = time.monotonic()
    self._sent_at.append((now, piece.frames))
    asked = self._asked.pop(number, None)
    if asked is None:
      return
    # Those before it were overtaken.
    for older in [n for n in self._asked if n < number]:
      del self._asked[older]
    self.tell(
      {
        'type': 'changed',
        'number': number,
        'block': block,
        'frame': index,
        'latency_ms': round(1000 * (now - asked), 1),
      }
    )
    self._maker.latencies.append(now - asked)

  async def _watch(self) -> None:
    """Ends what takes nothing for long, or a place that others wait for."""
    most = self._maker.limits.session_s
    while self._stalled_s() < _GIVE_UP_S:
      await asyncio.sleep(_WATCH_S)
      had = time.monotonic() - self._began if self._began else 0.0
      if had > most and self._maker.waiting:
        self._finish(
          protocol.Refused('time', f'others wait for this place of {most:g} s')
        )
        return
    self._finish(
      protocol.Refused('stalled', f'nothing was read for {_GIVE_UP_S:g} s')
    )

  def _stalled_s(self) -> float:
    since = self._writing_since
    return 0.0 if since is None else time.monotonic() - since

  def _finish(self, error: protocol.Refused | None = None) -> None:
    if self.done.is_set():
      return
    self.error = error
    self.done.set()
    self._outbox.clear()
    self._finisher.shutdown(wait=False)
    self.tell(
      {'type': 'ended', 'session': self.id}
      if error is None
      else {**error.as_json(), 'type': 'ended'}
    )
