"""A run goes on exactly where it was, or says in one sentence why not."""

import os
import pathlib
import shutil

import flax.struct
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hiar_jax.runtime import provenance
from hiar_jax.training import checkpoint
from hiar_jax.weights import networks


@flax.struct.dataclass
class _State:
  step: jax.Array
  params: dict
  opt_state: optax.OptState
  key: jax.Array


def _state(step: int = 3) -> _State:
  params = {
    'layer': {'kernel': jnp.arange(2048.0).reshape(32, 64) + step},
    'scale': jnp.full((3,), 1.5, jnp.bfloat16),
  }
  optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  return _State(
    jnp.int32(step), params, optimiser.init(params), jax.random.key(step)
  )


def _data() -> grain.DatasetIterator:
  return iter(
    grain.MapDataset.range(100).shuffle(seed=1).batch(4).to_iter_dataset()
  )


def _assert_equal(actual, expected) -> None:
  def equal(a, b):
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)

  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(equal, actual, expected)


@pytest.fixture(scope='module')
def saved(tmp_path_factory) -> pathlib.Path:
  """A run with one checkpoint, of step 3; tests break copies."""
  directory = tmp_path_factory.mktemp('run')
  data = _data()
  next(data)
  with checkpoint.make_manager(directory) as manager:
    checkpoint.save(manager, 3, _state(), data, {'seed': 1, 'window': (6, 21)})
  return directory


def _restore(directory, state=None):
  with checkpoint.make_manager(directory) as manager:
    return checkpoint.restore(
      manager, 3, _state() if state is None else state, _data()
    )


def test_resume_is_bit_exact_including_next_batch(saved):
  state, data, config = _restore(saved, networks.abstract(_state(0)))
  _assert_equal(state, _state())
  expected = _data()
  next(expected)
  np.testing.assert_array_equal(next(data), next(expected))
  assert config == {'seed': 1, 'window': [6, 21]}


def test_config_can_be_read_before_the_state_is_built(saved):
  with checkpoint.make_manager(saved) as manager:
    config = checkpoint.restore_config(manager, 3)
  assert config['seed'] == 1


def test_state_returns_onto_the_sharding_that_is_asked_for(saved):
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  sharding = NamedSharding(mesh, PartitionSpec('data'))
  wanted = networks.abstract(_state())
  kernel = jax.ShapeDtypeStruct((32, 64), jnp.float32, sharding=sharding)
  wanted.params['layer']['kernel'] = kernel
  state, _, _ = _restore(saved, wanted)
  assert state.params['layer']['kernel'].sharding == sharding
  _assert_equal(state, _state())


def test_state_may_be_donated_while_it_is_being_saved(tmp_path):
  step = jax.jit(lambda x: jax.tree.map(jnp.negative, x), donate_argnums=0)
  params = _state().params
  with checkpoint.make_manager(tmp_path) as manager:
    checkpoint.save(manager, 3, params, _data(), {})
    step(params)
    manager.wait_until_finished()
    restored, _, _ = checkpoint.restore(manager, 3, _state().params)
  _assert_equal(restored, _state().params)


def test_newest_checkpoints_and_every_kth_are_kept(tmp_path):
  with checkpoint.make_manager(
    tmp_path, max_to_keep=2, keep_every=4
  ) as manager:
    assert checkpoint.latest_step(manager) is None
    for step in range(1, 8):
      checkpoint.save(manager, step, {'x': jnp.ones(2)}, _data(), {})
    manager.wait_until_finished()
    assert checkpoint.latest_step(manager) == 7
    assert sorted(manager.all_steps()) == [4, 6, 7]


def test_the_best_checkpoint_is_kept_besides(tmp_path):
  losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: float('nan'), 5: 4.0}
  settings = dict(max_to_keep=1, keep_best='loss')

  def run(directory, **kwargs):
    with checkpoint.make_manager(directory, **settings, **kwargs) as manager:
      for step, loss in losses.items():
        values = {'loss': loss, 'others': [1]}
        checkpoint.save(
          manager, step, {'x': jnp.ones(2)}, _data(), {}, metrics=values
        )
      manager.wait_until_finished()
      return sorted(manager.all_steps())

  assert run(tmp_path / 'min') == [2, 5]
  assert run(tmp_path / 'max', best='max') == [5]
  # A run that goes on still knows, also of steps without the metric.
  with checkpoint.make_manager(tmp_path / 'min', **settings) as manager:
    checkpoint.save(manager, 6, {'x': jnp.ones(2)}, _data(), {})
    manager.wait_until_finished()
    assert sorted(manager.all_steps()) == [2, 6]


def test_a_checkpoint_names_the_code_that_saved_it(saved, tmp_path):
  version = {'hiar_jax': '0.1.0', 'commit': 'a' * 40}
  with checkpoint.make_manager(tmp_path) as manager:
    checkpoint.save(
      manager, 1, {'x': jnp.ones(2)}, _data(), {}, version=version
    )
    manager.wait_until_finished()
    assert checkpoint.restore_version(manager, 1) == version
  with checkpoint.make_manager(saved) as manager:
    assert checkpoint.restore_version(manager, 3) == {}


def test_a_half_written_checkpoint_is_ignored(saved, tmp_path):
  directory = tmp_path / 'run'
  shutil.copytree(saved, directory)
  shutil.copytree(saved / '3', directory / '4.orbax-checkpoint-tmp')
  with checkpoint.make_manager(directory) as manager:
    assert checkpoint.latest_step(manager) == 3


@pytest.mark.parametrize('damage', ['truncated', 'deleted', 'flipped'])
def test_damage_to_any_file_is_named(saved, tmp_path, damage):
  files = sorted(f for f in (saved / '3').glob('*/**/*') if f.is_file())
  assert len(files) > 8
  # The largest holds the arrays, where orbax itself notices no flipped bit.
  files.sort(key=lambda f: -f.stat().st_size)
  for number, original in enumerate([*files[:2], saved / '3' / 'files.json']):
    directory = tmp_path / str(number)
    shutil.copytree(saved, directory)
    file = directory / original.relative_to(saved)
    content = bytearray(file.read_bytes())
    if damage == 'truncated':
      os.truncate(file, len(content) // 2)
    elif damage == 'deleted':
      file.unlink()
    else:
      content[len(content) // 2] ^= 0x80
      file.write_bytes(content)
    kind = FileNotFoundError if damage == 'deleted' else ValueError
    with pytest.raises(kind, match=f'checkpoint {directory}/3 is .*{file}'):
      _restore(directory)


def test_a_missing_step_is_named_with_the_saved_ones(saved):
  with (
    checkpoint.make_manager(saved) as manager,
    pytest.raises(FileNotFoundError, match=r'step 4 in .*steps are \[3\]'),
  ):
    checkpoint.restore(manager, 4, _state())


def test_a_file_in_the_way_of_the_directory_is_named(tmp_path):
  (tmp_path / 'run').write_text('')
  with pytest.raises(NotADirectoryError, match='run is a file'):
    checkpoint.make_manager(tmp_path / 'run')


def test_every_mismatch_with_the_model_is_named_at_once(saved):
  state = _state()
  params = {'layer': {'kernel': jnp.zeros((8, 64))}, 'bias': jnp.zeros(3)}
  with pytest.raises(ValueError) as error:
    _restore(saved, state.replace(params=params))
  for problem in (
    'params/bias is missing',
    'params/scale is unknown',
    'params/layer/kernel has shape (32, 64), not (8, 64)',
  ):
    assert problem in str(error.value)


def test_config_differences_list_changed_added_and_removed_keys():
  old = {'a': 1, 'b': {'c': (1, 2), 'd': 0.5}, 'log': {'every': 10}, 'x': 1}
  new = {'a': True, 'b': {'c': [1, 2], 'd': 0.25}, 'log': {'every': 5}, 'y': 1}
  assert provenance.config_differences(old, new, ignore=['log']) == [
    'a: 1 -> True',
    'b.d: 0.5 -> 0.25',
    'x: 1 -> absent',
    'y: absent -> 1',
  ]
  assert provenance.config_differences(old, old) == []


def test_weights_return_as_they_were(tmp_path):
  path = tmp_path / 'weights.safetensors'
  params = _state().params
  networks.save_weights(path, params, metadata={'config': '{}'})
  _assert_equal(networks.load_weights(path, params), params)
  assert networks.read_metadata(path) == {'config': '{}'}
  assert os.listdir(tmp_path) == ['weights.safetensors']


def test_shipped_weights_are_half_the_size_and_load_as_float32(tmp_path):
  path = tmp_path / 'weights.safetensors'
  params = {'kernel': jnp.linspace(-1, 1, 4096), 'count': jnp.arange(4)}
  networks.save_weights(path, params, dtype=jnp.bfloat16)
  assert path.stat().st_size < 8192 + 512
  loaded = networks.load_weights(path, params)
  assert loaded['kernel'].dtype == np.float32
  np.testing.assert_array_equal(
    loaded['kernel'], params['kernel'].astype(jnp.bfloat16).astype(jnp.float32)
  )
  np.testing.assert_array_equal(loaded['count'], params['count'])


def test_weights_may_be_read_by_whoever_may_read_new_files(tmp_path):
  networks.save_weights(tmp_path / 'weights', {'a': jnp.ones(3)})
  (tmp_path / 'other').touch()
  modes = [(tmp_path / name).stat().st_mode for name in ('weights', 'other')]
  assert modes[0] == modes[1]


def test_weights_of_another_model_are_refused_with_all_mismatches(tmp_path):
  path = tmp_path / 'weights.safetensors'
  networks.save_weights(path, {'a': jnp.ones((2, 3)), 'b': jnp.ones(1)})
  with pytest.raises(ValueError) as error:
    networks.load_weights(path, {'a': jnp.ones((3, 2)), 'c': jnp.ones(1)})
  assert 'c is missing; b is unknown; a has shape (2, 3), not (3, 2)' in str(
    error.value
  )


def test_missing_and_truncated_weights_are_named(tmp_path):
  path = tmp_path / 'weights.safetensors'
  with pytest.raises(FileNotFoundError, match=f'no weights at {path}'):
    networks.load_weights(path, {})
  networks.save_weights(path, {'a': jnp.ones((20, 30))})
  os.truncate(path, 1000)
  with pytest.raises(ValueError, match=f'{path} are damaged'):
    networks.load_weights(path, {'a': jnp.ones((20, 30))})
  with pytest.raises(ValueError, match=f'{path} are damaged'):
    networks.read_metadata(path)
