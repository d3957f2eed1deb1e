"""The grain pipelines: exact resume, on any hosts, truth that is true."""

import chex
import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from hiar_jax.data import bouncing, sources
from hiar_jax.text import word_hash
from hiar_jax.training import checkpoint, inputs

WORLD = bouncing.WorldConfig(num_frames=3)
ENCODER = word_hash.WordHashEncoder(dim=8)


def videos(**kwargs):
  return bouncing.ObjectClips(WORLD, seed=1, crop=16, **kwargs)


def prompts(**kwargs):
  captions = bouncing.Captions(WORLD, seed=1, **kwargs)
  return inputs.PromptStates(captions, ENCODER)


def assert_equal_trees(a, b):
  chex.assert_trees_all_equal(a, b)


def test_a_batch_has_the_stated_shapes():
  batch = next(sources.batches(videos(), batch_size=4, seed=0))
  assert batch['video'].shape == (4, 3, 64, 64, 3)
  assert batch['video'].dtype == np.uint8
  assert batch['crop'].shape == (4, 3, 16, 16, 3)
  assert batch['crop'].dtype == np.uint8
  batch = next(sources.batches(prompts(), batch_size=4, seed=0))
  assert batch['text'].shape == (4, 16, 8)


def test_a_batch_names_its_elements():
  source = prompts(length=10)
  iterator = sources.batches(source, batch_size=4, seed=0)
  # Into the third epoch.
  for batch in (next(iterator) for _ in range(6)):
    assert batch['index'].dtype == np.int64
    for index, states in zip(batch['index'], batch['text'], strict=True):
      np.testing.assert_array_equal(source[int(index)]['text'], states)


@pytest.mark.parametrize('num_threads', [0, 2])
def test_restored_iterator_gives_the_exact_next_batches(num_threads):
  def make():
    return sources.batches(
      videos(), batch_size=3, seed=5, num_threads=num_threads
    )

  iterator = make()
  for _ in range(4):
    next(iterator)
  state = iterator.get_state()
  expected = [next(iterator) for _ in range(3)]
  restored = make()
  restored.set_state(state)
  for batch in expected:
    assert_equal_trees(next(restored), batch)


def test_checkpointed_iterator_gives_the_exact_next_batch(tmp_path):
  iterator = sources.batches(prompts(), batch_size=3, seed=5)
  next(iterator)
  with ocp.CheckpointManager(tmp_path) as manager:
    manager.save(
      1, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator))
    )
    manager.wait_until_finished()
    expected = next(iterator)
    restored = sources.batches(prompts(), batch_size=3, seed=5)
    manager.restore(
      1,
      args=ocp.args.Composite(
        data=grain.checkpoint.CheckpointRestore(restored)
      ),
    )
  assert_equal_trees(next(restored), expected)


def test_a_checkpoint_of_two_hosts_is_read_by_any_of_three(
  tmp_path, monkeypatch
):
  """Without the hosts: what each of them writes and reads of its iterator."""

  def hosts(count):
    """(process index, its iterator)"""
    for i in range(count):
      monkeypatch.setattr(jax, 'process_index', lambda i=i: i)
      yield sources.batches(
        prompts(), batch_size=6, seed=5, shard_index=i, num_shards=count
      )

  handler = checkpoint.IteratorHandler()
  expected = []
  for iterator in hosts(2):
    next(iterator)
    handler.save(tmp_path, checkpoint.IteratorArgs(iterator))
    expected.append(next(iterator)['text'])
  assert len(list(tmp_path.iterdir())) == 1
  restored = []
  for iterator in hosts(3):
    handler.restore(tmp_path, checkpoint.IteratorArgs(iterator))
    restored.append(next(iterator)['text'])
  np.testing.assert_array_equal(
    np.concatenate(restored), np.concatenate(expected)
  )


def test_order_is_shuffled_by_the_seed_and_by_the_epoch():
  source = videos(length=12)

  def epochs(seed):
    iterator = sources.batches(source, batch_size=12, seed=seed)
    return [next(iterator)['index'] for _ in range(2)]

  first, second = epochs(0)
  np.testing.assert_array_equal(np.sort(first), np.sort(second))
  assert not np.array_equal(first, second)
  assert not np.array_equal(first, epochs(1)[0])
  np.testing.assert_array_equal(first, epochs(0)[0])


@pytest.mark.parametrize('num_shards', [1, 2, 3])
def test_hosts_rows_together_are_the_batch_of_one_host(num_shards):
  source = prompts(length=13)

  def hosts(count):
    return [
      sources.batches(
        source, batch_size=6, seed=0, shard_index=i, num_shards=count
      )
      for i in range(count)
    ]

  def rows(iterators):
    return np.concatenate([next(iterator)['text'] for iterator in iterators])

  whole, shared = hosts(1), hosts(num_shards)
  # Beyond the first epoch, whose end runs into the second.
  for _ in range(5):
    np.testing.assert_array_equal(rows(shared), rows(whole))


@pytest.mark.parametrize('num_threads', [0, 2])
def test_a_state_goes_on_on_another_number_of_hosts(num_threads):
  source = prompts(length=31)

  def hosts(count):
    return [
      sources.batches(
        source,
        batch_size=4,
        seed=7,
        shard_index=i,
        num_shards=count,
        num_threads=num_threads,
      )
      for i in range(count)
    ]

  def rows(iterators):
    return np.concatenate([next(iterator)['text'] for iterator in iterators])

  two = hosts(2)
  for _ in range(9):
    rows(two)
  states = [iterator.get_state() for iterator in two]
  assert states[0] == states[1]
  expected = [rows(two) for _ in range(3)]
  for count in (1, 2, 4):
    others = hosts(count)
    for iterator in others:
      iterator.set_state(states[0])
    for batch in expected:
      np.testing.assert_array_equal(rows(others), batch)


def test_truth_is_what_the_video_shows():
  element, truth = videos()[11], videos().scene(11)
  y, x = truth.positions[0]
  # No shape is wide enough to reach the opposite corner.
  far_y, far_x = (0 if y > 32 else 63), (0 if x > 32 else 63)
  np.testing.assert_array_equal(
    element['video'][0, far_y, far_x], truth.background_rgb
  )
  reach = int(truth.radius)
  near = element['video'][0][
    int(y) - reach : int(y) + reach, int(x) - reach : int(x) + reach
  ]
  assert (near == truth.rgb).all(axis=-1).any()


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'batch_size': 0}, 'batch_size=0'),
    ({'batch_size': 9}, r'batch_size=9 must be in \[1, 8\]'),
    ({'batch_size': 5, 'num_shards': 2}, 'batch_size=5 is not a multiple'),
    ({'shard_index': 2, 'num_shards': 2}, 'shard_index=2'),
    ({'seed': -1}, 'seed=-1'),
  ],
)
def test_an_impossible_pipeline_is_refused(kwargs, message):
  arguments = {'batch_size': 2, 'seed': 0} | kwargs
  with pytest.raises(ValueError, match=message):
    sources.batches(prompts(length=8), **arguments)
