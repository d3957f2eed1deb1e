"""--config takes the name of a packaged config or a path."""

import pathlib

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
