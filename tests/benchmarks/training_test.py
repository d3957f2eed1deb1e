"""The benchmark of training runs two versions and compares them."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests import tiny

_ROOT = pathlib.Path(__file__).parents[2]
_PROGRAM = _ROOT / 'benchmarks' / 'training.py'


def run(*arguments):
  return subprocess.run(
    [sys.executable, _PROGRAM, *arguments],
    env=os.environ | {'PYTHONPATH': str(_ROOT), 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.slow
def test_a_version_beside_itself(tmp_path):
  tiny.write_inputs(tmp_path)
  config = f'{_ROOT / "tests" / "tiny.py"}:student_start,{tmp_path}'
  done = run(
    *(f'--config={config}', f'--against={_ROOT}', '--repetitions=2'),
    f'--compare={tmp_path}',
  )
  assert done.returncode == 0, done.stderr
  *_, this, against, ratio, ema, net = done.stdout.splitlines()
  assert ema.startswith('ema: 0.0e+00 apart after moves of ')
  assert net.startswith('net.params: 0.0e+00 apart after moves of ')
  assert this.startswith('this ') and against.startswith('against ')
  assert 0.1 < float(re.fullmatch(r'this / against: (.*)', ratio)[1]) < 10


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
  done = run('--config=none.py', f'--against={tmp_path}')
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1].endswith('has no folder hiar_jax')
