"""The race beside PyTorch runs, and both sides make the same latents."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parents[2]
_FILE = _ROOT / 'benchmarks' / 'torch_race.py'


def race(*flags):
  return subprocess.run(
    [sys.executable, _FILE, *flags],
    cwd=_ROOT,
    env=os.environ
    | {'PYTHONPATH': os.pathsep.join([str(_ROOT), *filter(None, sys.path)])},
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.slow
@pytest.mark.skipif(
  not hasattr(os, 'sched_setaffinity'), reason='pins processes: Linux only'
)
def test_both_sides_make_the_same_latents():
  pytest.importorskip('torch')
  done = race('--size=tiny', '--num_blocks=2', '--repetitions=1')
  assert done.returncode == 0, done.stderr[-3000:]
  assert 'a stand-in of our own' in done.stdout
  rows = re.findall(r'^\| (\w+) \| \w+_first \|.* (\S+) of', done.stdout, re.M)
  assert [name for name, _ in rows] == 2 * [
    *('step_first', 'block_first', 'stream_serial')
  ]
  assert max(float(apart) for _, apart in rows) < 2e-5


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
  done = race(f'--official={tmp_path}')
  assert done.returncode == 2
  assert 'has no wan/modules/causal_model.py' in done.stderr
