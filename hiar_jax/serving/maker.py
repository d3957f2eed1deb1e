"""One thread makes the blocks of all sessions, for whoever runs dry first.

A session is admitted if there is a place, else it waits and is told how many
are before it. Streams are opened, which compiles, and texts are encoded on
threads of their own: nobody's video stands still for them. An error ends the
session that it belongs to and no other; those that share a batch with it may
have to make again the blocks that were under way.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from hiar_jax.runtime import errors
from hiar_jax.serving import protocol, studio

# Of a block of a video that nobody waits for frame by frame, one is made after
# so many of others.
_FAIR_SHARE = 8
_SMOOTHING = 0.9
# How much sooner than it must a session takes a block, in times of a block, to
# share a batch.
_SOON = 1.0
# Of one session, that wait to be encoded.
_MAX_PROMPTS = 8


class Job(Protocol):
  """A video as the maker sees it. It is called from the maker's threads."""

  start: protocol.Start
  initial_frames: np.ndarray | None

  def wants_at(self) -> float | None:
    """When it needs the next block, by time.monotonic(); None: not now.

    `math.inf`: whenever there is time.
    """

  def queued(self, place: int) -> None:
    """Waits; `place` sessions are before it, itself counted."""

  def started(self, making: studio.Making) -> None:
    """Was admitted; its first block is the next that comes."""

  def block(self, block: int, frames: np.ndarray, seconds: float) -> None:
    """A block was made: uint8 [F, H, W, 3]."""

  def prompted(self, number: int, at: int) -> None:
    """The prompt of that number shows from block `at` on."""

  def restarted(self, at: int) -> None:
    """Block `at`, the next, and those under way are made again."""

  def refused(self, error: protocol.Refused) -> None:
    """What was asked for last cannot be; the video goes on."""

  def ended(self, error: protocol.Refused | None) -> None:
    """Is over; of an error, which."""


@dataclasses.dataclass
class _Place:
  """What the maker knows of an admitted job."""

  making: studio.Making | None = None
  blocks: int = 0
  prompts: int = 0
  coming: int = 0  # Of them, those that are being encoded.
  restarts: int = 0  # That the job was told of.


class Maker:
  """The thread, the places and the queue.

  Attributes:
    studio: it opens the streams.
    limits: on sessions and queue.
    ready: whether the programs are compiled.
    counts: of what happened, by name, since the start; numbers only grow.
    latencies: seconds from a prompt to its first frame, the last ones.
    block_s: seconds that a block takes, a running mean; 0 before the first.
  """

  def __init__(self, made_by: studio.Studio, limits: protocol.Limits):
    """Starts nothing yet; see `start`."""
    self.studio, self.limits = made_by, limits
    self.ready = False
    self.block_s = 0.0
    self.counts: collections.Counter[str] = collections.Counter()
    self.latencies: collections.deque[float] = collections.deque(maxlen=1000)
    self._changed = threading.Condition()
    self._places: dict[Job, _Place] = {}
    self._waiting: collections.deque[Job] = collections.deque()
    self._told_places: dict[Job, int] = {}
    self._closing = self._draining = False
    self._turn = itertools.count()
    self._todo: collections.deque[Callable[[], None]] = collections.deque()
    self._openers = concurrent.futures.ThreadPoolExecutor(1, 'hiar-open')
    self._texts = concurrent.futures.ThreadPoolExecutor(1, 'hiar-text')
    self._thread = threading.Thread(
      target=self._run, name='hiar-maker', daemon=True
    )

  def start(self, prompt: str) -> concurrent.futures.Future[None]:
    """Starts the thread, and compiles with a video of a prompt.

    Returns:
      Is done when `ready`; has the error if the pipeline makes no video.
    """
    self._thread.start()
    return self._openers.submit(self._warm_up, prompt)

  def close(self) -> None:
    """Ends every session, and the thread."""
    with self._changed:
      self._closing = self._draining = True
      self._changed.notify_all()
    self._thread.join()
    # What is being compiled cannot be stopped, and is not waited for.
    self._openers.shutdown(wait=self.ready, cancel_futures=True)
    self._texts.shutdown(wait=self.ready, cancel_futures=True)

  def drain(self) -> None:
    """Admits nobody any more; who waits is sent away."""
    with self._changed:
      self._draining = True
      waiting = list(self._waiting)
      self._waiting.clear()
    for job in waiting:
      job.ended(_draining())

  @property
  def running(self) -> int:
    """Sessions that have a place."""
    return len(self._places)

  @property
  def turn_s(self) -> float:
    """Seconds until everybody has had a block; for the maker's thread."""
    turns = {
      id(
        job
        if place.making is None or place.making.row is None
        else place.making.row
      )
      for job, place in self._places.items()
    }
    return self.block_s * max(1, len(turns))

  @property
  def waiting(self) -> int:
    """Sessions in the queue."""
    return len(self._waiting)

  @property
  def draining(self) -> bool:
    return self._draining

  def submit(self, job: Job) -> None:
    """Admits a job, or queues it.

    Raises:
      protocol.Refused: if the queue is full or the server is about to end.
    """
    with self._changed:
      if self._draining:
        raise _draining()
      if len(self._waiting) >= self.limits.waiting and (
        len(self._places) >= self.limits.sessions
      ):
        self.counts['refused'] += 1
        raise protocol.Refused(
          'full',
          f'{self.limits.sessions} videos are being made and '
          f'{self.limits.waiting} wait; try again later',
          503,
        )
      self._waiting.append(job)
    self._admit()

  def leave(self, job: Job) -> None:
    """Takes a job out, wherever it is; more than once does no harm."""
    with self._changed:
      if job in self._waiting:
        self._waiting.remove(job)
    self._post(lambda: self._drop(job, None))

  def prompt(self, job: Job, command: protocol.Prompt) -> int:
    """Changes a job's prompt when it is encoded.

    Returns:
      The prompt's number, from 1.

    Raises:
      protocol.Refused: if the job has no place yet, or too many on their way.
    """
    with self._changed:
      place = self._places.get(job)
      if place is None or place.making is None:
        raise protocol.Refused('not_started', 'the video has not begun')
      if place.coming >= _MAX_PROMPTS:
        raise protocol.Refused(
          'too_fast', 'prompts come faster than they can be encoded', 429
        )
      place.prompts += 1
      place.coming += 1
      number = place.prompts
    self._texts.submit(self._encode, job, command, number)
    return number

  def wake(self) -> None:
    """Looks again who wants a block."""
    with self._changed:
      self._changed.notify_all()

  # On the threads that prepare.

  def _warm_up(self, prompt: str) -> None:
    self.studio.warm_up(prompt)
    self.ready = True

  def _open(self, job: Job) -> None:
    try:
      self.studio.encode(job.start.prompt)
      making = self.studio.open(
        job.start.prompt,
        seed=job.start.seed,
        mode=job.start.mode,
        initial_frames=job.initial_frames,
      )
    except Exception as error:
      self._post(functools.partial(self._drop, job, error))
      return
    self._post(lambda: self._place(job, making))

  def _encode(self, job: Job, command: protocol.Prompt, number: int) -> None:
    try:
      self.studio.encode(command.prompt)
    except Exception as error:
      told = self._told(error)
      self._post(lambda: self._send(job, command, number, told))
      return
    self._post(lambda: self._send(job, command, number))

  # On the maker's own thread, but for `_post` and `_admit`.

  def _post(self, act: Callable[[], None]) -> None:
    with self._changed:
      self._todo.append(act)
      self._changed.notify_all()

  def _admit(self) -> None:
    with self._changed:
      told = []
      while (
        self._waiting
        and not self._closing
        and len(self._places) < self.limits.sessions
      ):
        job = self._waiting.popleft()
        self._places[job] = _Place()
        self.counts['sessions'] += 1
        told.append((job, 0))
        self._openers.submit(self._open, job)
      places = {job: i + 1 for i, job in enumerate(self._waiting)}
      told += [
        (job, place)
        for job, place in places.items()
        if self._told_places.get(job) != place
      ]
      self._told_places = places
    for job, place in told:
      job.queued(place)

  def _place(self, job: Job, making: studio.Making) -> None:
    place = self._places.get(job)
    if place is None:  # Left meanwhile.
      making.close()
      return
    place.making = making
    try:
      making.begin()
      job.started(making)
      if making.first is not None:
        self._hand_over(job, making.first, 0.0)
    except Exception as error:
      self._drop(job, error)

  def _send(
    self,
    job: Job,
    command: protocol.Prompt,
    number: int,
    error: protocol.Refused | None = None,
  ) -> None:
    place = self._places.get(job)
    if place is None or place.making is None:
      return
    place.coming -= 1
    if error is not None:
      job.refused(error)
      return
    try:
      at = place.making.send(command.prompt, command.recache)
    except ValueError as error:
      job.refused(protocol.Refused('bad_prompt', str(error)))
      return
    self.counts['prompts'] += 1
    job.prompted(number, at)

  def _drop(self, job: Job, error: Exception | None) -> None:
    with self._changed:
      place = self._places.pop(job, None)
    if place is None:
      return
    try:
      if place.making is not None:
        place.making.close()
    finally:
      job.ended(None if error is None else self._told(error))
      self._admit()

  def _told(self, error: Exception) -> protocol.Refused:
    """What a client hears of an error; others' are on stderr as well."""
    if isinstance(error, protocol.Refused):
      return error
    if (mistake := errors.users_mistake(error)) is not None:
      return protocol.Refused('bad_request', mistake)
    self.counts['crashes'] += 1
    traceback.print_exception(error)
    return protocol.Refused(
      'crashed', f'the video could not be made: {type(error).__name__}', 500
    )

  def _run(self) -> None:
    while True:
      with self._changed:
        if self._closing:
          break
        if self._todo:
          act = self._todo.popleft()
          job = None
        else:
          act = None
          job, wait = self._pick()
          if job is None:
            if not self._todo:
              self._changed.wait(wait)
            continue
      try:
        if act is not None:
          act()
        elif job is not None:
          self._make(job)
      except Exception as error:  # A bug, which must not end all the others.
        self._told(error)
    for job in list(self._places):
      self._drop(job, _draining())

  def _pick(self) -> tuple[Job | None, float | None]:
    """Whose block is made next; or how long nobody wants one."""
    wanted = {
      job: at
      for job, place in self._places.items()
      if place.making is not None and (at := self._wants(job)) is not None
    }
    if not wanted:
      return None, None
    idle = {job: at for job, at in wanted.items() if at == float('inf')}
    if idle and next(self._turn) % _FAIR_SHARE == 0:
      # The one that has the fewest blocks.
      return min(idle, key=lambda job: self._places[job].blocks), None
    job = min(wanted, key=lambda job: (wanted[job], self._places[job].blocks))
    if wanted[job] == float('inf'):
      return job, None
    wait = wanted[job] - time.monotonic()
    if wait <= 0:
      return job, None
    if idle and wait > self.block_s:
      return min(idle, key=lambda job: self._places[job].blocks), None
    return None, wait

  def _wants(self, job: Job) -> float | None:
    try:
      return job.wants_at()
    except Exception as error:
      self._todo.append(functools.partial(self._drop, job, error))
      return None

  def _make(self, job: Job) -> None:
    jobs = [job, *self._beside(job)]
    makings = [
      making for one in jobs if (making := self._places[one].making) is not None
    ]
    began = time.monotonic()
    try:
      made = self.studio.step(makings)
    except Exception as error:
      self._lose(job, error)
      return
    seconds = time.monotonic() - began
    self.block_s = (
      _SMOOTHING * self.block_s + (1 - _SMOOTHING) * seconds
      if self.block_s
      else seconds
    )
    for one, frames in zip(jobs, made, strict=True):
      if frames is None:
        continue
      try:
        self._hand_over(one, frames, seconds)
      except Exception as error:
        self._drop(one, error)
    self._look_over(makings[0].row)

  def _look_over(self, row: Any) -> None:
    """Ends those of a row that failed in it, and tells the others."""
    if row is None:
      return
    for job, place in list(self._places.items()):
      making = place.making
      if making is None or making.row is not row:
        continue
      if making.error is not None:
        self._drop(job, making.error)
      elif making.restarts > place.restarts:
        place.restarts = making.restarts
        self.counts['restarts'] += 1
        try:
          job.restarted(place.blocks)
        except Exception as error:
          self._drop(job, error)

  def _beside(self, job: Job) -> list[Job]:
    """Who takes a block in one batch with a job: those who soon want one."""
    making = self._places[job].making
    if making is None or making.row is None:
      return []
    soon = time.monotonic() + _SOON * self.block_s
    beside = []
    for one, place in self._places.items():
      if (
        one is job or place.making is None or place.making.row is not making.row
      ):
        continue
      at = self._wants(one)
      # A whole video, which waits for nobody, goes along.
      if at is not None and (at <= soon or at == float('inf')):
        beside.append(one)
    return beside

  def _lose(self, job: Job, error: Exception) -> None:
    """Ends a job by an error that its row could not lay at anyone's door."""
    making = self._places[job].making
    row = None if making is None else making.row
    lost = [job]
    if row is not None:
      # What it held may be half written.
      row.clear()
      lost = [
        one
        for one, place in self._places.items()
        if place.making is not None and place.making.row is row
      ]
    for one in lost:
      self._drop(one, error)

  def _hand_over(self, job: Job, frames: np.ndarray, seconds: float) -> None:
    place = self._places[job]
    self.counts['blocks'] += 1
    self.counts['frames'] += len(frames)
    block, place.blocks = place.blocks, place.blocks + 1
    job.block(block, frames, seconds)


def _draining() -> protocol.Refused:
  return protocol.Refused('draining', 'the server is about to end', 503)


def describe(maker: Maker) -> dict[str, Any]:
  """What /health tells."""
  state = 'ready' if maker.ready else 'compiling'
  return {
    'status': 'ok',
    'state': 'draining' if maker.draining else state,
    'sessions': maker.running,
    'waiting': maker.waiting,
  }
