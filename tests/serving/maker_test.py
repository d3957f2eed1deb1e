"""Who gets a place, whose block is next, and what an error ends."""

import math
import threading
import time

import pytest

from hiar_jax.serving import maker, protocol
from tests.serving import fake_studio


class Job:
  """Takes a number of blocks at once, and notes what it is told."""

  def __init__(self, prompt='red', blocks=10**9, wants=0.0):
    self.start = protocol.Start(prompt)
    self.initial_frames = None
    self.left, self.wants = blocks, wants
    self.blocks, self.places, self.prompts, self.refusals = [], [], [], []
    self.over, self.error, self.restarts = threading.Event(), None, []

  def wants_at(self):
    return self.wants if len(self.blocks) < self.left else None

  def queued(self, place):
    self.places.append(place)

  def started(self, making):
    self.making = making

  def block(self, block, frames, seconds):
    self.blocks.append((block, tuple(frames[0, 0, -1]), time.monotonic()))

  def prompted(self, number, at):
    self.prompts.append((number, at))

  def refused(self, error):
    self.refusals.append(error)

  def restarted(self, at):
    self.restarts.append(at)

  def ended(self, error):
    self.error = error
    self.over.set()


@pytest.fixture
def made():
  makers = []

  def make(**limits):
    one = maker.Maker(fake_studio.Studio(), protocol.Limits(**limits))
    makers.append(one)
    one.start('red').result(30)
    return one

  yield make
  for one in makers:
    one.close()


def wait_until(condition, seconds=20.0):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.002)


def test_blocks_come_in_order_and_no_more_than_are_wanted(made):
  one, job = made(), Job(blocks=5)
  one.submit(job)
  wait_until(lambda: len(job.blocks) == 5)
  time.sleep(0.05)
  assert [block for block, *_ in job.blocks] == [0, 1, 2, 3, 4]
  assert one.counts['blocks'] == 5


def test_who_runs_dry_first_is_served_first(made):
  one = made()
  late, soon = Job(blocks=3, wants=2.0), Job(blocks=3, wants=1.0)
  # Both are there before a block is made: their first ones apart.
  late.left = soon.left = 1
  one.submit(late)
  one.submit(soon)
  wait_until(lambda: late.blocks and soon.blocks)
  with one._changed:
    late.left = soon.left = 4
  one.wake()
  wait_until(lambda: len(late.blocks) == len(soon.blocks) == 4)
  assert soon.blocks[-1][2] < late.blocks[1][2]


def test_a_whole_video_is_made_beside_viewers_who_want_all(made):
  one = made()
  viewer, whole = Job(), Job(blocks=20, wants=math.inf)
  one.submit(viewer)
  one.submit(whole)
  wait_until(lambda: len(whole.blocks) == 20)
  begun = whole.blocks[0][2]
  assert sum(at > begun for *_, at in viewer.blocks) > 4 * 20


def test_who_finds_no_place_waits_in_order_and_is_told_where(made):
  one = made(sessions=1, waiting=2)
  first, second, third = jobs = [Job(blocks=2) for _ in range(3)]
  for job in jobs:
    one.submit(job)
  wait_until(lambda: len(first.blocks) == 2)
  assert (second.places, third.places) == ([1], [2])
  with pytest.raises(protocol.Refused, match='1 videos are being made and 2'):
    one.submit(Job())
  one.leave(first)
  wait_until(lambda: len(second.blocks) == 2)
  assert not third.blocks and third.places[-1] == 1
  one.leave(third)  # Out of the queue.
  one.leave(second)
  wait_until(lambda: not one.running)
  assert not third.blocks and not one.waiting


def test_a_crash_ends_its_own_session_alone(made, capsys):
  one = made()
  other, bad = Job(), Job('red')
  one.submit(other)
  one.submit(bad)
  wait_until(lambda: bad.blocks)
  one.prompt(bad, protocol.Prompt('crash'))
  assert bad.over.wait(20)
  assert bad.error.code == 'crashed' and 'RuntimeError' in str(bad.error)
  assert bad.making.closed
  seen = len(other.blocks)
  wait_until(lambda: len(other.blocks) > seen + 20)
  assert one.counts['crashes'] == 1
  assert 'a crash that was asked for' in capsys.readouterr().err


def test_a_bug_in_one_session_ends_no_other(made, capsys):
  one, fine, bad = made(), Job(), Job()
  one.submit(fine)
  one.submit(bad)
  wait_until(lambda: fine.blocks and bad.blocks)

  def wrong(*unused):
    raise KeyError('a bug')

  bad.prompted = wrong
  one.prompt(bad, protocol.Prompt('green'))
  wait_until(lambda: one.counts['crashes'] == 1)
  bad.wants_at = wrong
  one.wake()
  assert bad.over.wait(20) and bad.error.code == 'crashed'
  seen = len(fine.blocks)
  wait_until(lambda: len(fine.blocks) > seen + 20)
  capsys.readouterr()


class Row:
  """Of fake videos, which are made one by one."""

  cleared = 0

  def clear(self):
    self.cleared += 1


def test_who_fails_in_a_shared_batch_ends_and_the_others_are_told(made, capsys):
  one, row = made(), Row()
  first, second = Job(), Job()
  for job in (first, second):
    one.submit(job)
  wait_until(lambda: first.blocks and second.blocks)

  def step(makings):
    frames = [making.next() for making in makings]
    for making in makings:
      if making is second.making and making.error is None:
        making.error, first.making.restarts = RuntimeError('its own'), 1
    return [
      None if making.error else block
      for making, block in zip(makings, frames, strict=True)
    ]

  first.making.row = second.making.row = row
  one.studio.step = step
  one.wake()
  assert second.over.wait(20) and second.error.code == 'crashed'
  seen = len(first.blocks)
  wait_until(lambda: len(first.blocks) > seen + 5)
  assert len(first.restarts) == 1 and 0 < first.restarts[0] <= seen
  assert one.counts['restarts'] == one.counts['crashes'] == 1
  assert not row.cleared
  capsys.readouterr()


def test_a_crash_that_is_nobodys_ends_those_of_its_batch_alone(made, capsys):
  one, row = made(), Row()
  apart, first, second = Job(), Job(), Job()
  for job in (apart, first, second):
    one.submit(job)
  wait_until(lambda: apart.blocks and first.blocks and second.blocks)
  first.making.row = second.making.row = row
  one.prompt(second, protocol.Prompt('crash'))
  assert first.over.wait(20) and second.over.wait(20)
  assert first.error.code == second.error.code == 'crashed'
  assert row.cleared == 1
  seen = len(apart.blocks)
  wait_until(lambda: len(apart.blocks) > seen + 20)
  capsys.readouterr()


def test_who_soon_wants_a_block_takes_it_in_the_same_batch(made):
  one, row, steps = made(), Row(), []
  plain = one.studio.step
  one.studio.step = lambda makings: steps.append(len(makings)) or plain(makings)
  one.block_s = 1.0
  first, second = Job(blocks=1), Job(blocks=1, wants=2.0)
  for job in (first, second):
    one.submit(job)
  wait_until(lambda: first.blocks and second.blocks)
  with one._changed:
    first.making.row = second.making.row = row
    second.wants = time.monotonic() + 0.5
    first.left = second.left = 5
    steps.clear()
  one.wake()
  wait_until(lambda: len(first.blocks) == len(second.blocks) == 5)
  assert steps == [2, 2, 2, 2]


def test_a_prompt_that_cannot_be_encoded_leaves_the_video_alone(made):
  one, job = made(), Job()
  one.submit(job)
  wait_until(lambda: job.blocks)
  one.prompt(job, protocol.Prompt('refuse'))
  wait_until(lambda: job.refusals)
  assert 'is not a text' in str(job.refusals[0])
  seen = len(job.blocks)
  wait_until(lambda: len(job.blocks) > seen + 5)


def test_prompts_change_the_video_from_the_block_that_is_told(made):
  one, job = made(), Job()
  one.submit(job)
  wait_until(lambda: job.blocks)
  assert one.prompt(job, protocol.Prompt('green')) == 1
  wait_until(lambda: job.prompts)
  ((number, at),) = job.prompts
  wait_until(lambda: len(job.blocks) > at + 2)
  assert number == 1
  assert job.blocks[at - 1][1] == fake_studio.COLOURS['red']
  assert job.blocks[at][1] == fake_studio.COLOURS['green']


def test_prompts_that_come_too_fast_are_refused(made):
  one, job = made(), Job()
  one.submit(job)
  wait_until(lambda: job.blocks)
  begin = threading.Event()
  one.studio.encode = lambda prompt: begin.wait(20)
  with pytest.raises(protocol.Refused, match='faster than'):
    for _ in range(20):
      one.prompt(job, protocol.Prompt('green'))
  begin.set()
  wait_until(lambda: job.prompts)


def test_a_session_that_left_while_its_stream_was_opened_is_closed(made):
  one, opened, begin = made(), threading.Event(), threading.Event()
  plain = one.studio.open

  def slowly(*arguments, **options):
    opened.set()
    begin.wait(20)
    return plain(*arguments, **options)

  one.studio.open = slowly
  job = Job()
  one.submit(job)
  assert opened.wait(20)
  one.leave(job)
  wait_until(lambda: not one.running)
  begin.set()
  wait_until(lambda: len(one.studio.made) == 2 and one.studio.made[-1].closed)
  assert not job.blocks


def test_nobody_is_admitted_any_more_when_the_server_ends(made):
  one = made(sessions=1)
  runs, waits = Job(), Job()
  one.submit(runs)
  one.submit(waits)
  wait_until(lambda: runs.blocks)
  one.drain()
  assert waits.over.wait(5) and waits.error.code == 'draining'
  with pytest.raises(protocol.Refused, match='about to end'):
    one.submit(Job())
  one.close()
  assert runs.over.wait(5) and runs.making.closed
