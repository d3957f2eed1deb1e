"""The benchmark runs, at the smallest size, in every kind of case."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(
  not hasattr(os, 'sched_setaffinity'), reason='pins processes: Linux only'
)
def test_the_benchmark_prints_a_line_for_every_case():
  cases = ['shared', 'stream_serial', 'fused', 'one_core', 'two_cores']
  done = subprocess.run(
    [
      *(sys.executable, _ROOT / 'benchmarks' / 'pipeline.py'),
      *('--size=tiny', '--num_blocks=2', '--window=6', '--repetitions=1'),
      f'--cases={",".join(cases)}',
    ],
    cwd=_ROOT,
    env=os.environ | {'PYTHONPATH': str(_ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  lines = done.stdout.splitlines()
  assert lines[0].endswith('size tiny, 2 blocks, window 6, 1 repetitions')
  assert [line.split()[:2] for line in lines[-5:]] == [
    *(['shared', '10'], ['stream_serial', '16'], ['fused', '16']),
    *(['one_core', '8'], ['two_cores', '8']),
  ]
  assert re.search(r'[\d.]+ x one_core$', lines[-1])
