"""The benchmark of the full-size networks runs, at the smallest size."""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import gpu, gpu_programs

_ROOT = pathlib.Path(__file__).parents[2]


def test_flops_of_a_pass_are_proportional_to_its_layers():
  size = gpu_programs.sizes()['tiny']
  counted = gpu_programs.pass_flops(size)
  model, window = size.transformer, size.window * size.transformer.dim
  tokens = 3 * model.tokens_per_frame
  rows = 2 * model.num_layers * tokens
  products = rows * (6 * model.dim**2 + 2 * model.dim * model.ffn_dim)
  scores = 2 * rows * window * model.tokens_per_frame
  # It also counts what goes element by element: much, at this width.
  assert products + scores < counted < 4 * (products + scores)


@pytest.mark.parametrize(
  'case', ['attention:chunked', 'text', 'protocol:none', 'critic']
)
def test_a_case_gives_its_columns(case):
  options = argparse.Namespace(
    size='tiny', attention='auto', num_blocks=2, repetitions=2
  )
  found = gpu._measure(case, options)
  assert found['s'] > 0 and found['TFLOP/s'] > 0 and found['GiB'] > 0


def test_the_kernel_is_compared_with_all_scores_held():
  options = argparse.Namespace(
    size='tiny', attention='auto', num_blocks=2, repetitions=1
  )
  # In chunks here, and in 16 bits.
  assert 0 <= gpu._measure('numerics', options)['error'] < 0.05


# Runs a program where some packages cannot be imported.
_WITHOUT = """
import runpy, sys
class Blocked:
  names = set(sys.argv[1].split(','))
  def find_spec(self, name, path=None, target=None):
    if name.partition('.')[0] in self.names:
      raise ModuleNotFoundError(f'{name} is not installed')
sys.meta_path.insert(0, Blocked())
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""
_BARE = (
  'imageio_ffmpeg,grain,array_record,portpicker,PIL,orbax,optax,tqdm,scipy'
)


@pytest.mark.parametrize('case', ['protocol:none', 'stream_serial:tiny'])
def test_a_case_runs_without_the_packages_that_it_does_not_use(case):
  done = _run(
    *(sys.executable, '-c', _WITHOUT, _BARE, _ROOT / 'benchmarks' / 'gpu.py'),
    *('--size=tiny', '--num_blocks=2', '--repetitions=1', f'--worker={case}'),
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert '"device": "cpu"' in done.stdout.splitlines()[-1]


def test_what_the_time_does_not_allow_is_skipped_and_said(tmp_path):
  done = _run(
    *(sys.executable, _ROOT / 'benchmarks' / 'gpu.py', '--size=tiny'),
    *('--cases=numerics', '--minutes=0', f'--json={tmp_path / "out.json"}'),
  )
  assert done.returncode == 1
  assert 'numerics                skipped: no time left' in done.stdout
  found = json.loads((tmp_path / 'out.json').read_text())
  assert found['cases'] == {'numerics': 'skipped: no time left'}
  assert found['machine'].startswith('Python 3.')


def test_the_process_that_starts_the_cases_loads_no_jax():
  done = _run(
    *(sys.executable, '-c', _WITHOUT, 'jax,hiar_jax'),
    *(_ROOT / 'benchmarks' / 'gpu.py', '--size=tiny', '--minutes=0'),
  )
  # It would hold a part of the GPU's memory.
  assert 'skipped: no time left' in done.stdout, done.stderr[-3000:]


def _run(*command):
  return subprocess.run(
    command,
    cwd=_ROOT,
    env=os.environ | {'PYTHONPATH': str(_ROOT), 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.slow
def test_the_benchmark_prints_a_line_for_every_case():
  done = _run(
    *(sys.executable, _ROOT / 'benchmarks' / 'gpu.py', '--size=tiny'),
    *('--num_blocks=2', '--repetitions=1'),
  )
  assert done.returncode == 0, done.stderr[-3000:]
  first, machine, header, *lines, device = done.stdout.splitlines()
  assert first == 'size tiny, 2 blocks, attention auto, medians of 1'
  assert machine.startswith('Python')
  assert header.split()[0] == 'case' and device == 'device: cpu'
  assert [line.split()[0] for line in lines] == list(gpu._CASES)
  assert not any('failed' in line or 'skipped' in line for line in lines)
