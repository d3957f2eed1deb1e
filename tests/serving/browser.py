"""Chromium without a window, driven by its DevTools protocol."""

import base64
import contextlib
import json
import pathlib
import shutil
import subprocess
import tempfile
import time
import urllib.request

from websockets.sync.client import connect

_NAMES = (
  'chromium',
  'chromium-browser',
  'google-chrome',
  'google-chrome-stable',
)


def find() -> str | None:
  """The browser's program, if there is one."""
  return next(filter(None, map(shutil.which, _NAMES)), None)


class Page:
  """One tab."""

  def __init__(self, socket):
    self._socket, self._number = socket, 0
    self.complaints: list[str] = []
    for domain in ('Page', 'Runtime', 'Log'):
      self.call(f'{domain}.enable')

  def call(self, method, **params):
    """A command of the protocol; its result."""
    self._number += 1
    self._socket.send(
      json.dumps({'id': self._number, 'method': method, 'params': params})
    )
    while True:
      told = json.loads(self._socket.recv(timeout=60))
      if told.get('id') == self._number:
        assert 'error' not in told, told
        return told['result']
      if told.get('method') == 'Runtime.exceptionThrown':
        self.complaints.append(json.dumps(told['params'])[:2000])
      if told.get('method') == 'Log.entryAdded':
        entry = told['params']['entry']
        if entry['level'] == 'error':
          self.complaints.append(entry['text'])

  def evaluate(self, expression):
    """The value of an expression of JavaScript, promises waited for."""
    told = self.call(
      'Runtime.evaluate',
      expression=expression,
      awaitPromise=True,
      returnByValue=True,
      userGesture=True,
    )
    assert 'exceptionDetails' not in told, told['exceptionDetails']
    return told['result'].get('value')

  def wait_until(self, expression, seconds=60.0):
    """Returns the first value that is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
      if value := self.evaluate(expression):
        return value
      time.sleep(0.05)
    raise TimeoutError(
      f'{expression} stayed false for {seconds} s; the page says '
      f'{self.evaluate("document.body.innerText")[:500]!r} and '
      f'{self.complaints}'
    )

  def screenshot(self, path):
    """Writes what the tab shows as PNG."""
    told = self.call('Page.captureScreenshot', format='png')
    pathlib.Path(path).write_bytes(base64.b64decode(told['data']))


@contextlib.contextmanager
def opened(url, *, downloads, width=1240, height=840):
  """A tab at an address.

  Args:
    url: to open.
    downloads: folder for them.
    width: of the window.
    height: likewise.
  """
  with tempfile.TemporaryDirectory(
    prefix='chromium-', ignore_cleanup_errors=True
  ) as profile:
    process = subprocess.Popen(
      [
        *(find(), '--headless=new', '--no-sandbox', '--disable-gpu'),
        *('--disable-dev-shm-usage', '--no-first-run', '--mute-audio'),
        *('--disable-background-networking', '--disable-extensions'),
        f'--user-data-dir={profile}',
        '--remote-debugging-port=0',
        f'--window-size={width},{height}',
        'about:blank',
      ],
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    try:
      port = _port(pathlib.Path(profile) / 'DevToolsActivePort')
      with urllib.request.urlopen(f'http://127.0.0.1:{port}/json/list') as got:
        tabs = json.load(got)
      address = next(
        tab['webSocketDebuggerUrl'] for tab in tabs if tab['type'] == 'page'
      )
      with connect(address, max_size=None, compression=None) as socket:
        page = Page(socket)
        page.call(
          'Browser.setDownloadBehavior',
          behavior='allow',
          downloadPath=str(downloads),
        )
        page.call('Page.navigate', url=url)
        page.wait_until('window.live && live.hello')
        yield page
    finally:
      process.terminate()
      try:
        process.wait(10)
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _port(file, seconds=60.0):
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    if file.exists() and (lines := file.read_text().split()):
      return int(lines[0])
    time.sleep(0.1)
  raise TimeoutError('the browser opened no port')
