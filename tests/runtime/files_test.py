"""Files that are whole or not there, whoever else writes them."""

import os

import pytest

from hiar_jax.runtime import files


def test_a_file_has_its_name_when_the_block_has_ended(tmp_path):
  path = tmp_path / 'x[1].txt'
  (tmp_path / 'x[1].txt.elsewhere-7.part').write_text('of a killed process')
  with files.whole_file(path) as partial:
    partial.write_text('whole')
    assert partial != path and not path.exists()
  assert path.read_text() == 'whole'
  assert os.listdir(tmp_path) == ['x[1].txt']


def test_an_error_leaves_what_was_there_and_what_others_write(tmp_path):
  path = tmp_path / 'x.txt'
  path.write_text('before')
  (tmp_path / 'x.txt.elsewhere-7.part').write_text('under way')
  with pytest.raises(RuntimeError), files.whole_file(path) as partial:
    partial.write_text('half')
    raise RuntimeError
  assert path.read_text() == 'before'
  assert sorted(os.listdir(tmp_path)) == ['x.txt', 'x.txt.elsewhere-7.part']


def test_a_file_that_another_process_wrote_meanwhile_stays(tmp_path):
  path = tmp_path / 'x.txt'
  with files.whole_file(path) as partial:
    partial.write_text('ours')
    # It takes our half for a leftover.
    path.write_text('theirs')
    partial.unlink()
  assert path.read_text() == 'theirs'
