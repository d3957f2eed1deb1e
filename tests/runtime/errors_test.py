"""A user's mistake is one line; a bug of ours keeps its traceback."""

import dataclasses
import os
import subprocess
import sys

import jax.numpy as jnp
import ml_collections
import pytest

from hiar_jax.runtime import errors, metrics, video_io

_PROGRAM = """
from absl import flags
from ml_collections import config_flags
import jax.numpy as jnp
from hiar_jax.runtime import errors
CONFIG = config_flags.DEFINE_config_file('config', 'config.py')
BLOCKS = flags.DEFINE_integer('num_blocks', 7, '', lower_bound=1)
def main(argv):
  if CONFIG.value.width % 2:
    raise ValueError(f'width={CONFIG.value.width} is odd')
  jnp.concatenate([])
if __name__ == '__main__':
  errors.run_main(main)
"""

_CONFIG = """
import ml_collections
def get_config(size='small'):
  if size != 'small':
    raise ValueError(f'size {size!r} is not small')
  return ml_collections.ConfigDict({'width': 4, 'size': {}})
"""


def _mistake_of(call) -> str | None:
  try:
    call()
  except (AttributeError, OSError, TypeError, ValueError) as error:
    return errors.users_mistake(error)
  raise AssertionError('nothing was raised')


def test_errors_of_our_own_are_the_users():
  assert _mistake_of(lambda: metrics.read_metrics('missing'))
  assert _mistake_of(lambda: video_io.VideoWriter('x.mp4', fps=0)) == (
    'fps=0 is not positive and finite'
  )


def test_an_unknown_config_key_is_named():
  config = ml_collections.ConfigDict({'width': 4}).lock()

  def assign():
    config.widht = 3

  assert 'widht' in _mistake_of(assign)


def test_errors_from_inside_a_library_are_bugs():
  assert _mistake_of(lambda: jnp.zeros((2, 3)) @ jnp.zeros((2, 3))) is None
  assert _mistake_of(lambda: dataclasses.replace(3)) is None


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ('--config=config.py --config.width=3', 'width=3 is odd'),
    (
      '--config=config.py --config.widht=3',
      'unknown config key \'widht\' Did you mean "width" instead of "widht"?',
    ),
    (
      '--config=config.py --config.sise.width=3',
      'unknown config key \'sise\' Did you mean "size" instead of "sise"?',
    ),
    ('--config=config.py:large', "size 'large' is not small"),
    ('--config=missing.py', "no config file 'missing.py'"),
    ('--num_blocks=0', 'flag --num_blocks=0: 0 is not a positive integer'),
    ('--config=config.py', None),
  ],
)
def test_a_program_ends_with_one_line_and_status_2(
  tmp_path, arguments, message
):
  (tmp_path / 'program.py').write_text(_PROGRAM)
  (tmp_path / 'config.py').write_text(_CONFIG)
  done = subprocess.run(
    [sys.executable, 'program.py', *arguments.split()],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  if message is None:
    assert done.returncode == 1
    assert 'Traceback' in done.stderr and 'ValueError' in done.stderr
  else:
    assert done.stderr == f'error: {message}\n'
    assert done.returncode == 2


@pytest.mark.parametrize(
  ('arguments', 'shown'), [([], 'heed\n'), (['--verbosity=0'], 'all\nheed\n')]
)
def test_messages_of_others_are_shown_from_warnings_on(arguments, shown):
  code = (
    'from absl import logging; from hiar_jax.runtime import errors; '
    'logging.get_absl_handler().setFormatter(None); '
    'errors.run_main(lambda argv: (logging.info("all"), '
    'logging.warning("heed"))and None)'
  )
  done = subprocess.run(
    [sys.executable, '-c', code, *arguments],
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stderr == shown


def test_an_output_that_nobody_reads_is_no_error():
  code = (
    'import sys; from hiar_jax.runtime import errors; '
    "sys.argv[1:] = []; errors.run_main(lambda argv: print('x' * 10**6))"
  )
  with subprocess.Popen(
    [sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
  ) as process:
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b''
  assert process.returncode == 141


@pytest.mark.parametrize('platform', ['rocm', 'nonsense'])
def test_a_platform_that_is_not_there_is_one_line(platform):
  code = (
    'import sys, jax; from hiar_jax.runtime import errors; '
    'sys.argv[1:] = []; errors.run_main(lambda argv: jax.devices() and None)'
  )
  done = subprocess.run(
    [sys.executable, '-W', 'ignore', '-c', code],
    capture_output=True,
    text=True,
    check=False,
    env=os.environ | {'JAX_PLATFORMS': platform},
  )
  assert done.returncode == 2, done.stderr
  *logged, line = done.stderr.splitlines()
  assert line.startswith(f'error: JAX_PLATFORMS={platform}: jax finds no such')
  assert not any('Traceback' in line for line in logged)
