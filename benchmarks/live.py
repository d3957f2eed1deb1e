"""Ten minutes of the live server under four clients, and what it cost.

  python benchmarks/live.py --seconds=600 --prompts=200

Two clients watch throughout, one comes back again and again, one stops reading
for 45 s at a time. Prompts go to those that read, in turn, every other one with
`hurry`. At the end the server is killed and started again on its port, and the
clients have to find it.

Prints a row for each client, the time from a prompt to its first changed frame
as the clients see it, and the server's memory.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request

import numpy as np
import websockets

from hiar_jax.serving import client, protocol

_STALL_S = 45.0
_WINDOW_S = 10.0
_COME_BACK_S = 30.0


class Watcher:
  """A client, and what it saw.

  Attributes:
    name: of its behaviour.
    times: when frames came, a list for each connection.
    latencies: (hurry, seconds) of prompts.
    connections: how often it connected.
  """

  def __init__(self, name):
    self.name, self.connections, self.dropped = name, 0, 0
    self.times, self.latencies, self.errors = [], [], []
    self.live, self._asked = None, {}
    self._coming = []

  async def prompt(self, prompt, hurry):
    """Asks for a prompt, if there is a connection."""
    if self.live is None:
      return False
    self._coming.append((time.monotonic(), hurry))
    await self.live.send('prompt', prompt=prompt, hurry=hurry)
    return True

  async def run(self, url, prompts, until):
    """Watches, and looks for the server again when it is gone."""
    while time.monotonic() < until():
      with contextlib.suppress(OSError, websockets.WebSocketException):
        await self._connection(url, prompts[0], until)
      self.live = None
      self._asked.clear()
      self._coming.clear()
      await asyncio.sleep(0.2)

  async def _connection(self, url, prompt, until):
    options = {'max_queue': 4} if self.name == 'stalls' else {}
    async with client.connect(url, **options) as live:
      self.connections += 1
      began = time.monotonic()
      times = []
      self.times.append(times)
      await live.send('start', prompt=prompt, seed=self.connections)
      while (now := time.monotonic()) < until():
        if self.name == 'comes back' and now - began > _COME_BACK_S:
          return
        if self.name == 'stalls' and now - began > _WINDOW_S:
          await asyncio.sleep(_STALL_S)
          began = time.monotonic()
        try:
          message = await asyncio.wait_for(live.next(), 1.0)
        except TimeoutError:
          continue
        self._read(message, live, times)

  def _read(self, message, live, times):
    if isinstance(message, protocol.Frame):
      times.append(time.monotonic())
      self.dropped = max(self.dropped, message.dropped)
      if message.prompt in self._asked:
        asked, hurry = self._asked.pop(message.prompt)
        self.latencies.append((hurry, times[-1] - asked))
      for number in [n for n in self._asked if n < message.prompt]:
        del self._asked[number]
    elif message['type'] == 'started':
      if self.name != 'stalls':
        self.live = live
    elif message['type'] == 'prompt':
      self._asked[message['number']] = self._coming.pop(0)
    elif message['type'] in ('error', 'ended'):
      self.errors.append(message.get('message', ''))

  def rates(self):
    """Frames a second of connections of 5 s or more, and the worst 10 s."""
    rates, worst = [], []
    for times in map(np.array, self.times):
      if len(times) < 2 or times[-1] - times[0] < 5:
        continue
      rates.append((len(times) - 1) / (times[-1] - times[0]))
      starts = times[times < times[-1] - _WINDOW_S]
      counts = np.searchsorted(times, starts + _WINDOW_S) - np.arange(
        len(starts)
      )
      if len(counts):
        worst.append(counts.min() / _WINDOW_S)
    return rates, min(worst, default=float('nan'))

  def gaps(self):
    """The longest wait for a frame, and the share of waits over 0.25 s."""
    waits = np.concatenate([np.diff(times) for times in self.times] or [[]])
    if not len(waits):
      return 0.0, 0.0
    return float(waits.max()), float((waits > 0.25).mean())


def numbers(url):
  """What /metrics shows, by name."""
  with urllib.request.urlopen(f'{url}/metrics', timeout=30) as reply:
    lines = reply.read().decode().splitlines()
  return {
    name: float(value)
    for name, value in (
      line.rsplit(' ', 1) for line in lines if not line.startswith('#')
    )
  }


def start_server(port, options):
  """(process, address) of a server whose programs are compiled."""
  process = subprocess.Popen(
    [
      *(sys.executable, '-m', 'hiar_jax', 'serve', f'--port={port}'),
      *options,
    ],
    stdout=subprocess.PIPE,
    text=True,
  )
  url = None
  for line in process.stdout:
    if found := re.match(r'(http://\S+?)/? ', line):
      url = found[1]
    if line.startswith('ready'):
      return process, url
  raise SystemExit(f'the server ended with status {process.wait()}')


async def soak(url, seconds, count):
  """The clients, and the server's memory by the second."""
  with urllib.request.urlopen(f'{url}/health', timeout=30) as reply:
    assert json.load(reply)['state'] == 'ready'
  async with client.connect(url) as live:
    prompts = live.hello['prompts']
  watchers = [
    Watcher(name) for name in ('watches', 'watches', 'comes back', 'stalls')
  ]
  began = time.monotonic()
  end = [began + seconds]
  tasks = [
    asyncio.create_task(one.run(url, prompts, lambda: end[0]))
    for one in watchers
  ]
  memory, asked = [], 0
  # The first prompts once everybody has begun.
  pause = (seconds - 20) / count
  while (now := time.monotonic()) < end[0]:
    if now - began > 10 + asked * pause and asked < count:
      one = watchers[asked % 3]
      asked += await one.prompt(
        prompts[asked % len(prompts)], hurry=bool(asked // 3 % 2)
      )
    if now - began > len(memory) * 5:
      told = await asyncio.to_thread(numbers, url)
      memory.append((now - began, told['hiar_resident_bytes'] / 1e6))
    await asyncio.sleep(0.05)
  return watchers, memory, asked, tasks, end


def report(watchers, memory, asked):
  """Prints what was seen."""
  print(
    f'{"client":12} {"conn.":>5} {"frames":>7} {"fps":>13} {"worst 10 s":>10} '
    f'{"longest wait":>12} {"waits > 0.25 s":>14} {"dropped":>7}'
  )
  for one in watchers:
    rates, worst = one.rates()
    longest, share = one.gaps()
    span = f'{min(rates):.2f}..{max(rates):.2f}' if rates else '-'
    print(
      f'{one.name:12} {one.connections:5} {sum(map(len, one.times)):7} '
      f'{span:>13} {worst:10.1f} {longest:10.2f} s {share:14.2%} '
      f'{one.dropped:7}'
    )
    for error in sorted(set(one.errors)):
      print(f'  {error}')
  for hurry in (False, True):
    seconds = [s for w in watchers for h, s in w.latencies if h == hurry]
    if seconds:
      half, most, top = np.quantile(seconds, (0.5, 0.95, 1.0))
      print(
        f'prompt to changed frame, hurry={hurry}: {len(seconds)} prompts, '
        f'median {half:.2f} s, p95 {most:.2f} s, longest {top:.2f} s'
      )
  print(f'{asked} prompts asked for')
  after = [m for at, m in memory if at > 60] or [m for _, m in memory]
  print(
    f'memory: {memory[0][1]:.0f} MB at the start, {after[0]:.0f} after a '
    f'minute, {memory[-1][1]:.0f} at the end, {max(m for _, m in memory):.0f} '
    'at most'
  )


async def main():
  """Serves, watches and types as people do, and prints what they saw."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--seconds', type=float, default=600.0)
  parser.add_argument('--prompts', type=int, default=200)
  parser.add_argument('--serve', nargs='*', default=[], help='its flags')
  given = parser.parse_args()
  print(f'{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before')
  process, url = start_server(0, given.serve)
  try:
    watchers, memory, asked, tasks, end = await soak(
      url, given.seconds, given.prompts
    )
    print(f'load {os.getloadavg()[0]:.1f} after')
    told = numbers(url)
    report(watchers, memory, asked)
    print(
      f'server: {told["hiar_blocks_total"]:.0f} blocks, '
      f'{told["hiar_block_seconds"]:.3f} s each, '
      f'{told["hiar_crashes_total"]:.0f} crashes'
    )
    # Killed, and started again on its port: who watched finds it.
    end[0] = time.monotonic() + 1e6
    tasks = [t for t in tasks if not t.done()] or [
      asyncio.create_task(one.run(url, ['red'], lambda: end[0]))
      for one in watchers[:2]
    ]
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = [one.connections for one in watchers[:2]]
    process, _ = await asyncio.to_thread(
      start_server, url.rpartition(':')[2], given.serve
    )
    ready = time.monotonic()
    while any(
      one.connections == b or not one.times[-1]
      for one, b in zip(watchers, before, strict=False)
    ):
      await asyncio.sleep(0.05)
    print(
      'killed and started again: both watchers had frames '
      f'{time.monotonic() - ready:.1f} s after it was ready'
    )
    for task in tasks:
      task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
  finally:
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
      print(f'SIGTERM: exit status {process.wait(30)}')


if __name__ == '__main__':
  asyncio.run(main())
