"""The number that names a video's noise, and makes it again alone.

A seed has three digits of base 2**32: that of the call, the number of the video
among those of its prompt, and the number of the prompt. So the seed of a call
is the seed of its first video, the others' follow from it, and a video depends
on its own seed alone, wherever it is made.
"""

# P prompts, V videos of each, B = P * V videos, prompt by prompt

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_DIGIT = 2**32
_END = _DIGIT**3


def parse(seed: Any) -> int | tuple[int, ...]:
  """A seed, or one for each video, as Python's own numbers.

  Raises:
    ValueError: naming what is no seed.
  """
  if isinstance(seed, Sequence | np.ndarray) and not isinstance(seed, str):
    return tuple(map(_check, seed))
  return _check(seed)


def of_videos(
  seed: int | Sequence[int], num_prompts: int, num_videos: int = 1
) -> tuple[int, ...]:
  """The seed of each video of a call, [B].

  Args:
    seed: of the call, or one for each video.
    num_prompts: P.
    num_videos: V.

  Raises:
    ValueError: if there are several, and not as many as videos, or one of them
      is no seed.
  """
  seed = parse(seed)
  if isinstance(seed, tuple):
    if len(seed) != num_prompts * num_videos:
      raise ValueError(
        f'{len(seed)} seeds for {num_prompts * num_videos} videos; give one '
        'seed, or one for each video'
      )
    return seed
  return tuple(
    _check(seed + video * _DIGIT + prompt * _DIGIT**2)
    for prompt in range(num_prompts)
    for video in range(num_videos)
  )


def keys(seeds_B: Sequence[int]) -> jax.Array:
  """The random key of each video, [B]."""
  digits_B3 = np.array(
    [(s % _DIGIT, s // _DIGIT % _DIGIT, s // _DIGIT**2) for s in seeds_B],
    np.uint32,
  )
  call_B, video_B, prompt_B = digits_B3.T
  return sample_keys(call_B, prompt_B, video_B)


@jax.jit
def sample_keys(
  seed: jax.Array, prompt_B: jax.Array, video_B: jax.Array
) -> jax.Array:
  """One key a sample: (seed, number of the prompt, number of its video).

  Args:
    seed: uint32, of the call, or of each sample [B].
    prompt_B: integers.
    video_B: integers.
  """

  def one(seed, prompt, video):
    key = jax.random.key(seed)
    return jax.random.fold_in(jax.random.fold_in(key, prompt), video)

  seed_B = jnp.broadcast_to(seed, jnp.shape(prompt_B))
  return jax.vmap(one)(seed_B, prompt_B, video_B)


def _check(seed: Any) -> int:
  if not isinstance(seed, int | np.integer) or not 0 <= seed < _END:
    raise ValueError(f'seed={seed!r} is not a whole number in 0..2**96-1')
  return int(seed)
