"""What one video's failure does to those that share its batch."""

import jax
import numpy as np

from hiar_jax.sampling import decoding, streaming, together
from tests import toy_network
from tests.sampling import together_test
from tests.sampling.together_test import assert_same, engine, key, make

latents_instead_of_pixels = together_test.latents_instead_of_pixels
_WAITS = 1  # Steps until the first block, of three denoising steps.


def joined(row, prompts):
  members = [row.prepare(p, key(i + 1)) for i, p in enumerate(prompts)]
  for member in members:
    row.join(member)
  return members


def steps(row, members, count):
  """Blocks of each member that were finished."""
  made = [[] for _ in members]
  for _ in range(count):
    here = [i for i, member in enumerate(members) if member.row is not None]
    blocks = row.step([members[i] for i in here])
    for i, block in zip(here, blocks, strict=True):
      if block is not None:
        made[i].append(block)
  return made


def alone(prompt, key, count, initial=None, switches=()):
  stream = streaming.Stream(
    *(engine(3), toy_network.params(), together_test.PlainCodec()),
    *(together_test.encode, [prompt], key[None]),
    initial=initial,
  )
  for at, other in switches:
    stream.send(other, at=at)
  return [next(stream)[0] for _ in range(count)]


def again(seed):
  """Key of a video that was begun anew once."""
  return jax.random.fold_in(key(seed), 1)


def failing_steps(monkeypatch, fails):
  """The device fails, and leaves nothing of the row, where `fails` says so."""
  plain, of_row, asked = together._step, together.Together._step, [()]

  def step(params, row, slots, live, *, engine):
    result = plain(params, row, slots, live, engine=engine)
    if fails(asked[0]):
      raise RuntimeError('planted')
    return result

  def method(self, members):
    asked[0] = members
    return of_row(self, members)

  monkeypatch.setattr(together, '_step', step)
  monkeypatch.setattr(together.Together, '_step', method)


def test_a_video_that_cannot_be_decoded_ends_and_no_other_notices(monkeypatch):
  row = make(3)
  members = joined(row, 'abc')
  made = steps(row, members, 2 + _WAITS)
  plain, bad = decoding.decode_block, members[1]
  bad.decoder = ((),)  # The codec has no state: one to know it by.

  def decode(codec, state, latents):
    if state is bad.decoder:
      raise RuntimeError('planted')
    return plain(codec, state, latents)

  monkeypatch.setattr(decoding, 'decode_block', decode)
  after = steps(row, members, 3)
  assert str(bad.error) == 'planted' and bad.row is None and not after[1]
  for i, name in ((0, 'a'), (2, 'c')):
    assert members[i].error is None and not members[i].restarts
    assert_same(made[i] + after[i], alone(name, key(i + 1), 5))
  assert len(row) == 2


def test_a_prompt_that_fails_ends_its_own_video_alone(monkeypatch):
  row = make(3)
  first, second = joined(row, 'ab')
  made = steps(row, [first, second], 1 + _WAITS)
  row.send(second, 'x')
  states = second.prompts[-1][1]
  plain = streaming.project

  def project(params, given, *, denoiser):
    if given is states:
      raise ValueError('planted')
    return plain(params, given, denoiser=denoiser)

  monkeypatch.setattr(streaming, 'project', project)
  after = steps(row, [first, second], 2)
  assert isinstance(second.error, ValueError) and first.error is None
  assert_same(made[0] + after[0], alone('a', key(1), 3))


def test_a_video_that_fails_on_the_device_ends_and_the_others_go_on(
  monkeypatch,
):
  row = make(3)
  first, bad, idle = members = joined(row, 'abc')
  made = steps(row, members, 3 + _WAITS)
  at = row.send(first, 'd')
  # A prompt that is told but not begun when the row is lost.
  assert at == 3 + _WAITS
  failing_steps(
    monkeypatch, lambda members: any(m.key is bad.key for m in members)
  )
  after = steps(row, [first, bad], 5)
  assert str(bad.error) == 'planted' and bad.row is None
  for member in (first, idle):
    assert member.error is None and member.restarts == 1
  # It goes on from its last frames: a gap of the blocks that were under way.
  # The first step was lost, and the next ones fill the pipeline again.
  assert len(after[0]) == 4 - _WAITS
  kept = _kept(np.concatenate(made[0], 0)[None])
  assert_same(after[0], alone('a', again(1), 3, kept, [(at - 3, 'd')]))
  # And so does who stood still.
  after = steps(row, [idle], 2 + _WAITS)
  kept = _kept(np.concatenate(made[2], 0)[None])
  assert_same(after[0], alone('c', again(3), 2, kept))


def _kept(latents):
  """The past of window 4 in blocks of 2 with a sink of 1: two frames."""
  return np.concatenate([latents[:, :1], latents[:, -1:]], 1)


def test_a_failure_that_is_nobodys_ends_nobody_unless_it_comes_again(
  monkeypatch,
):
  row = make(3)
  members = joined(row, 'abc')
  steps(row, members, 2)
  left = [1]

  def fails(members):
    left[0] -= len(members) > 1
    return len(members) > 1 and left[0] >= 0

  failing_steps(monkeypatch, fails)
  made = steps(row, members, 4)
  assert all(member.error is None for member in members)
  assert all(len(blocks) >= 2 for blocks in made)
  assert [member.restarts for member in members] == [1, 1, 1]
  # As when there is no memory for three.
  failing_steps(monkeypatch, lambda members: len(members) > 2)
  steps(row, members, 4)
  assert [member.error is None for member in members] == [True, True, False]
  made = steps(row, members[:2], 3)
  assert all(len(blocks) >= 2 for blocks in made[:2])


def test_a_device_that_is_gone_ends_all(monkeypatch):
  row = make(3)
  members = joined(row, 'ab')
  steps(row, members, 2)
  failing_steps(monkeypatch, lambda members: True)
  steps(row, members, 1)
  assert [str(member.error) for member in members] == ['planted'] * 2
  assert not len(row)
