"""The word-hash encoder: frozen, reproducible, and telling words apart."""

import subprocess
import sys

import numpy as np
import pytest

from hiar_jax.text import word_hash

ENCODER = word_hash.WordHashEncoder()
PROMPT = 'a small red disc drifting fast over dark blue'


def test_embedding_is_the_same_in_another_process():
  # str hashes differ between processes; the encoder must not use them.
  code = (
    'import sys; from hiar_jax.text import word_hash; '
    'sys.stdout.buffer.write('
    f'word_hash.WordHashEncoder().encode([{PROMPT!r}]).tobytes())'
  )
  result = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, check=True
  )
  assert result.stdout == ENCODER.encode([PROMPT]).tobytes()


def test_embedding_has_the_stated_shape_and_a_sane_scale():
  rows = ENCODER.encode([PROMPT, 'a disc'])
  assert rows.shape == (2, 16, 64)
  assert rows.dtype == np.float32
  assert 0.8 < rows[0, :9].std() < 1.5


def test_empty_prompt_is_all_zeros():
  assert not ENCODER.encode(['', ' . ']).any()


def test_rows_past_the_end_are_zero_and_others_are_not():
  row_LD = ENCODER.encode([PROMPT])[0]
  assert not row_LD[9:].any()
  assert (np.abs(row_LD[:9]).max(axis=-1) > 0.5).all()


def test_case_and_punctuation_do_not_matter():
  plain, loud = ENCODER.encode(['a red disc on grey', 'A RED, disc on: grey!'])
  np.testing.assert_array_equal(plain, loud)


def test_a_caption_does_not_depend_on_the_others_of_its_batch():
  alone = ENCODER.encode([PROMPT])[0]
  among = ENCODER.encode(['x y', PROMPT, ''])[1]
  np.testing.assert_array_equal(alone, among)


def test_words_beyond_the_length_are_dropped():
  encoder = word_hash.WordHashEncoder(length=3)
  np.testing.assert_array_equal(
    encoder.encode(['one two three four']), encoder.encode(['one two three'])
  )


def test_the_word_before_changes_a_word_but_leaves_it_alike():
  blue, dark_blue, red = ENCODER.encode(['a blue', 'dark blue', 'a red'])[:, 1]
  assert cosine(blue, dark_blue) > 0.6
  assert not np.array_equal(blue, dark_blue)
  assert cosine(blue, red) < 0.5


def test_the_same_word_elsewhere_is_alike_but_not_equal():
  row_LD = ENCODER.encode(['so red so red so red'])[0]
  assert cosine(row_LD[1], row_LD[5]) > 0.9
  assert not np.array_equal(row_LD[1], row_LD[5])


def test_one_string_instead_of_a_list_is_refused():
  with pytest.raises(ValueError, match="'a disc'"):
    ENCODER.encode('a disc')


def cosine(a, b):
  return a @ b / np.linalg.norm(a) / np.linalg.norm(b)
