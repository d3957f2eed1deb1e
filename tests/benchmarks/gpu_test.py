"""The benchmark of the full-size networks runs, at the smallest size."""

import argparse
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import gpu

_ROOT = pathlib.Path(__file__).parents[2]


def test_flops_of_a_pass_are_proportional_to_its_layers():
  size = gpu._sizes()['tiny']
  counted = gpu._pass_flops(size)
  model, window = size.transformer, size.window * size.transformer.dim
  tokens = 3 * model.tokens_per_frame
  rows = 2 * model.num_layers * tokens
  products = rows * (6 * model.dim**2 + 2 * model.dim * model.ffn_dim)
  scores = 2 * rows * window * model.tokens_per_frame
  # It also counts what goes element by element: much, at this width.
  assert products + scores < counted < 4 * (products + scores)


@pytest.mark.parametrize('case', ['attention:chunked', 'text'])
def test_a_case_gives_its_columns(case):
  options = argparse.Namespace(
    size='tiny', attention='auto', num_blocks=2, repetitions=2
  )
  found = gpu._measure(case, options)
  assert found['s'] > 0 and found['TFLOP/s'] > 0 and found['GiB'] > 0


@pytest.mark.slow
def test_the_benchmark_prints_a_line_for_every_case():
  done = subprocess.run(
    [
      *(sys.executable, _ROOT / 'benchmarks' / 'gpu.py', '--size=tiny'),
      *('--num_blocks=2', '--repetitions=1'),
    ],
    cwd=_ROOT,
    env=os.environ | {'PYTHONPATH': str(_ROOT), 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  first, header, *lines, device = done.stdout.splitlines()
  assert first == 'size tiny, 2 blocks, attention auto, medians of 1'
  assert header.split()[0] == 'case' and device == 'device: cpu'
  assert [line.split()[0] for line in lines] == list(gpu._CASES)
  assert not any('failed' in line for line in lines)
