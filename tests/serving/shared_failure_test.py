"""A failure in one session of a shared batch, through maker, studio and row."""

from hiar_jax.sampling import together
from hiar_jax.serving import maker, protocol, studio
from tests.serving import maker_test, studio_test


def test_a_session_that_fails_on_the_device_ends_and_the_other_goes_on(
  monkeypatch, capsys
):
  made_by = studio.Studio(studio_test.make(), share_batch=True, places=2)
  one = maker.Maker(made_by, protocol.Limits(sessions=2))
  one.start('a').result(300)
  fine, bad = maker_test.Job('a'), maker_test.Job('b')
  try:
    for job in (fine, bad):
      one.submit(job)
    maker_test.wait_until(lambda: fine.blocks and bad.blocks, 120)
    plain, key = together.Together._step, bad.making.member.key

    def step(self, members):
      made = plain(self, members)
      if any(member.key is key for member in members):
        self._row = None  # As after a program that was given the row.
        raise RuntimeError('planted')
      return made

    monkeypatch.setattr(together.Together, '_step', step)
    assert bad.over.wait(120)
    assert bad.error.code == 'crashed' and 'RuntimeError' in str(bad.error)
    seen = len(fine.blocks)
    maker_test.wait_until(lambda: len(fine.blocks) > seen + 5, 120)
    assert not fine.over.is_set()
    # It was told from where on its blocks were made again, and misses none.
    assert len(fine.restarts) == 1
    numbers = [block for block, *_ in fine.blocks]
    assert numbers == list(range(len(numbers)))
    # Whoever comes now gets the place that is free.
    after = maker_test.Job('b')
    one.submit(after)
    maker_test.wait_until(lambda: len(after.blocks) > 2, 120)
    assert one.counts['crashes'] == one.counts['restarts'] == 1
  finally:
    one.close()
  assert 'planted' in capsys.readouterr().err
