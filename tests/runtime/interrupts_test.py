"""Ctrl-C and SIGTERM, wherever they strike, end a program with one status."""

import json
import subprocess
import sys

import pytest

_PROGRAMS = {
  'plain': """
os.kill(os.getpid(), signal.SIGINT)
print('lives on')
""",
  # As in jax's callback of the garbage collector.
  'dropped': """
try:
  os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
  pass
time.sleep(20)
print('lives on')
""",
  # As where C++ compares static arguments.
  'turned into another error': """
try:
  os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
  raise ValueError('metadata fields are not hashable')
""",
  'while cleaning up': """
try:
  os.kill(os.getpid(), signal.SIGINT)
finally:
  time.sleep(0.8)
  print('cleaned up')
""",
  'dropped at the end': """
try:
  os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
  pass
""",
  'asked to end': """
try:
  os.kill(os.getpid(), signal.SIGTERM)
finally:
  print('cleaned up')
""",
  'noted by the program': """
signal.signal(signal.SIGINT, lambda *unused: None)
os.kill(os.getpid(), signal.SIGINT)
print('went on')
""",
}
_DRIVER = """
import json, os, signal, sys, tempfile, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from hiar_jax.runtime import errors
found = {}
for name, body in json.loads(sys.argv[1]).items():
  with tempfile.TemporaryFile('w+') as out:
    pid = os.fork()
    if not pid:
      os.dup2(out.fileno(), 1)
      os.dup2(out.fileno(), 2)
      sys.argv = ['program']
      errors.run_main(lambda argv: exec(body, globals()))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    out.seek(0)
    found[name] = [status, out.read()]
print(json.dumps(found))
"""


@pytest.fixture(scope='module')
def ends():
  done = subprocess.run(
    [
      *(sys.executable, '-W', 'ignore', '-c', _DRIVER),
      json.dumps(_PROGRAMS),
    ],
    capture_output=True,
    text=True,
    check=True,
  )
  return json.loads(done.stdout)


@pytest.mark.parametrize(
  ('name', 'status', 'output'),
  [
    ('plain', 130, 'interrupted\n'),
    ('dropped', 130, 'interrupted\n'),
    ('turned into another error', 130, 'interrupted\n'),
    ('while cleaning up', 130, 'cleaned up\ninterrupted\n'),
    ('dropped at the end', 130, 'interrupted\n'),
    ('asked to end', 143, 'cleaned up\nterminated\n'),
    ('noted by the program', 0, 'went on\n'),
  ],
)
def test_a_signal_ends_a_program(ends, name, status, output):
  assert ends[name] == [status, output]


def test_a_signal_while_modules_are_imported_is_no_traceback():
  code = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
def run_module(*unused, **unused_too):
  try:
    os.kill(os.getpid(), signal.SIGINT)
  except KeyboardInterrupt:
    raise ImportError('a module that is half imported')
runpy.run_module = run_module
from hiar_jax import __main__
sys.argv = ['hiar-jax', 'generate']
__main__.main()
"""
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=False
  )
  assert (done.returncode, done.stderr) == (130, 'interrupted\n')
