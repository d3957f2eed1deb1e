"""A run is known by what it was made of, wherever that lies."""

import shutil

import numpy as np
import pytest

from hiar_jax.training import continuation
from hiar_jax.weights import networks
from tests import tiny


def _config(root, **changes):
  return {
    'workdir': str(root / 'run'),
    'iterations': 10,
    'teacher_weights': str(root / 'teacher.safetensors'),
    'codec': {'path': str(root / 'codec.npz'), 'channels': 4},
    'trajectories': {'dir': str(root / 'trajectories'), 'num': 4},
    'videos': {'path': str(root / 'videos')},
    'start_weights': '',
    **changes,
  }


@pytest.fixture
def root(tmp_path):
  root = tmp_path / 'before'
  (root / 'trajectories').mkdir(parents=True)
  (root / 'videos').mkdir()
  (root / 'trajectories' / 'manifest.json').write_text('{"num": 4}')
  (root / 'videos' / 'a.mp4').write_bytes(b'a')
  np.savez(root / 'codec.npz', mean=np.zeros(3))
  _weights(root, 1.0)
  return root


def _weights(root, value):
  networks.save_weights(
    root / 'teacher.safetensors', {'a': np.full(4, value, np.float32)}
  )


def test_moved_inputs_are_the_same_inputs(root, tmp_path):
  saved = continuation.record(_config(root))
  moved = tmp_path / 'after'
  shutil.move(root, moved)
  assert not continuation.differences(
    saved, continuation.record(_config(moved))
  )


@pytest.mark.parametrize(
  ('name', 'content'),
  [
    ('codec.npz', b'another'),
    ('trajectories/manifest.json', b'{"num": 8}'),
    ('videos/b.mp4', b'b'),
  ],
)
def test_other_inputs_elsewhere_are_named(root, tmp_path, name, content):
  saved = continuation.record(_config(root))
  other = tmp_path / 'other'
  shutil.copytree(root, other)
  (other / name).write_bytes(content)
  (found,) = continuation.differences(
    saved, continuation.record(_config(other))
  )
  assert str(root / name.split('/')[0]) in found and ' -> ' in found


def test_weights_that_were_replaced_in_their_place_are_named(root):
  saved = continuation.record(_config(root))
  _weights(root, 2.0)
  found = continuation.differences(saved, continuation.record(_config(root)))
  path = root / 'teacher.safetensors'
  assert found == [f'teacher_weights: {path} is not what it was']


def test_a_set_of_files_may_grow_where_it_is(root):
  saved = continuation.record(_config(root))
  (root / 'trajectories' / 'manifest.json').write_text('{"num": 8}')
  assert not continuation.differences(saved, continuation.record(_config(root)))


def test_checkpoints_without_hashes_are_compared_by_paths(root, tmp_path):
  saved = _config(root)
  assert not continuation.differences(saved, continuation.record(_config(root)))
  found = continuation.differences(
    saved, continuation.record(_config(tmp_path / 'elsewhere'))
  )
  assert [line.split(':')[0] for line in found] == [
    *('codec.path', 'teacher_weights', 'trajectories.dir', 'videos.path')
  ]


def test_longer_is_no_change_and_shorter_is(root):
  saved = continuation.record(_config(root))
  longer = continuation.record(_config(root, iterations=20))
  assert not continuation.differences(saved, longer)
  assert continuation.differences(longer, saved) == ['iterations: 20 -> 10']


@pytest.mark.parametrize('phase', ['teacher', 'student_start', 'distill'])
def test_every_path_of_a_config_is_known(phase, tmp_path):
  config = tiny.config(phase, tmp_path).to_dict()
  moved = tiny.config(phase, tmp_path / 'moved').to_dict()
  keys = {
    key
    for key, value in continuation._flat(config).items()
    if value != continuation._flat(moved)[key]
  }
  assert keys - {'workdir'} == {
    key for key in keys if continuation._is_path(key)
  }
