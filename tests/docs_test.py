"""What the pages say is there: files, functions, commands, configs, flags."""

import ast
import pathlib
import re
import shlex

import pytest

from hiar_jax import __main__ as console
from hiar_jax.runtime import config_flag

_ROOT = pathlib.Path(__file__).parents[1]
_PAGES = sorted([*_ROOT.glob('*.md'), *(_ROOT / 'docs').glob('*.md')])
_ARCHITECTURE = _ROOT / 'docs' / 'architecture.md'


def _name(path):
  return str(path.relative_to(_ROOT))


def _anchors(text):
  """Names by which a page's headings are linked to."""
  headings = re.findall(r'^#+ (.*)$', text, re.M)
  return {
    re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
    for heading in headings
  }


@pytest.mark.parametrize('page', _PAGES, ids=_name)
def test_links_lead_somewhere(page):
  text = page.read_text()
  # What stands in code is no link.
  prose = re.sub(r'```.*?```|`[^`]*`', '', text, flags=re.S)
  for target in re.findall(r'\]\(([^)\s]+)\)', prose):
    if target.startswith(('https://', 'http://')):
      continue
    name, _, anchor = target.partition('#')
    file = page.parent / name if name else page
    assert file.exists(), f'{_name(page)} links to {target}'
    if anchor:
      assert anchor in _anchors(file.read_text()), f'{_name(page)}: {target}'


def _functions(path):
  """'f', 'Class', 'Class.method' of a file."""
  names = set()
  for node in ast.parse(path.read_text()).body:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
      names.add(node.name)
    if isinstance(node, ast.ClassDef):
      names |= {
        f'{node.name}.{inner.name}'
        for inner in node.body
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)
      }
  return names


def test_every_function_of_the_architecture_exists():
  named = re.findall(r'`([\w/]+\.py):([\w.]+)`', _ARCHITECTURE.read_text())
  assert len(named) > 30
  missing = []
  for file, function in named:
    top = _ROOT if file.startswith('launch/') else _ROOT / 'hiar_jax'
    path = top / file
    if not path.is_file() or function not in _functions(path):
      missing.append(f'{file}:{function}')
  assert not missing


def test_the_tree_of_the_architecture_is_that_of_the_package():
  tree = _ARCHITECTURE.read_text().split('```')[1]
  named = re.findall(r'^  ([\w/.]+)  ', tree, re.M)
  there = {
    f'{path.name}/' if path.is_dir() else path.name
    for path in (_ROOT / 'hiar_jax').iterdir()
    if path.name != '__pycache__'
  }
  assert sorted(named) == sorted(
    there - {'__init__.py', '__main__.py', 'py.typed'}
  )


def _commands():
  """(page, program, arguments) of every command in a fenced block."""
  for page in _PAGES:
    blocks = re.findall(r'^ *```\S*\n(.*?)```', page.read_text(), re.M | re.S)
    for line in '\n'.join(blocks).replace('\\\n', ' ').splitlines():
      if found := re.match(r' *(?:\$ )?hiar-jax ([a-z].*)', line):
        words = shlex.split(found[1], comments=True)
        command, arguments = console._split(words)
        yield page, command.program, arguments
      if found := re.match(r' *(?:\$ )?python launch/(\w+)\.py (.*)', line):
        yield page, found[1], shlex.split(found[2], comments=True)


def _flags_of(program):
  """Flags that the source of a program defines, and --config."""
  source = (_ROOT / 'launch' / f'{program}.py').read_text()
  for module in re.findall(r'(\w+)\.define_flags\(\)', source):
    source += (_ROOT / 'hiar_jax' / 'runtime' / f'{module}.py').read_text()
  if 'FolderFlags()' in source:
    source += (
      _ROOT / 'hiar_jax' / 'evaluation' / 'folder_flags.py'
    ).read_text()
  if re.search(r'\b(Choice|Held)Flags\(\)', source):
    choices = _ROOT / 'hiar_jax' / 'sampling' / 'choice_flags.py'
    source += choices.read_text()
    # Those of whole numbers are rows of a table there.
    source = re.sub(
      r"^ *\('(\w+)', '", r"DEFINE_integer('\1'", source, flags=re.M
    )
  return {'config', *re.findall(r"DEFINE_\w+\(\s*'(\w+)'", source)}


def test_every_command_of_the_pages_can_be_typed():
  commands = list(_commands())
  assert len(commands) > 20
  for page, program, arguments in commands:
    known = _flags_of(program)
    for argument in arguments:
      flag, _, value = argument.partition('=')
      if not flag.startswith('--'):
        continue
      name = flag.removeprefix('--').partition('.')[0]
      assert name in known or name.removeprefix('no') in known, (page, argument)
      if flag == '--config' and '/' not in value and '.py' not in value:
        assert value.partition(':')[0] in config_flag.packaged(), argument


def test_the_readme_is_short_and_has_the_two_blocks_that_ci_runs():
  readme = (_ROOT / 'README.md').read_text()
  assert readme.count('\n') < 150
  first, second = re.findall(r'^```(?:ba)?sh\n(.*?)^```', readme, re.M | re.S)
  assert 'hiar-jax generate' in first and 'video.mp4' in first
  assert 'pytest' in second
