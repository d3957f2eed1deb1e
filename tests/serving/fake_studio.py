"""A studio that makes coloured frames at once, and a server around it.

`python -m tests.serving.fake_studio PORT [LIMIT=VALUE ...]` serves it. A prompt
names the colour; some words do more:

  crash    a block of it raises
  refuse   cannot be encoded
  slow     a block takes as long as it is shown
"""

import asyncio
import dataclasses
import sys
import time
from typing import Any

import numpy as np

from hiar_jax.sampling import streaming
from hiar_jax.serving import app, gate, maker, protocol, server

COLOURS = {
  'red': (230, 40, 40),
  'green': (40, 200, 60),
  'blue': (50, 90, 240),
  'yellow': (240, 220, 50),
}
FPS = 16.0
_FRAMES = 4


@dataclasses.dataclass
class _Rollout:
  frames_per_block: int = 4
  past_frames: int = 12
  num_steps: int = 4


@dataclasses.dataclass
class _Codec:
  temporal_stride: int = 1


@dataclasses.dataclass
class _Pipeline:
  name: str = 'fake'
  fps: float = FPS
  order: str = 'step_first'
  frame_shape: tuple[int, int, int] = (32, 48, 3)
  rollout: Any = dataclasses.field(default_factory=_Rollout)
  codec: Any = dataclasses.field(default_factory=_Codec)


def colour(prompt):
  """That a prompt names, or grey."""
  return next((c for name, c in COLOURS.items() if name in prompt), (90,) * 3)


class Making:
  """A bar that moves over a coloured ground."""

  def __init__(self, prompt, initial):
    self.mode, self.given, self.row = 'fake', initial, None
    self.error, self.restarts = None, 0
    self._prompts, self._block, self.closed = [(0, prompt)], 0, False
    self.first = self.next()

  def next(self):
    """A block of four frames."""
    assert not self.closed
    prompt = [p for first, p in self._prompts if first <= self._block][-1]
    if 'crash' in prompt:
      raise RuntimeError('a crash that was asked for')
    if 'slow' in prompt:
      time.sleep(_FRAMES / FPS)
    frames = np.empty((_FRAMES, 32, 48, 3), np.uint8)
    frames[:] = colour(prompt)
    for i, frame in enumerate(frames):
      frame[:, (self._block * _FRAMES + i) % 44 :][:, :4] = 255
    self._block += 1
    return frames

  def begin(self):
    """Has nothing to do."""

  def send(self, prompt, recache=False):
    """Shows two blocks later, as if some were under way."""
    del recache
    at = self._block + 2
    self._prompts.append((at, prompt))
    return at

  def turns(self, block):
    """As of a pipeline of four stages."""
    stages = range(4)
    turns = [
      [(t - s) // 2 for s in stages] for t in (2 * block + 2, 2 * block + 3)
    ]
    return {
      'turns': turns,
      'steps': 4,
      'verbs': [['D', 'C'] * 2, ['C', 'D'] * 2],
    }

  def close(self):
    """Makes no more."""
    self.closed = True


class Studio:
  """See `serving.studio.Studio`."""

  def __init__(self):
    self.pipeline = _Pipeline()
    self.mode, self.reason, self.modes = 'fake', 'for tests', ('fake', 'other')
    self.made = []

  def notes(self, prompt):
    """Complains of one word."""
    return ['it knows no cats'] if 'cat' in prompt else []

  def examples(self):
    """Two colours."""
    return ('red', 'blue')

  def encode(self, prompt):
    """Does nothing."""
    if 'refuse' in prompt:
      streaming.check_prompts([''])

  def warm_up(self, prompt):
    """Makes a block."""
    self.open(prompt, seed=0).close()

  def step(self, makings):
    """Blocks of all of them."""
    return [making.next() for making in makings]

  def open(self, prompt, *, seed, mode=None, initial_frames=None):
    """A new bar."""
    del seed, mode
    self.made.append(Making(prompt, initial_frames))
    return self.made[-1]


async def _serve(port, token, limits):
  live = app.Live(
    maker.Maker(Studio(), limits),
    gate.Rules('127.0.0.1', token),
    prompts=('red', 'blue'),
  )
  listening = server.bind('127.0.0.1', port)
  await server.serve(live, listening, 'red')


def main():
  """See the top."""
  port, *options = sys.argv[1:]
  values = dict(option.split('=') for option in options)
  token = values.pop('token', None)
  limits = protocol.Limits(**{k: type_of(k)(v) for k, v in values.items()})
  asyncio.run(_serve(int(port), token, limits))


def type_of(name):
  """Of a limit."""
  return type(getattr(protocol.Limits(), name))


if __name__ == '__main__':
  main()
