"""The page that a program's --help shows: its docstring and its own flags.

absl's own page has the flags of jax and of absl in it too, says what they are
for in one wide line each, and ends with status 1 as if something were wrong.
"""

import sys
import textwrap
from collections.abc import Sequence

from absl import flags

_WORDS = ('-h', '-help', '--help', '--helpfull', '--helpshort')
_WIDTH = 80


def is_wanted(argv: Sequence[str]) -> bool:
  """Whether a command line asks for help; what is behind `--` does not."""
  words = list(argv[1:])
  if '--' in words:
    words = words[: words.index('--')]
  return any(word in _WORDS for word in words)


def page(program: str) -> str:
  """What the program does, and its flags in the order of its file.

  Args:
    program: sys.argv[0], the name by which absl knows the flags of __main__.
  """
  own = [
    flag
    for module, defined in flags.FLAGS.flags_by_module_dict().items()
    if module == program or module.startswith('hiar_jax.')
    for flag in defined
  ]
  config = [flag for flag in own if flag.name == 'config']
  own = config + [flag for flag in own if flag not in config]
  doc = (sys.modules['__main__'].__doc__ or '').strip()
  return '\n\n'.join([doc, 'Flags:', *map(_entry, own)])


def _entry(flag: flags.Flag) -> str:
  text = ' '.join((flag.help or '').split())
  if isinstance(flag, flags.EnumFlag):
    text = text.partition('>: ')[2]  # absl's own <one|other> before it.
  if (
    flag.default_as_str is not None and not flag.boolean and flag.default != []
  ):
    default = flag.default_as_str.strip("'")
    text += f' [{default}]'
  indent = ' ' * 6
  wrapped = textwrap.fill(
    text, _WIDTH, initial_indent=indent, subsequent_indent=indent
  )
  return f'  {_spelling(flag)}\n{wrapped}'


def _spelling(flag: flags.Flag) -> str:
  if flag.boolean:
    return f'--[no]{flag.name}'
  if flag.name == 'config':
    return '--config=NAME'
  if isinstance(flag, flags.EnumFlag):
    return f'--{flag.name}={"|".join(flag.parser.enum_values)}'
  kind = {'string': 'TEXT', 'int': 'N', 'float': 'X'}
  value = kind.get(flag.flag_type(), 'VALUE')
  return f'--{flag.name}={value}'
