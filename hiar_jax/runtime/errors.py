"""What a user's mistake looks like: one line on stderr, exit status 2."""

import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax
from absl import app, flags, logging

from hiar_jax.runtime import compiled_programs, help_page, interrupts

# Modules whose ValueErrors are about what they were given. A ValueError from
# inside jax or NumPy is a bug of ours and keeps its traceback.
_OWN = re.compile(r'__main__$|hiar_jax(\.|$)|configs?(\W|_|$)')

_CAUGHT = (
  *(AttributeError, KeyError, OSError, TypeError, ValueError),
  # Of jax, where it finds no device.
  *(AssertionError, RuntimeError),
  jax.errors.JaxRuntimeError,
)
# Where jax looks for the devices of a platform.
_PLATFORMS = re.compile(r'jax\b.*\bxla_bridge$')
_SIGPIPE_STATUS = 128 + 13


def run_main(main: Callable[[Sequence[str]], None]) -> NoReturn:
  """Runs a launch program; `app.run` for people.

  What it compiles is kept for the next start, see `compiled_programs`. Of
  others' messages warnings are shown; --verbosity=0 shows all.

  A wrong flag, config, path or value ends the program with 'error: ...' and
  exit status 2, Ctrl-C with status 130 and SIGTERM with 143, see `interrupts`;
  any other error keeps its traceback.

  Args:
    main: is given the program's name alone; further arguments are refused.
  """
  interrupts.unwind()
  # jax would cut its own frames out, and its errors would look like ours.
  jax.config.update('jax_traceback_filtering', 'off')
  compiled_programs.define_flag()

  def guarded(argv: Sequence[str]) -> None:
    if len(argv) > 1:
      _exit(
        f'unexpected argument {argv[1]!r}; a value with spaces in it is to be '
        'in quotes'
      )
    # Those of orbax, forty for three lines of ours, are asked for by name.
    if not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(logging.WARNING)
    try:
      compiled_programs.keep_by_flag()
      main(argv)
    except KeyboardInterrupt:
      interrupts.leave()
    except BrokenPipeError:
      raise
    except _CAUGHT as error:
      interrupts.leave_if_received()
      message = users_mistake(error)
      if message is None:
        raise
      _exit(message)

  try:
    app.run(guarded, flags_parser=_parse_flags)
  except BrokenPipeError:
    close_output()
    sys.exit(_SIGPIPE_STATUS)
  finally:
    interrupts.leave_if_received()


def close_output() -> None:
  """Lets go of an output that nobody reads, as that of `hiar-jax ... | head`.

  Python would else say so when it ends.
  """
  os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def users_mistake(error: BaseException) -> str | None:
  """The one line to show for an error that a user can mend, else None."""
  text = _one_line(error)
  if isinstance(error, jax.errors.JaxRuntimeError):
    # What a device has no room for; anything else is a bug.
    exhausted = text.startswith('RESOURCE_EXHAUSTED')
    return f'the device has not enough memory: {text}' if exhausted else None
  frames = list(traceback.walk_tb(error.__traceback__))
  raised_in = frames[-1][0].f_globals.get('__name__', '') if frames else ''
  platforms = os.environ.get('JAX_PLATFORMS')
  if isinstance(error, RuntimeError | AssertionError):
    if not platforms or not _PLATFORMS.match(raised_in):
      return None
    return (
      f'JAX_PLATFORMS={platforms}: jax finds no such device here, or was '
      f'installed without what it takes ({text or type(error).__name__})'
    )
  if isinstance(error, OSError):
    missing = re.search(
      r"config file .*No such file or directory: '(.*?)'", text
    )
    return f'no config file {missing[1]!r}' if missing else text
  if isinstance(error, ValueError) and _OWN.match(raised_in):
    return text
  # A frozen dataclass that is built from a config names the misspelt key.
  if isinstance(error, TypeError) and 'unexpected keyword argument' in text:
    return text if _OWN.match(raised_in) else None
  # A locked ConfigDict refuses unknown keys, a flag those of unknown sections.
  if isinstance(error, AttributeError | KeyError) and raised_in.startswith(
    'ml_collections'
  ):
    return f'unknown config key {text}'
  return None


def _parse_flags(argv: Sequence[str]) -> list[str]:
  if help_page.is_wanted(argv):
    print(help_page.page(argv[0]))
    sys.exit()
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    _exit(_one_line(error))
  except _CAUGHT as error:
    # Raised while a config file is loaded or overridden.
    message = users_mistake(error)
    if message is None:
      raise
    _exit(message)


def _one_line(error: BaseException) -> str:
  # A KeyError inside an error would be quoted twice.
  while error.args and isinstance(error.args[0], BaseException):
    error = error.args[0]
  if isinstance(error, KeyError) and error.args:
    return ' '.join(str(error.args[0]).split())
  lines = str(error).strip().split('\n')
  # ml_collections puts a whole traceback into the message; its end says it.
  if 'Traceback (most recent call last):' in str(error):
    return lines[-1].partition(': ')[2]
  return ' '.join(str(error).split())


def _exit(message: str) -> NoReturn:
  print(f'error: {message}', file=sys.stderr)
  sys.exit(2)
