"""The watch over a stream's memory passes a flat one and sees a leak."""

import mmap
import pathlib
import subprocess
import sys

import pytest

from tests.sampling import endless_stream

_PROGRAM = pathlib.Path(__file__).with_name('endless_stream.py')


@pytest.mark.slow
def test_300_blocks_stream_with_flat_memory():
  done = subprocess.run(
    [
      *(sys.executable, _PROGRAM, '--num_blocks=300', '--every=100'),
      '--bound_mib=8',
    ],
    cwd=_PROGRAM.parents[1],
    env={'PYTHONPATH': str(_PROGRAM.parents[1]), 'PATH': ''},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  lines = done.stdout.splitlines()
  assert [line.split()[0] for line in lines[1:-1]] == ['100', '200', '300']


def test_a_leak_is_seen(capsys):
  kept = []

  def leaking():
    while True:
      # Fresh pages: the heap may have room from earlier tests.
      kept.append(mmap.mmap(-1, 2**20))
      kept[-1].write(bytes(2**20))
      yield

  growth = endless_stream.watch(leaking(), num_blocks=60, every=20, bound_mib=8)
  assert growth > 30
  assert 'the bound is 8 MiB' in capsys.readouterr().out
