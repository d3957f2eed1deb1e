"""What is imported when: a library that is not used need not be installed."""

import ast
import os
import pathlib
import re
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_ON_DEMAND = (
  *('array_record', 'ftfy', 'grain', 'imageio_ffmpeg', 'orbax', 'tqdm'),
  *('scipy.ndimage', 'matplotlib', 'tensorflow', 'torch'),
)
_REFUSE = f"""
import sys

class Refuse:
  def find_spec(self, name, path=None, target=None):
    if any(f'{{name}}.'.startswith(f'{{n}}.') for n in {_ON_DEMAND!r}):
      raise ModuleNotFoundError(f'{{name}} is refused')

sys.meta_path.insert(0, Refuse())
"""


def _run(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, *arguments],
    cwd=_ROOT,
    env=os.environ | {'PYTHONPATH': str(_ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )


def _benchmark_imports() -> str:
  """The import statements of benchmarks/gpu.py."""
  tree = ast.parse((_ROOT / 'benchmarks' / 'gpu.py').read_text())
  imports = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
  assert len(imports) > 10
  return '\n'.join(map(ast.unparse, imports))


@pytest.mark.parametrize(
  'statements',
  [
    'import hiar_jax\nhiar_jax.load, hiar_jax.Video',
    'from hiar_jax.sampling import video_pipeline',
    _benchmark_imports(),
  ],
  ids=['package', 'video_pipeline', 'benchmark'],
)
def test_heavy_libraries_are_not_needed_until_they_are_used(statements):
  done = _run('-c', _REFUSE + statements)
  assert done.returncode == 0, done.stderr[-2000:]


def test_the_import_of_a_refused_library_fails():
  done = _run('-c', f'{_REFUSE}\nimport grain')
  assert 'ModuleNotFoundError: grain is refused' in done.stderr


def test_importing_the_package_takes_less_than_a_third_of_a_second():
  done = _run('-X', 'importtime', '-c', 'import hiar_jax')
  assert done.returncode == 0, done.stderr[-2000:]
  (own,) = re.findall(r'\| +(\d+) \| hiar_jax$', done.stderr, re.MULTILINE)
  assert int(own) < 300_000
  assert not re.search(r'\| +(jax|numpy|flax)$', done.stderr, re.MULTILINE)
