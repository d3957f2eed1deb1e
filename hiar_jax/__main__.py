"""The console program `hiar-jax`: a program of launch/ for each command.

Imports nothing but the command's own program, so that help costs no time.
"""

import difflib
import importlib.util
import os
import runpy
import sys
import textwrap
from typing import NamedTuple, NoReturn

from hiar_jax.runtime import config_flag, interrupts


class Command(NamedTuple):
  """What `hiar-jax NAME` runs.

  name: one word, or two.
  program: the module in launch/.
  says: what it does, in one line.
  flags: given to the program before those of the command line.
  """

  name: str
  program: str
  says: str
  flags: tuple[str, ...] = ()


# By what a person comes for.
COMMANDS = {
  'Make videos': (
    Command('generate', 'generate', 'videos from prompts, each a file'),
    Command(
      'stream',
      'generate',
      'one video, written while it is made, as long as you like',
      ('--stream',),
    ),
    Command('serve', 'serve', 'a page on which a video never ends'),
    Command(
      'teacher',
      'sample_teacher',
      'videos of the bidirectional teacher, many steps each',
    ),
  ),
  'Bring weights': (
    Command(
      'convert', 'convert_checkpoint', 'published weights to ours, and back'
    ),
    Command('export', 'export', "a training run's weights to a pipeline"),
  ),
  'Train': (
    Command('encode prompts', 'encode_prompts', 'text states of prompts, once'),
    Command('encode videos', 'encode_videos', 'the latents of videos, once'),
    Command(
      'trajectories', 'make_trajectories', "the teacher's denoising paths"
    ),
    Command('train', 'train', 'a phase, from its last checkpoint if any'),
    Command('plan', 'plan', 'does it fit that TPU pod? tells without one'),
  ),
  'Measure': (
    Command('evaluate', 'evaluate', 'scores of videos, a row for each order'),
    Command('evaluate teacher', 'evaluate_teacher', "scores of the teacher's"),
    Command('study', 'study', 'arms of training beside each other, a report'),
    Command(
      'evaluate videos', 'evaluate_videos', 'a report on folders of any videos'
    ),
    Command(
      'evaluate learnt', 'evaluate_learnt', 'what learnt judges say of them'
    ),
  ),
}

_BY_NAME = {c.name: c for group in COMMANDS.values() for c in group}
_HELP = ('-h', '-help', '--help', 'help')
_TITLE = 'Long videos from text by autoregressive diffusion, in JAX.'
_USAGE = """\
usage: hiar-jax COMMAND [--flag=value ...]
       hiar-jax COMMAND --help     what it does, and its flags
       hiar-jax --version"""
_END = """\
--config=NAME takes a config that comes with the package, or the path of your
own; --config.key=value changes a value of it. With the package come
  {configs}

A first video:
  hiar-jax generate --config=bouncing --out=video.mp4 \\
    --prompt="a large red disc drifting fast over dark blue\""""


def main() -> None:
  """Runs the command that sys.argv names; see `hiar-jax --help`."""
  interrupts.leave_at_once()  # While the program is imported.
  words = sys.argv[1:]
  if not words or words[0] in _HELP:
    _print(help_page())
    sys.exit(0 if words else 2)
  if words[0] == '--version':
    # Here: the package's own version, without what else it names.
    from hiar_jax import __version__

    print(f'hiar_jax {__version__}')
    return
  command, flags = _split(words)
  module = f'hiar_jax.launch.{command.program}'
  if not _exists(module):
    # An editable installation knows the folders of the day it was made.
    _fail(f'no program {module}; install the package again')
  sys.argv[1:] = [*command.flags, *flags]
  # As `python launch/PROGRAM.py`: it is __main__, and so are its flags.
  runpy.run_module(module, run_name='__main__', alter_sys=True)


def help_page() -> str:
  """What `hiar-jax --help` shows."""
  parts = [_TITLE, _USAGE]
  parts += [_table(title, group) for title, group in COMMANDS.items()]
  names = textwrap.wrap(', '.join(config_flag.packaged()), 78)
  parts.append(_END.format(configs='\n  '.join(names)))
  return '\n\n'.join(parts)


def _table(title: str, commands: tuple[Command, ...]) -> str:
  width = max(len(name) for name in _BY_NAME)
  return '\n'.join(
    [title, *(f'  {c.name:{width}}  {c.says}' for c in commands)]
  )


def _split(words: list[str]) -> tuple[Command, list[str]]:
  """The command that the first words name, and the words after it."""
  for count in (2, 1):
    command = _BY_NAME.get(' '.join(words[:count]))
    if command is not None:
      return command, words[count:]
  first, *others = words
  if first.startswith('-'):
    _fail(f'{first} comes after a command; hiar-jax --help lists them')
  group = tuple(c for c in _BY_NAME.values() if c.name.split()[0] == first)
  if group and (not others or others[0] in _HELP):
    _print(_table(f'hiar-jax {first} takes one more word:', group))
    sys.exit(0 if others else 2)
  wrong = first
  if group and not others[0].startswith('-'):
    wrong = f'{first} {others[0]}'
  if group:
    near = [c.name for c in group]
  else:
    near = difflib.get_close_matches(wrong, _BY_NAME, n=1, cutoff=0)
  _fail(
    f'no command {wrong!r}; did you mean {" or ".join(map(repr, near))}? '
    'hiar-jax --help lists them'
  )


def _exists(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:
    return False


def _print(page: str) -> None:
  """Prints a page, of which the reader may want the beginning alone."""
  try:
    print(page, flush=True)
  except BrokenPipeError:
    # Python would say so again when it ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _fail(message: str) -> NoReturn:
  print(f'error: {message}', file=sys.stderr)
  sys.exit(2)


if __name__ == '__main__':
  main()
