"""A server in a process of its own, for a test."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading

_ROOT = pathlib.Path(__file__).parents[2]


class Server:
  """A process that prints its address.

  Attributes:
    process: of the server.
    url: such as http://127.0.0.1:40000.
    output: lines that it printed so far, both streams.
  """

  def __init__(self, *arguments):
    self.output: list[str] = []
    self._url, self._told = None, threading.Event()
    self.process = subprocess.Popen(
      [sys.executable, *map(str, arguments)],
      cwd=_ROOT,
      env={**os.environ, 'PYTHONPATH': str(_ROOT)},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    self._reader = threading.Thread(target=self._read, daemon=True)
    self._reader.start()

  @property
  def url(self):
    assert self._told.wait(120), self.output
    assert self._url, self.output
    return self._url

  @property
  def port(self):
    return int(self.url.rpartition(':')[2])

  def stop(self, number=signal.SIGTERM):
    """Ends it; the exit status."""
    self.process.send_signal(number)
    return self.process.wait(30)

  def close(self):
    """Ends it if it still runs, and lets go of its output."""
    if self.process.poll() is None:
      self.stop(signal.SIGKILL)
    self._reader.join(10)
    self.process.stdout.close()

  def _read(self):
    for line in self.process.stdout:
      self.output.append(line.rstrip())
      if line.startswith('http://') and not self._told.is_set():
        self._url = line.split()[0].rstrip('/')
        self._told.set()
    self._told.set()


@contextlib.contextmanager
def fake(port=0, **limits):
  """A server of `fake_studio`."""
  options = [f'{name}={value}' for name, value in limits.items()]
  server = Server('-m', 'tests.serving.fake_studio', port, *options)
  try:
    yield server
  finally:
    server.close()
