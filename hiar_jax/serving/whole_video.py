"""A whole video for who waits for its file, made when no viewer needs a block.

Its blocks are those of a stream, so that it shares the programs, the places and
the memory bounds of what is watched.
"""

# F frames, H W height and width

import asyncio
import concurrent.futures
import math
import pathlib
import threading

import numpy as np

from hiar_jax.runtime import video_io
from hiar_jax.sampling import video
from hiar_jax.serving import protocol, studio
from hiar_jax.serving.maker import Maker

# Blocks that wait to be written; more are not made.
_MAX_UNWRITTEN = 4


class WholeVideo:
  """A job of the maker that ends with a file.

  Attributes:
    start: what was asked for.
    initial_frames: that the video goes on from, or None.
  """

  def __init__(
    self,
    request: protocol.VideoRequest,
    maker: Maker,
    path: pathlib.Path,
    *,
    initial_frames: np.ndarray | None = None,
  ):
    """Must be made on the event loop that waits for it.

    Args:
      request: what is made.
      maker: that makes it.
      path: of the mp4.
      initial_frames: see `VideoPipeline.stream`.
    """
    self.start = protocol.Start(
      request.prompt, seed=request.seed, mode=request.mode
    )
    self.initial_frames = initial_frames
    pipeline = maker.studio.pipeline
    scale = request.scale or video.watchable_scale(pipeline.frame_shape[0])
    self._num_blocks, self._blocks = request.num_blocks, 0
    self._writer = video_io.VideoWriter(path, fps=pipeline.fps, scale=scale)
    self._maker = maker
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'hiar-write')
    self._lock = threading.Lock()
    self._unwritten = 0
    self._loop = asyncio.get_running_loop()
    self._result: asyncio.Future[None] = self._loop.create_future()

  async def made(self) -> None:
    """Returns when the file is there.

    Raises:
      protocol.Refused: if it could not be made.
    """
    try:
      await self._result
    finally:
      self._maker.leave(self)
      await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)
      # Of a finished video there is nothing left to discard.
      if self._result.cancelled() or self._result.exception():
        self._writer.discard()

  def wants_at(self) -> float | None:
    """See `maker.Job`."""
    done = self._blocks >= self._num_blocks
    if done or self._unwritten >= _MAX_UNWRITTEN:
      return None
    return math.inf

  def queued(self, place: int) -> None:
    """See `maker.Job`."""

  def started(self, making: studio.Making) -> None:
    """See `maker.Job`."""
    if making.given is not None:
      self._write(making.given, last=False)

  def block(self, block: int, frames: np.ndarray, seconds: float) -> None:
    """See `maker.Job`."""
    self._blocks = block + 1
    self._write(frames, last=self._blocks == self._num_blocks)

  def prompted(self, number: int, at: int) -> None:
    """See `maker.Job`."""

  def restarted(self, at: int) -> None:
    """See `maker.Job`."""

  def refused(self, error: protocol.Refused) -> None:
    """See `maker.Job`."""

  def ended(self, error: protocol.Refused | None) -> None:
    """See `maker.Job`."""
    if error is not None:
      self._settle(error)

  def _write(self, frames: np.ndarray, *, last: bool) -> None:
    with self._lock:
      self._unwritten += 1

    def write():
      try:
        self._writer.append(frames)
        if last:
          self._writer.close()
          self._settle(None)
      except OSError as error:
        self._settle(protocol.Refused('crashed', str(error), 500))
      with self._lock:
        self._unwritten -= 1
      self._maker.wake()

    self._thread.submit(write)

  def _settle(self, error: protocol.Refused | None) -> None:
    def settle():
      if self._result.done():
        return
      if error is None:
        self._result.set_result(None)
      else:
        self._result.set_exception(error)

    self._loop.call_soon_threadsafe(settle)
