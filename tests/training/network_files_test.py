"""Networks by path: sizes of their own, dtype and place as the config says."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.models import sharding
from hiar_jax.models.config import WanConfig
from hiar_jax.training import network_files
from hiar_jax.weights import layouts, networks
from tests import tiny


@pytest.fixture
def config(tmp_path):
  """Of a distillation with a folder of a larger teacher."""
  c = tiny.config('distill', tmp_path)
  c.model.remat = 'full'
  larger = WanConfig(**(c.model.to_dict() | dict(num_layers=3, remat='none')))
  folder = tmp_path / 'large'
  folder.mkdir()
  sizes = {'model': dataclasses.asdict(larger)}
  (folder / layouts.CONFIG_FILE).write_text(json.dumps(sizes))
  params = tiny.random_params(network_files.Denoiser(larger), 0)
  networks.save_weights(folder / layouts.STUDENT_FILE, params)
  c.teacher_weights = str(folder)
  return c


def test_a_folder_tells_its_sizes_and_computes_as_the_student_does(config):
  found = network_files.find(config, 'critic', 'teacher')
  assert found.name == 'teacher'
  assert found.denoiser.config.num_layers == 3
  assert found.denoiser.config.remat == 'full'
  assert found.load()['layers']['ffn_in']['bias'].shape[0] == 3


def test_dtype_and_placement_are_the_configs(config):
  mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2))
  places = {}
  for placement in network_files.PLACEMENTS:
    with config.unlocked():
      config.teacher = dict(dtype='bfloat16', placement=placement)
    params = network_files.find(config, 'teacher').load(mesh)
    kernel = params['layers']['ffn_in']['kernel']
    assert kernel.dtype == jnp.bfloat16
    places[placement] = kernel.is_fully_replicated
  assert places == {'divided': False, 'whole': True}
  # What is trained has masters.
  trained = network_files.find(config, 'teacher').trained().load(mesh)
  kernel = trained['layers']['ffn_in']['kernel']
  assert kernel.dtype == jnp.float32 and not kernel.is_fully_replicated


def test_other_weights_have_another_digest(config, tmp_path):
  digest = network_files.find(config, 'teacher').digest()
  assert digest == network_files.find(config, 'teacher').digest() != ''
  path = tmp_path / 'large' / layouts.STUDENT_FILE
  params = networks.load_weights(
    path, network_files.find(config, 'teacher').abstract()
  )
  networks.save_weights(path, jax.tree.map(lambda x: np.asarray(x) + 1, params))
  assert network_files.find(config, 'teacher').digest() != digest
  path.unlink()
  assert network_files.find(config, 'teacher').digest() == ''


def test_mistakes_are_named(config, tmp_path):
  config.student_weights = str(tmp_path / 'large')
  with pytest.raises(ValueError, match='has num_layers=3, and the config num_'):
    network_files.find_student(config, 'student')
  with pytest.raises(ValueError, match='distill config has no real_weights'):
    network_files.find(config, 'real')
  (tmp_path / 'empty').mkdir()
  config.teacher_weights = str(tmp_path / 'empty')
  with pytest.raises(FileNotFoundError, match='no network in .*hiar-jax conv'):
    network_files.find(config, 'teacher')
  with pytest.raises(ValueError, match="placement='here' is not one of"):
    network_files.NetworkConfig(placement='here')
