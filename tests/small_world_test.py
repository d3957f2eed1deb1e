"""The small worlds are test beds: the rest of the code does not know them."""

import ast
import pathlib
import re

import pytest

from hiar_jax.configs import bouncing, bouncing_smoke

_ROOT = pathlib.Path(__file__).parents[1]
# What they are made of.
_OWN = (
  *('configs/bouncing', 'hiar_jax/data/bouncing', 'hiar_jax/evaluation/bou'),
  *(
    'configs/study',
    'configs/drifting',
    'hiar_jax/data/drifting',
    'hiar_jax/evaluation/drif',
  ),
)
# The second one has a plain word for a name: as a module or a config alone.
_WORLDS = re.compile(r'bouncing|(^|[./:])drifting(_\w+)?([./:]|$)', re.I)
# Pages of help show a command that can be typed at once.
_EXAMPLES = {'hiar_jax/__main__.py': 'hiar-jax generate --config=bouncing'}
_FILES = [
  path.relative_to(_ROOT).as_posix()
  for folder in ('hiar_jax', 'launch', 'configs')
  for path in sorted((_ROOT / folder).rglob('*.py'))
]


def _names(source: str) -> list[str]:
  """Lines of code, docstrings and comments apart, that name a world."""
  tree = ast.parse(source)
  docstrings = {
    id(node.body[0].value)
    for node in ast.walk(tree)
    if isinstance(
      node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    )
    and ast.get_docstring(node) is not None
  }
  found = []
  for node in ast.walk(tree):
    words = []
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
      words = [] if id(node) in docstrings else [node.value]
    elif isinstance(node, ast.alias):
      words = [node.name, node.asname or '']
    elif isinstance(node, ast.ImportFrom):
      words = [node.module or '']
    elif isinstance(node, ast.Name):
      words = [node.id]
    elif isinstance(node, ast.Attribute):
      words = [node.attr]
    elif isinstance(node, ast.FunctionDef | ast.ClassDef):
      words = [node.name]
    found += [word for word in words if _WORLDS.search(word)]
  return found


@pytest.mark.parametrize(
  'file', [file for file in _FILES if not file.startswith(_OWN)]
)
def test_no_other_code_names_a_small_world(file):
  example = _EXAMPLES.get(file)
  found = _names((_ROOT / file).read_text())
  assert not [word for word in found if not example or example not in word]


def test_a_planted_name_is_found():
  for line in (
    'from hiar_jax.data import bouncing',
    'import hiar_jax.data.bouncing as data',
    'from hiar_jax.data.bouncing import render',
    "source = 'bouncing'",
    'x = evaluation_bouncing.score()',
    'x = data.bouncing',
    'class BouncingVideos: pass',
    'from hiar_jax.data import drifting',
    'from hiar_jax.evaluation import drifting_frames',
    "source = 'drifting'",
    "base = 'drifting:distill'",
  ):
    assert _names(line), line
  assert not _names('"""Such as --config=bouncing."""\nx = 1  # bouncing')
  assert not _names("prompt = 'a disc drifting fast'\n_DRIFTING = prompt")


def test_their_own_files_are_few():
  own = [file for file in _FILES if file.startswith(_OWN)]
  assert own == [
    'hiar_jax/data/bouncing.py',
    'hiar_jax/data/bouncing_words.py',
    'hiar_jax/data/drifting.py',
    'hiar_jax/evaluation/bouncing.py',
    'hiar_jax/evaluation/bouncing_frames.py',
    'hiar_jax/evaluation/drifting.py',
    'hiar_jax/evaluation/drifting_frames.py',
    'configs/bouncing.py',
    'configs/bouncing_linear.py',
    'configs/bouncing_lora.py',
    'configs/bouncing_smoke.py',
    'configs/drifting.py',
    'configs/study.py',
  ]


@pytest.mark.parametrize('phase', bouncing_smoke.PHASES)
def test_a_first_try_touches_no_folder_of_the_real_training(phase):
  c, real = (
    config.get_config(phase).to_json_best_effort()
    for config in (bouncing_smoke, bouncing)
  )
  assert 'runs/bouncing/' in real and 'runs/bouncing/' not in c
  assert c.count('runs/bouncing_smoke/') == real.count('runs/bouncing/')
