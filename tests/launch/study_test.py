"""The study is one command, from nothing to its report, and goes on."""

import json
import pathlib
import signal
import subprocess
import sys
import time
from xml.etree import ElementTree

import pytest

_ROOT = pathlib.Path(__file__).parents[2]
_CONFIG = _ROOT / 'tests' / 'tiny_study.py'


def _command(root, *flags):
  return [
    *(sys.executable, '-m', 'hiar_jax', 'study'),
    f'--config={_CONFIG}:study,{root}',
    *flags,
  ]


def _run(root, *flags):
  return subprocess.run(
    _command(root, *flags), cwd=root, capture_output=True, text=True
  )


@pytest.mark.slow
def test_a_study_that_was_killed_goes_on_and_says_what_is_missing(tmp_path):
  process = subprocess.Popen(
    _command(tmp_path, '--arms=codec,A,B', '--seeds=0'), cwd=tmp_path
  )
  first = tmp_path / 'study' / 'measured' / 'A-0-4b0.json'
  while not first.exists():
    assert process.poll() is None
    time.sleep(0.1)
  process.send_signal(signal.SIGKILL)
  process.wait()
  weights = tmp_path / 'study' / 'A-0' / 'weights.safetensors'
  before = weights.stat().st_mtime_ns, first.stat().st_mtime_ns

  done = _run(tmp_path, '--arms=codec,A,B', '--seeds=0')
  assert done.returncode == 0, done.stderr
  assert (weights.stat().st_mtime_ns, first.stat().st_mtime_ns) == before
  report = json.loads((tmp_path / 'study' / 'report.json').read_text())
  assert report['missing'] == []
  assert {row['arm'] for row in report['rows']} == {'codec', 'A', 'B'}
  assert len(report['rows']) == 9
  drawn = ElementTree.parse(tmp_path / 'study' / 'curves.svg').getroot()
  assert len(drawn.findall('{http://www.w3.org/2000/svg}svg')) == 4

  done = _run(tmp_path, '--report')
  assert done.returncode == 0, done.stderr
  report = json.loads((tmp_path / 'study' / 'report.json').read_text())
  assert 'D seed 1 8b1' in report['missing']
  assert 'B seed 0 4b0' not in report['missing']
  # The teacher makes videos of one length.
  assert 'teacher seed 0 4b0' in report['missing']
  assert 'teacher seed 0 8b0' not in report['missing']


def test_an_arm_that_there_is_not_is_refused_before_long_work(tmp_path):
  done = _run(tmp_path, '--arms=A,Z')
  assert done.returncode == 2
  assert done.stderr.startswith("error: ['Z'] are not arms: ['A', 'B',")
  assert not list(tmp_path.iterdir())
