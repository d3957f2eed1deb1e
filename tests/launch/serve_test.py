"""`hiar-jax serve` at the command line: what it refuses, and how it ends."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

from tests.serving import running

_ROOT = pathlib.Path(__file__).parents[2]


def _run(*flags, **environment):
  return subprocess.run(
    [sys.executable, '-m', 'hiar_jax', 'serve', *flags],
    cwd=_ROOT,
    env={**os.environ, **environment},
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
  )


def test_others_are_not_let_in_without_a_token():
  done = _run('--host=0.0.0.0', '--port=0')
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1] == (
    'error: --host=0.0.0.0 lets others in: give a --token that they must show'
  )


def test_a_port_that_is_taken_is_told():
  with socket.socket() as taken:
    taken.bind(('127.0.0.1', 0))
    taken.listen()
    port = taken.getsockname()[1]
    done = _run(f'--port={port}')
  assert done.returncode == 2
  assert f'error: cannot listen on 127.0.0.1:{port}' in done.stderr
  assert 'Traceback' not in done.stderr


@pytest.mark.slow
def test_sigterm_ends_it_while_it_compiles():
  server = running.Server('-m', 'hiar_jax', 'serve', '--port=0')
  try:
    assert server.url
    assert server.stop(signal.SIGTERM) == 0
    assert not any('Traceback' in line for line in server.output)
  finally:
    server.close()
