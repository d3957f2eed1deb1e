"""Videos of one batch are those of streams of their own, come what may."""

import functools

import numpy as np
import pytest

from hiar_jax import noise_schedule, rollout
from hiar_jax.codecs import pixels
from hiar_jax.sampling import seeds, streaming, together
from tests import toy_network
from tests.plain_codec import PlainCodec

_INDICES = {2: (1000, 500), 3: (1000, 700, 400), 4: (1000, 750, 500, 250)}


@pytest.fixture(autouse=True)
def latents_instead_of_pixels(monkeypatch):
  monkeypatch.setattr(pixels, 'from_float', lambda video: video)


def encode(prompts):
  config = toy_network.CONFIG
  shape = (config.text_len, config.text_dim)
  rngs = [np.random.default_rng(ord(prompt[0])) for prompt in prompts]
  return np.stack([rng.normal(size=shape) for rng in rngs]).astype(np.float32)


@functools.cache
def engine(steps=4):
  config = rollout.RolloutConfig(
    levels=noise_schedule.warped_levels(_INDICES[steps], 5.0),
    frames_per_block=2,
    window=4,
    sink=1,
  )
  return streaming.Engine(toy_network.DENOISER, config, 'batched')


def make(steps=4, places=4):
  return together.Together(
    *(engine(steps), toy_network.params(), PlainCodec(), encode), places=places
  )


def alone(prompt, seed, count, *, steps=4, switches=(), initial=None):
  """The first blocks of a stream of its own."""
  stream = streaming.Stream(
    *(engine(steps), toy_network.params(), PlainCodec(), encode, [prompt]),
    seeds.keys([seed]),
    initial=initial,
  )
  for at, other in switches:
    stream.send(other, at=at)
  return [next(stream)[0] for _ in range(count)]


def key(seed):
  return seeds.keys([seed])[0]


def assert_same(blocks, expected):
  assert len(blocks) == len(expected)
  for block, wanted in zip(blocks, expected, strict=True):
    np.testing.assert_allclose(block, wanted, atol=2e-5)


@pytest.mark.parametrize(
  'steps',
  [
    pytest.param(2, marks=pytest.mark.slow),
    3,
    pytest.param(4, marks=pytest.mark.slow),
  ],
)
def test_a_video_alone_is_that_of_a_stream(steps):
  row = make(steps)
  member = row.prepare('a', key(3))
  row.join(member)
  blocks = [row.step([member])[0] for _ in range(5)]
  waits = (steps - 1) // 2
  assert [block is None for block in blocks] == [True] * waits + [False] * (
    5 - waits
  )
  assert_same(blocks[waits:], alone('a', 3, 5 - waits, steps=steps))


def test_videos_that_join_pause_change_and_leave_know_nothing_of_others():
  row, made = make(), {}

  def step(*names):
    blocks = row.step([members[name] for name in names])
    for name, block in zip(names, blocks, strict=True):
      if block is not None:
        made.setdefault(name, []).append(block)

  members = {'a': row.prepare('a', key(1))}
  row.join(members['a'])
  step('a')
  step('a')
  # A second one grows the row; the first one pauses, and changes.
  members['b'] = row.prepare('b', key(2))
  row.join(members['b'])
  step('a', 'b')
  step('b')
  at = row.send(members['a'], 'c')
  step('b', 'a')
  # Two more, of which one goes on from given frames.
  rng = np.random.default_rng(0)
  given = rng.normal(size=(1, 3, *toy_network.FRAME_SHAPE)).astype(np.float32)
  members['d'] = row.prepare('d', key(4), given)
  members['e'] = row.prepare('e', key(5))
  row.join(members['d'])
  row.join(members['e'])
  assert len(row) == 4
  np.testing.assert_allclose(members['d'].given, given[0])
  step('a', 'd', 'e')
  step('b', 'a', 'e', 'd')
  # The others move to the front of a shorter row.
  for name in 'ab':
    row.leave(members[name])
  row.leave(members['b'])
  step('d', 'e')
  row.leave(members['e'])
  step('d')
  step('d')
  # The place of one who left is set anew.
  members['f'] = row.prepare('f', key(6))
  row.join(members['f'])
  step('f', 'd')
  step('f')
  assert_same(made['a'], alone('a', 1, len(made['a']), switches=[(at, 'c')]))
  assert_same(made['b'], alone('b', 2, len(made['b'])))
  assert_same(made['d'], alone('d', 4, len(made['d']), initial=given))
  assert_same(made['e'], alone('e', 5, len(made['e'])))
  assert_same(made['f'], alone('f', 6, len(made['f'])))
  assert len(made['d']) == 5 and len(made['a']) > at


def test_a_full_row_and_another_mode_are_refused():
  row = make(places=1)
  row.join(row.prepare('a', key(1)))
  with pytest.raises(ValueError, match='all 1 places are taken'):
    row.join(row.prepare('b', key(2)))
  row.clear()
  assert not len(row)
  serial = streaming.Engine(toy_network.DENOISER, engine().config, 'serial')
  with pytest.raises(ValueError, match="not in 'serial'"):
    together.Together(
      serial, toy_network.params(), PlainCodec(), encode, places=1
    )
