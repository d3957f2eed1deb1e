"""Arrays that a device finishes when the test says so."""

import threading


class LateValues:
  """Stands for them; `finish` has them ready."""

  def __init__(self):
    self._ready = threading.Event()

  def finish(self):
    self._ready.set()

  def block_until_ready(self):
    self._ready.wait()
    return self
