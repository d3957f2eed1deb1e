"""A video's seed names its noise, wherever it is made."""

import jax
import numpy as np
import pytest

from hiar_jax.sampling import seeds


def _bits(keys):
  return np.asarray(jax.random.key_data(keys))


def test_each_video_has_the_noise_of_its_call_prompt_and_number():
  chosen = seeds.of_videos(7, num_prompts=2, num_videos=3)
  assert chosen[0] == 7 and len(set(chosen)) == 6
  key = jax.random.key(7)
  expected = [
    jax.random.fold_in(jax.random.fold_in(key, prompt), video)
    for prompt in range(2)
    for video in range(3)
  ]
  for mine, key in zip(_bits(seeds.keys(chosen)), expected, strict=True):
    np.testing.assert_array_equal(mine, _bits(key))


def test_a_video_keeps_its_seed_when_others_are_made_with_it():
  many = seeds.of_videos(7, num_prompts=3, num_videos=2)
  assert seeds.of_videos(7, num_prompts=2) == many[:4:2]
  assert seeds.of_videos(many[3], num_prompts=1) == many[3:4]


@pytest.mark.parametrize(
  'given', [[1, 2], (1, 2), range(1, 3), np.array([1, 2], np.int32)]
)
def test_seeds_may_be_listed_in_any_sequence(given):
  assert seeds.of_videos(given, num_prompts=2) == (1, 2)
  assert seeds.of_videos(given, num_prompts=1, num_videos=2) == (1, 2)


@pytest.mark.parametrize(
  ('seed', 'message'),
  [
    (2**96, 'is not a whole number in'),
    (2**96 - 1, f'seed={2**96 - 1 + 2**64} is not a whole number in'),
    (None, 'seed=None is not'),
    ('12', "seed='12' is not"),
    ([1, 2.0], 'seed=2.0 is not'),
    ([[1], [2]], r'seed=\[1\] is not'),
    ([], '0 seeds for 2 videos'),
    ([1, 2, 3], '3 seeds for 2 videos'),
  ],
)
def test_what_names_no_noise_is_named(seed, message):
  with pytest.raises(ValueError, match=message):
    seeds.of_videos(seed, num_prompts=2)
