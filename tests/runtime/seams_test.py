"""Names in a config find modules of a room, or anyone's own."""

import sys

import pytest

from hiar_jax.data import bouncing
from hiar_jax.runtime import seams

KEY = {'key': 'prompts.source', 'aliases': {'file': 'prompts'}}


def test_a_module_of_the_room_is_found_by_its_name():
  found = seams.function('data', 'bouncing', 'open_prompts', **KEY)
  assert found is bouncing.open_prompts


def test_anyones_module_is_found_by_its_path(tmp_path, monkeypatch):
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'captions.py').write_text('def open_prompts(): pass')
  monkeypatch.syspath_prepend(tmp_path)
  found = seams.function('data', 'mine.captions', 'open_prompts', **KEY)
  assert found is sys.modules['mine.captions'].open_prompts


@pytest.mark.parametrize(
  'name', ['none', 'sources', 'no.such', 'prompts', '../x', '']
)
def test_another_name_is_refused_with_those_there_are(name):
  with pytest.raises(ValueError, match=r"source='.*' is not one of .*bouncing"):
    seams.function('data', name, 'open_prompts', **KEY)


def test_a_source_says_which_sections_it_reads_beside_its_own():
  aliases = KEY['aliases']
  assert seams.reads('data', 'bouncing', aliases=aliases) == bouncing.READS
  assert seams.reads('data', 'file', aliases=aliases) == ()
