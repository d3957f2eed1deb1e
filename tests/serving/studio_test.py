"""Streams of a pipeline as a server needs them, on a network of the tests."""

import jax
import numpy as np
import pytest

from hiar_jax import noise_schedule, rollout
from hiar_jax.codecs import linear
from hiar_jax.sampling import modes, video_pipeline
from hiar_jax.serving import studio
from tests import toy_network


class Encoder:
  """Some numbers for every text; counts what it encodes."""

  def __init__(self):
    self.encoded = []

  def encode(self, prompts):
    self.encoded += prompts
    config = toy_network.CONFIG
    return np.stack(
      [
        np.random.default_rng(ord(p[0])).normal(
          size=(config.text_len, config.text_dim)
        )
        for p in prompts
      ]
    ).astype(np.float32)


def make(order='step_first', indices=(1000, 500), **config):
  codec = linear.fit_linear_codec(
    [np.random.default_rng(0).integers(0, 255, (3, 4, 8, 3)).astype(np.uint8)],
    channels=toy_network.CONFIG.channels,
    spatial_stride=2,
  )
  return video_pipeline.VideoPipeline(
    name='toy',
    denoiser=toy_network.DENOISER,
    params=toy_network.params(),
    encoder=Encoder(),
    codec=codec,
    rollout=rollout.RolloutConfig(
      levels=noise_schedule.warped_levels(indices, 5.0),
      frames_per_block=2,
      **{'window': 4, **config},
    ),
    schedule={'shift': 5.0, 'indices': indices},
    order=order,
    fps=8.0,
  )


def test_blocks_are_those_of_a_stream_with_a_change_in_it():
  pipeline = make()
  one = studio.Studio(pipeline)
  making = one.open('a', seed=3)
  blocks = [making.first, making.next()]
  at = making.send('b')
  blocks += [making.next() for _ in range(3)]
  making.close()
  stream = pipeline.stream('a', seed=3)
  stream.send('b', at=at)
  for block in blocks:
    np.testing.assert_array_equal(block, next(stream)[0])
  # With two steps no block is under way, and none is made ahead.
  assert at == 2


def test_another_mode_is_compiled_before_its_session_begins(caplog):
  # With three steps the first block takes more turns than the next ones.
  one = studio.Studio(make(indices=(1000, 700, 400)))
  one.warm_up('a')

  def compiled():
    told = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return sum('Finished XLA compilation' in line for line in told)

  with jax.log_compiles():
    making = one.open('a', seed=1, mode='serial')
    assert compiled()
    making.send('b')
    for _ in range(4):
      making.next()
    assert not compiled()
  making.close()


@pytest.mark.parametrize('given', [0, 1])
def test_the_first_recache_compiles_nothing(caplog, given):
  one = studio.Studio(make('block_first', window=6))
  one.warm_up('a')
  shape = one.pipeline.frame_shape
  initial = np.zeros((given, *shape), np.uint8) if given else None
  making = one.open('a', seed=1, initial_frames=initial)
  with jax.log_compiles():
    # Before the window is full, and after it.
    for prompt in 'bc':
      making.send(prompt, recache=True)
      for _ in range(3):
        making.next()
    told = [record.getMessage() for record in caplog.records]
  making.close()
  assert not [line for line in told if 'Finished XLA compilation' in line]


def test_texts_are_encoded_once():
  pipeline = make()
  one = studio.Studio(pipeline)
  one.encode('b')
  making = one.open('a', seed=0)
  making.send('b')
  making.next()
  one.open('a', seed=1).close()
  making.close()
  assert pipeline.encoder.encoded == ['b', 'a']


def test_modes_are_those_that_the_weights_have():
  assert studio.Studio(make()).mode == 'batched'
  assert studio.Studio(make()).modes[:2] == ('batched', 'serial')
  assert studio.Studio(make(context='shared')).modes == ('shared',)
  assert studio.Studio(make('block_first')).mode == 'block_first'
  with pytest.raises(ValueError, match="'serial' does not go with context"):
    studio.Studio(make(context='shared'), mode='serial')


def test_squares_of_the_grid_are_each_denoised_once_and_committed_once():
  making = studio.Studio(make()).open('a', seed=0)
  seen = {}
  for block in range(4):
    told = making.turns(block)
    assert told['steps'] == 2
    for blocks, verbs in zip(told['turns'], told['verbs'], strict=True):
      for step, (b, verb) in enumerate(zip(blocks, verbs, strict=True)):
        if b >= 0:
          seen.setdefault((b, step), []).append(verb)
  making.close()
  for block in range(3):
    for step in range(2):
      assert seen[block, step][:2] == ['D', 'C'][: len(seen[block, step])]
      assert block > 1 or len(seen[block, step]) == 2


def test_a_loop_without_stages_has_one_turn_of_all_steps():
  making = studio.Studio(make('block_first')).open('a', seed=0)
  assert making.turns(2) == {'turns': [[2]], 'steps': 2, 'verbs': [['DC']]}
  assert making.send('b', recache=True) == 1
  making.close()


def test_as_many_videos_as_the_device_has_room_for(monkeypatch):
  one = studio.Studio(make(), places=9)
  assert one.places == 9
  need = modes.estimate_memory(one._engine('batched'), one.pipeline.params, 1)
  room = need.total + 2.5 * need.caches
  monkeypatch.setattr(modes, 'device_memory', lambda device: room / 0.8)
  assert studio.Studio(make(), places=9).places == 3
  assert studio.Studio(make(), places=9, share_batch=True).places == 1


def test_sessions_of_one_batch_make_the_blocks_of_sessions_alone():
  alone = studio.Studio(make()).open('a', seed=3)
  expected = [alone.first, alone.next(), alone.next()]
  one = studio.Studio(make(), share_batch=True, places=2)
  one.warm_up('b')
  first, other = one.open('a', seed=3), one.open('b', seed=4)
  first.begin()
  blocks = one.step([first])
  other.begin()
  blocks += [one.step([other, first])[1] for _ in range(2)]
  assert first.turns(2) == alone.turns(2)
  for block, wanted in zip(blocks, expected, strict=True):
    # Sums of a batch are in another order: a level of 255 may differ.
    np.testing.assert_allclose(block.astype(int), wanted.astype(int), atol=1)
  # Another mode is a stream of its own.
  assert one.open('a', seed=0, mode='serial').row is None
  with pytest.raises(ValueError, match="goes with mode 'batched'"):
    studio.Studio(make(), mode='serial', share_batch=True)
