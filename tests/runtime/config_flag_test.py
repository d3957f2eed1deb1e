"""--config takes the name of a packaged config or a path."""

import pathlib
import subprocess
import sys

import pytest

from hiar_jax.runtime import config_flag

_CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


def test_a_name_is_the_packaged_file_and_keeps_its_phase():
  assert config_flag.find('bouncing') == str(_CONFIGS / 'bouncing.py')
  assert config_flag.find('bouncing:codec') == (
    f'{_CONFIGS / "bouncing.py"}:codec'
  )


@pytest.mark.parametrize('path', ['mine.py', './mine', 'a/b.py:x,y'])
def test_a_path_stays_as_it_is(path):
  assert config_flag.find(path) == path


def test_a_wrong_name_is_answered_with_the_packaged_ones():
  with pytest.raises(ValueError) as error:
    config_flag.find('bouncign:teacher')
  assert "no config 'bouncign'" in str(error.value)
  for path in _CONFIGS.glob('[!_]*.py'):
    assert path.stem in str(error.value)


def _refusal(*overrides):
  """What a program that reads two things of a config says to overrides."""
  program = """
from absl import flags
from hiar_jax.runtime import config_flag, errors
config_flag.define()
errors.run_main(
  lambda _: config_flag.refuse_overrides_but('rollout', 'model.dim')
)
"""
  done = subprocess.run(
    [sys.executable, '-c', program, '--config=hiar_1_3b', *overrides],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == (2 if done.stderr else 0), done.stderr
  return done.stderr


def test_an_override_of_what_is_not_read_is_refused_by_name():
  read = '--config.rollout.window=9', '--config.model.dim=12'
  assert not _refusal(*read)
  said = _refusal(*read, '--config.rollout_blocks=(3, 3)')
  assert said.startswith('error: --config.rollout_blocks would change nothing')
  assert 'model.dim, rollout' in said and said.count('\n') == 1
