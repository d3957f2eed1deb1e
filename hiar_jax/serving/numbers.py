"""What /metrics shows: the text format of Prometheus."""

import os
import time
from collections.abc import Sequence

import numpy as np

from hiar_jax.serving.maker import Maker
from hiar_jax.serving.viewer import Viewer

_COUNTERS = {
  'sessions': 'sessions that were admitted',
  'refused': 'sessions that found the queue full',
  'blocks': 'blocks made',
  'frames': 'frames made',
  'prompts': 'prompts that changed a video',
  'crashes': 'sessions that ended by an error of the server',
  'restarts': "sessions that were begun anew because of another's error",
  'shown': 'frames sent to viewers',
  'dropped': 'frames that viewers were too slow for',
}
_QUANTILES = (0.5, 0.95, 0.99)


def page(
  maker: Maker, viewers: Sequence[Viewer], *, videos: int, since: float
) -> str:
  """The numbers of now.

  Args:
    maker: of the videos.
    viewers: that are watching.
    videos: whole ones that are being made.
    since: time.time() of the start.
  """
  lines = []

  def add(name, kind, about, values):
    lines.append(f'# HELP hiar_{name} {about}')
    lines.append(f'# TYPE hiar_{name} {kind}')
    lines.extend(f'hiar_{name}{label} {value:g}' for label, value in values)

  for name, about in _COUNTERS.items():
    add(f'{name}_total', 'counter', about, [('', maker.counts[name])])
  gauges = {
    'viewers': ('viewers at this moment', len(viewers)),
    'videos': ('whole videos that are being made', videos),
    'places': ('sessions that have a place', maker.running),
    'waiting': ('sessions in the queue', maker.waiting),
    'ready': ('1 when the programs are compiled', maker.ready),
    'block_seconds': ('seconds that a block takes', maker.block_s),
    'uptime_seconds': ('seconds since the start', time.time() - since),
    'resident_bytes': ('memory of the process', resident_bytes()),
  }
  for name, (about, value) in gauges.items():
    add(name, 'gauge', about, [('', value)])
  latencies = list(maker.latencies)
  add(
    'prompt_latency_seconds',
    'summary',
    'from a prompt to its first frame sent, of the last thousand',
    [
      (f'{{quantile="{q}"}}', float(np.quantile(latencies, q)))
      for q in _QUANTILES
      if latencies
    ],
  )
  return '\n'.join(lines) + '\n'


def resident_bytes() -> int:
  """Memory of this process; 0 where the system does not tell."""
  try:
    with open('/proc/self/statm') as file:
      return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
  except OSError:
    return 0
