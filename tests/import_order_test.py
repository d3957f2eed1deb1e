"""Rooms and the arrows between them, and what every file keeps to."""

import ast
import pathlib
import re
import sys

import pytest

_ROOT = pathlib.Path(__file__).parents[1]

# Rooms, and the three files of the method. Each may import from those above its
# own row and from itself, never from beside or below it.
_ROWS = (
  ('noise_schedule', 'runtime'),
  ('models',),
  ('denoiser',),
  ('weights',),
  ('rollout', 'text'),
  ('codecs', 'data'),
  ('evaluation',),
  ('sampling',),
  ('training',),
  ('planning', 'serving'),
)
_ROW = {room: row for row, rooms in enumerate(_ROWS) for room in rooms}
_MOST_ENTRIES = 17

# Distribution names where they are not the import's.
_DISTRIBUTION = {
  'IPython': 'ipython',
  'PIL': 'pillow',
  'absl': 'absl-py',
  'array_record': 'array-record',
  'imageio_ffmpeg': 'imageio-ffmpeg',
  'ml_collections': 'ml-collections',
  'ml_dtypes': 'ml-dtypes',
  'orbax': 'orbax-checkpoint',
  'tensorboardX': 'tensorboardx',
}

_LIBRARY = sorted((_ROOT / 'hiar_jax').rglob('*.py'))


def _name(path: pathlib.Path) -> str:
  """'models.rope' of hiar_jax/models/rope.py, '' of hiar_jax/__init__.py."""
  parts = path.relative_to(_ROOT / 'hiar_jax').with_suffix('').parts
  return '.'.join(part for part in parts if part != '__init__')


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


def _wrong_arrows(name: str, source: str) -> list[str]:
  """What a module of the library may not import, of what it does."""
  room = name.partition('.')[0]
  wrong = []
  for imported in sorted(_imports(source)):
    top, _, inner = imported.partition('.')
    other = inner.partition('.')[0]
    if top != 'hiar_jax' or (other == room and '.' in name):
      continue
    if not other or _ROW.get(other, len(_ROWS)) >= _ROW[room]:
      wrong.append(f'{name} imports {imported}')
  return wrong


def test_every_entry_of_the_package_is_a_room_and_they_are_few():
  entries = {p.stem for p in (_ROOT / 'hiar_jax').iterdir()} - {'__pycache__'}
  assert entries - {'__init__', '__main__', 'py'} == _ROW.keys()
  assert len(entries) <= _MOST_ENTRIES


@pytest.mark.parametrize('path', _LIBRARY, ids=_name)
def test_imports_point_one_way(path):
  if path.parent != _ROOT / 'hiar_jax' or path.stem in _ROW:
    assert _wrong_arrows(_name(path), path.read_text()) == []


def test_a_planted_wrong_import_is_found():
  for line in (
    'from hiar_jax import rollout',
    'from hiar_jax.rollout import denoise',
    'import hiar_jax.rollout as r',
    'def f():\n  from hiar_jax import rollout',
    'from hiar_jax.weights import tables',
    'import hiar_jax',
    'from hiar_jax import load',
  ):
    assert _wrong_arrows('models.rope', line), line
    if 'weights' not in line:
      assert _wrong_arrows('denoiser', line), line
  assert not _wrong_arrows('denoiser', 'from hiar_jax import noise_schedule')
  assert not _wrong_arrows('models.vae', 'from hiar_jax.models import config')


def test_modules_of_a_room_import_each_other_in_no_circle():
  names = {_name(path) for path in _LIBRARY}
  waits = {}
  for path in _LIBRARY:
    inner = {i.partition('.')[2] for i in _imports(path.read_text())}
    modules = {
      next((m for m in (i, i.rpartition('.')[0]) if m in names), None)
      for i in inner
    }
    waits[_name(path)] = modules - {None, _name(path), ''}
  waits.pop('', None)
  while free := [name for name, others in waits.items() if not others]:
    for name in free:
      del waits[name]
    for others in waits.values():
      others -= set(free)
  assert not waits, f'a circle, or behind one: {sorted(waits)}'


def test_a_room_is_introduced_by_a_docstring_and_hands_on_no_names():
  for path in (_ROOT / 'hiar_jax').glob('*/__init__.py'):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), path
    assert len(tree.body) == 1, path


def test_library_imports_neither_launch_nor_configs():
  for path in _LIBRARY:
    tops = {name.partition('.')[0] for name in _imports(path.read_text())}
    assert not tops & {'launch', 'configs', 'tests'}, path


def test_no_module_outgrows_500_lines():
  long = {
    _name(path): count
    for path in _LIBRARY
    if (count := path.read_text().count('\n')) > 500
  }
  assert not long


def test_every_imported_package_is_declared_in_setup():
  setup = (_ROOT / 'setup.py').read_text()
  declared = set(re.findall(r"'([a-z][a-z0-9_-]*)[><=]", setup))
  files = [*_LIBRARY]
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
