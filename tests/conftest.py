"""What every test runs under: eight CPU devices, float32 that is float32.

No compilation cache is set, so that a test compiles what it tests; jax reads
JAX_COMPILATION_CACHE_DIR by itself for whoever wants one at the desk.
"""

import functools
import importlib.util
import os
import pathlib

import jax
import numpy as np
import pytest

if importlib.util.find_spec('hiar_jax.configs') is None:
  # An editable installation knows the folders of the day it was made.
  pytest.exit("hiar_jax.configs is not installed: pip install -e '.[test]'", 2)

# Before the first array: the number of devices is fixed with the backend.
jax.config.update('jax_platforms', 'cpu')
os.environ['JAX_PLATFORMS'] = 'cpu'  # For child processes.
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_default_matmul_precision', 'highest')
# Most of the tests' time is compilation. Without XLA's polish, and with fusions
# written as LLVM at once rather than through MLIR, it takes a quarter; the
# programs are slower and mean the same. By the environment: child processes
# inherit it. jaxlib is never newer than jax; from 0.11.1 on it knows no such
# flag, and ends the process over one that it does not know.
if jax.__version_info__ < (0, 11, 1):
  os.environ.setdefault('XLA_FLAGS', '--xla_cpu_use_fusion_emitters=false')
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
# Programs that somebody's earlier run has left are none of a test's.
os.environ['HIAR_JAX_COMPILATION_CACHE'] = 'off'
jax.config.update('jax_disable_most_optimizations', True)

_GOLDEN = pathlib.Path(__file__).parent / 'golden'


@functools.cache
def _load_golden(name: str) -> dict[str, np.ndarray]:
  path = _GOLDEN / f'{name}.npz'
  if not path.exists():
    stored = sorted(p.stem for p in _GOLDEN.glob('*.npz'))
    raise ValueError(f'no golden file {name!r}; stored are {stored}')
  with np.load(path) as arrays:
    golden = {key: arrays[key] for key in arrays.files}
  for array in golden.values():
    array.flags.writeable = False  # Shared by every test of the process.
  return golden


@pytest.fixture(scope='session')
def golden():
  """A loader: golden('scheduler') -> {name: array} of golden/scheduler.npz."""
  return _load_golden
