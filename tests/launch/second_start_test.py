"""The second run of a command finds its programs compiled, and is the same."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def _generate(out, **variables):
  """Runs the program; the seconds of its own account by name."""
  environment = {
    k: v for k, v in os.environ.items() if 'CACHE' not in k
  } | variables
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'hiar_jax', 'generate', '--config=bouncing'),
      *('--prompt=a large red disc on grey', '--num_blocks=2'),
      f'--out={out}',
    ],
    cwd=_ROOT,
    env=environment | {'PYTHONPATH': str(_ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return dict(re.findall(r'(\w+) ([\d.]+)', done.stdout.splitlines()[-1]))


def test_a_second_start_makes_the_same_video_and_compiles_less(tmp_path):
  home = str(tmp_path / 'home')
  off = _generate(
    tmp_path / 'off.mp4', XDG_CACHE_HOME=home, HIAR_JAX_COMPILATION_CACHE='off'
  )
  assert not (tmp_path / 'home').exists()
  _generate(tmp_path / 'first.mp4', XDG_CACHE_HOME=home)
  programs = {
    p.name for p in (tmp_path / 'home/hiar_jax/programs').glob('*-cache')
  }
  second = _generate(tmp_path / 'second.mp4', XDG_CACHE_HOME=home)
  assert programs == {
    p.name for p in (tmp_path / 'home/hiar_jax/programs').glob('*-cache')
  }
  videos = [
    (tmp_path / f'{name}.mp4').read_bytes()
    for name in ('off', 'first', 'second')
  ]
  assert videos[0] == videos[1] == videos[2]
  assert float(second['compile']) < float(off['compile'])
