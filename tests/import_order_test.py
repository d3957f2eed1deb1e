"""Imports point one way, and every file of the library has its place."""

import ast
import pathlib
import re
import sys

import pytest

_ROOT = pathlib.Path(__file__).parents[1]

# A module may import from rows above its own, never from its own or below.
_LAYERS = (
  (
    *('errors', 'noise_schedule', 'worlds', 'metrics', 'models.config'),
    *('distributed', 'orbax_weights', 'safetensors_io', 'loop_config'),
    *('profiling', 'provenance', 'stopping', 'watchdog'),
  ),
  ('video_io', 'checkpoint', 'sharding', 'solvers', 'guards', 'run_log'),
  ('models.rope', 'models.kv_cache', 'models.vae_layers', 'models.convert'),
  ('models.attention', 'models.vae', 'models.umt5', 'models.foreign'),
  ('models.transformer', 'models.vae_convert'),
  ('models',),  # hiar_jax/models/__init__.py
  ('text', 'codecs', 'text_umt5', 'vae_codec', 'layouts', 'shard_files'),
  ('data', 'denoiser'),
  ('rollout', 'trajectory_files', 'releases', 'latent_files'),
  ('memory',),
  ('losses', 'trajectories', 'training_rollout', 'evaluation', 'sampling'),
  ('conversion',),
  ('pipeline', 'train_state', 'video', 'teacher_sampling'),
  ('shared_pipeline',),
  ('train_step', 'streaming', 'vae_training'),
  ('flops',),
  ('phases', 'generate', 'planning'),
  ('samples', 'planning_parts', 'planning_traffic', 'teacher_files'),
  ('train', 'planning_train'),
  ('',),  # hiar_jax/__init__.py
)
_LAYER = {name: row for row, names in enumerate(_LAYERS) for name in names}

# Distribution names where they are not the import's.
_DISTRIBUTION = {
  'PIL': 'pillow',
  'absl': 'absl-py',
  'array_record': 'array-record',
  'imageio_ffmpeg': 'imageio-ffmpeg',
  'ml_collections': 'ml-collections',
  'ml_dtypes': 'ml-dtypes',
  'orbax': 'orbax-checkpoint',
  'tensorboardX': 'tensorboardx',
}


def _module_name(path: pathlib.Path) -> str:
  """'models.rope' of hiar_jax/models/rope.py."""
  parts = path.relative_to(_ROOT / 'hiar_jax').with_suffix('').parts
  return '.'.join(part for part in parts if part != '__init__')


_LIBRARY = {
  _module_name(path): path
  for path in sorted((_ROOT / 'hiar_jax').rglob('*.py'))
}


def _imports(source: str) -> set[str]:
  """Every dotted name that a file imports, at the top or inside a function."""
  names = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'relative import in line {node.lineno}'
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  return names


def _library_imports(source: str) -> set[str]:
  """The hiar_jax modules among them: 'models.rope', never 'rope.rotate'."""
  modules = set()
  for name in _imports(source):
    top, _, inner = name.partition('.')
    if top != 'hiar_jax':
      continue
    while inner and inner not in _LAYER and inner not in _LIBRARY:
      inner = inner.rpartition('.')[0]
    modules.add(inner)
  return modules


def _wrong_arrows(name: str, source: str) -> list[str]:
  return [
    f'{name} imports {other}'
    for other in sorted(_library_imports(source))
    # An unplaced one has its own failure above.
    if _LAYER.get(other, -1) >= _LAYER[name]
  ]


def test_every_module_has_a_layer():
  unplaced = sorted(_LIBRARY.keys() - _LAYER.keys())
  assert not unplaced, f'give {unplaced} a row in _LAYERS'


@pytest.mark.parametrize('name', sorted(_LIBRARY.keys() & _LAYER.keys()))
def test_module_imports_only_from_layers_above(name):
  assert _wrong_arrows(name, _LIBRARY[name].read_text()) == []


def test_a_planted_wrong_import_is_found():
  for line in (
    'from hiar_jax import rollout',
    'from hiar_jax.rollout import denoise',
    'import hiar_jax.rollout as r',
    'def f():\n  from hiar_jax import rollout',
    'from hiar_jax import denoiser',
    'import hiar_jax',
  ):
    assert _wrong_arrows('denoiser', line), line
  assert not _wrong_arrows('denoiser', 'from hiar_jax import noise_schedule')
  assert not _wrong_arrows('denoiser', 'from hiar_jax.models import config')


def test_library_imports_neither_launch_nor_configs():
  for path in _LIBRARY.values():
    tops = {name.partition('.')[0] for name in _imports(path.read_text())}
    assert not tops & {'launch', 'configs', 'tests'}, path


def test_no_module_outgrows_500_lines():
  long = {
    name: count
    for name, path in _LIBRARY.items()
    if (count := path.read_text().count('\n')) > 500
  }
  assert not long


def test_every_imported_package_is_declared_in_setup():
  setup = (_ROOT / 'setup.py').read_text()
  declared = set(re.findall(r"'([a-z][a-z0-9_-]*)[><=]", setup))
  files = [*_LIBRARY.values()]
  for folder in ('configs', 'launch'):
    files += (_ROOT / folder).glob('*.py')
  own = {'hiar_jax', 'configs', 'launch'}
  for path in files:
    for name in _imports(path.read_text()):
      top = name.partition('.')[0]
      if top in own or top in sys.stdlib_module_names:
        continue
      package = _DISTRIBUTION.get(top, top)
      assert package in declared, f'{path.name} imports {top}'
