"""Prompts are cleaned as Wan2.1 cleans them, before they are tokenized."""

import pytest

from hiar_jax.text import tokens


@pytest.mark.parametrize(
  ('prompt', 'cleaned'),
  [
    # What mends wrongly decoded text is a package of its own, ftfy.
    ('a cafÃ© at night', 'a café at night'),
    ('a cat\u2019s \u201cbig\u201d eyes', 'a cat\'s "big" eyes'),
    ('\ufb01re and \uff21\uff22', 'fire and AB'),
    # Escaped once, and twice.
    ('salt &amp; pepper, 2 &lt; 3', 'salt & pepper, 2 < 3'),
    ('salt &amp;amp; pepper', 'salt & pepper'),
    ('  a\tcat\n\n on  a mat ', 'a cat on a mat'),
    ('一只猫', '一只猫'),
    ('', ''),
  ],
)
def test_a_prompt_is_cleaned_as_by_wan(prompt, cleaned):
  assert tokens.clean(prompt) == cleaned
