"""Weights in torch pickles, and networks of torch's libraries; needs torch."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from hiar_jax.weights import (
  conversion,
  foreign,
  identity,
  layouts,
  lora_files,
  releases,
  safetensors_io,
)
from tests import fake_release

torch = pytest.importorskip('torch')
import safetensors.torch  # noqa: E402  It imports torch.

OPTIONS = conversion.Options(
  latent_size=(4, 4), compute_dtype='float32', attention='xla', head_dim=12
)


def tensors(arrays: dict[str, np.ndarray], dtype=None) -> dict:
  return {
    name: torch.from_numpy(array).to(dtype or torch.float32)
    for name, array in arrays.items()
  }


def wrapped(state: dict) -> dict:
  """Names as a training under FSDP with checkpointed layers leaves them."""
  return {
    'model._fsdp_wrapped_module.'
    + name.replace('.ffn.', '._checkpoint_wrapped_module.ffn.'): tensor
    for name, tensor in state.items()
  }


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
  reader = safetensors_io.Reader(path)
  return {name: reader.read(name) for name in reader.entries}


def same(found: dict, expected: dict) -> None:
  """Equal bits of our arrays and torch's tensors."""
  assert found.keys() == expected.keys()
  for name, tensor in expected.items():
    bits = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    np.testing.assert_array_equal(
      fake_release.bits(found[name]), bits, err_msg=name
    )


@pytest.fixture(scope='module')
def wan_state():
  return fake_release.state_dict('transformer', 'wan')


def test_training_checkpoint_comes_back_bit_by_bit(tmp_path, wan_state):
  average = tensors(wan_state, torch.bfloat16)
  raw = {name: tensor + 1 for name, tensor in average.items()}
  path = tmp_path / 'in' / 'hiar.pt'
  path.parent.mkdir()
  torch.save(
    {
      'generator': wrapped(raw),
      'generator_ema': wrapped(average),
      'critic': {},
      'step': 7,
    },
    path,
  )
  # The average is what is sampled from, unless the other is asked for.
  for member, state in ((None, average), ('generator', raw)):
    ours = tmp_path / f'ours_{member}'
    conversion.to_ours(
      releases.find(path),
      ours,
      name='tiny',
      options=conversion.Options(
        **(vars(OPTIONS) | {'member': member, 'shard_bytes': 4000})
      ),
    )
    conversion.to_foreign(ours, tmp_path / f'out_{member}', naming='wan')
    file = tmp_path / f'out_{member}' / layouts.FILES['wan']['transformer']
    same(read(file), state)
  with pytest.raises(ValueError, match="has no 'student'; it has .'generator'"):
    foreign.StateDict(path, member='student')


def test_the_lora_of_a_trainers_pickle_is_that_of_its_network(
  tmp_path, wan_state
):
  name = 'blocks.1.ffn.2'
  outputs, inputs = wan_state[f'{name}.weight'].shape

  def factors(value):
    stem = f'base_model.model.{name}'
    return {
      f'{stem}.lora_A.weight': torch.full((3, inputs), value),
      f'{stem}.lora_B.weight': torch.full((outputs, 3), value),
    }

  path = tmp_path / 'lora.pt'
  torch.save(
    {'generator_lora': factors(0.5), 'critic_lora': factors(7.0), 'step': 7},
    path,
  )
  opened = lora_files.open_lora(path, fake_release.CONFIGS['transformer'])
  # Alpha is the rank where nothing says another.
  np.testing.assert_allclose(
    opened.added('layers/ffn_out/kernel', 1), np.full((inputs, outputs), 0.75)
  )


def test_wans_own_pickles_are_found_and_read(tmp_path):
  states = {}
  for kind, name, dtype in (
    ('vae', 'Wan2.1_VAE.pth', torch.float32),
    ('text_encoder', 'models_t5_umt5-xxl-enc-bf16.pth', torch.bfloat16),
  ):
    states[kind] = tensors(fake_release.state_dict(kind, 'wan'), dtype)
    torch.save(states[kind], tmp_path / name)
  release = releases.find(tmp_path)
  for kind, state in states.items():
    network = identity.open_network(getattr(release, kind))
    assert (network.kind, network.naming) == (kind, 'wan')
    same({n: network.state.read(n) for n in network.state.shapes}, state)


def test_old_files_that_cannot_be_mapped_are_read(tmp_path, wan_state):
  path = tmp_path / 'old.pth'
  torch.save(tensors(wan_state), path, _use_new_zipfile_serialization=False)
  state = foreign.StateDict(path)
  np.testing.assert_array_equal(
    state.read('head.head.bias'), wan_state['head.head.bias']
  )


class _Code:
  def __reduce__(self):
    return os.system, ('touch ran',)


def test_code_in_a_pickle_is_neither_run_nor_accepted(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  path = tmp_path / 'evil.pt'
  torch.save({'generator': {}, 'x': _Code()}, path)
  with pytest.raises(ValueError) as caught:
    foreign.StateDict(path)
  caught.match('evil.pt was not opened: .* code .*system')
  assert '\n' not in str(caught.value)
  assert not (tmp_path / 'ran').exists()


def test_damaged_and_empty_pickles_are_named(tmp_path, wan_state):
  path = tmp_path / 'cut.pt'
  torch.save(tensors(wan_state), path)
  path.write_bytes(path.read_bytes()[:-200])
  with pytest.raises(ValueError, match='cut.pt is cut after'):
    foreign.StateDict(path)
  torch.save({'step': 1, 'args': {'lr': 2}}, tmp_path / 'none.pt')
  with pytest.raises(ValueError, match=r"has no weights; it has \['step', 'a"):
    foreign.StateDict(tmp_path / 'none.pt')
  with pytest.raises(FileNotFoundError, match='no weights at'):
    foreign.StateDict(tmp_path / 'nowhere.pt')


@pytest.mark.parametrize('kept', [10, 300, 0.5, -200, -22])
def test_a_pickle_is_said_to_be_cut_wherever_it_is(tmp_path, wan_state, kept):
  path = tmp_path / 'cut.pt'
  torch.save(tensors(wan_state), path)
  whole = path.read_bytes()
  path.write_bytes(whole[: int(len(whole) * kept) if kept == 0.5 else kept])
  with pytest.raises(ValueError, match='cut.pt is cut after .* fetch it again'):
    foreign.StateDict(path)


@pytest.mark.parametrize('part', ['index', 'shard', 'folder'])
def test_pickles_in_shards_are_read_by_their_index(tmp_path, wan_state, part):
  names = sorted(wan_state)
  weight_map = {}
  for shard, chosen in enumerate((names[::2], names[1::2]), 1):
    file = f'diffusion_pytorch_model-0000{shard}-of-00002.bin'
    weight_map |= dict.fromkeys(chosen, file)
    state = tensors({name: wan_state[name] for name in chosen})
    torch.save(state, tmp_path / file)
  index = tmp_path / 'diffusion_pytorch_model.bin.index.json'
  index.write_text(json.dumps({'weight_map': weight_map}))
  path = {
    'index': index,
    'shard': tmp_path / file,
    'folder': releases.find(tmp_path).transformer,
  }[part]
  state = foreign.StateDict(path)
  assert state.shapes.keys() == wan_state.keys()
  for name in names:
    np.testing.assert_array_equal(state.read(name), wan_state[name])
  (tmp_path / file).unlink()
  with pytest.raises(FileNotFoundError, match='1 of 2 shards .*00002-of-00002'):
    foreign.StateDict(index)


_SAVE_DTENSORS = """
import os, sys, numpy as np, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group(
  'gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
mesh = init_device_mesh('cpu', (2,))
arrays = dict(np.load(f'{folder}/state.npz'))
for name, placement in (('whole', Replicate()), ('part', Shard(0))):
  state = {k: distribute_tensor(torch.from_numpy(v), mesh, [placement])
           for k, v in arrays.items()}
  torch.save({'model': state}, f'{folder}/{name}_{rank}.pt')
dist.destroy_process_group()
"""


def test_fsdp2s_tensors_are_read_if_they_are_whole(tmp_path):
  array = np.arange(12, dtype=np.float32).reshape(4, 3)
  np.savez(tmp_path / 'state.npz', **{'head.head.bias': array})
  runs = [
    subprocess.Popen(
      [sys.executable, '-c', _SAVE_DTENSORS, str(rank), str(tmp_path)]
    )
    for rank in range(2)
  ]
  assert [run.wait(120) for run in runs] == [0, 0]
  state = foreign.StateDict(tmp_path / 'whole_1.pt')
  np.testing.assert_array_equal(state.read('head.head.bias'), array)
  with pytest.raises(ValueError) as caught:
    foreign.StateDict(tmp_path / 'part_1.pt')
  caught.match("part_1.pt has one process's part of 'head.head.bias'")
  caught.match(r'\(2, 3\) of \(4, 3\).*full_state_dict=True')


def test_a_pickle_named_as_safetensors_is_read(tmp_path, wan_state):
  torch.save(tensors(wan_state), tmp_path / 'x.safetensors')
  state = foreign.StateDict(tmp_path / 'x.safetensors')
  assert state.shapes.keys() == wan_state.keys()


def test_shapes_are_checked_in_pickles_too(tmp_path, wan_state):
  state = tensors(wan_state)
  state['blocks.1.ffn.0.weight'] = torch.zeros(16, 5)
  torch.save({'generator': wrapped(state)}, tmp_path / 'x.pt')
  with pytest.raises(ValueError, match=r"'blocks.1.ffn.0.weight' in .*x.pt"):
    identity.open_network(tmp_path / 'x.pt', head_dim=12)


def _networks():
  diffusers = pytest.importorskip('diffusers')
  transformers = pytest.importorskip('transformers')
  torch.manual_seed(0)
  return {
    'transformer': diffusers.WanTransformer3DModel(
      num_attention_heads=2,
      attention_head_dim=12,
      text_dim=16,
      freq_dim=8,
      ffn_dim=16,
      num_layers=2,
    ),
    'vae': diffusers.AutoencoderKLWan(
      base_dim=4,
      dim_mult=[1, 2],
      num_res_blocks=1,
      temperal_downsample=[True],
    ),
    'text_encoder': transformers.UMT5EncoderModel(
      transformers.UMT5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2
      )
    ),
  }


def test_what_diffusers_saves_comes_back_for_it_to_load(tmp_path):
  networks = _networks()
  for kind, network in networks.items():
    network.save_pretrained(tmp_path / 'in' / kind, max_shard_size='20KB')
  assert len(list((tmp_path / 'in').rglob('*-00002-of-*'))) >= 2
  release = releases.find(tmp_path / 'in')
  conversion.to_ours(release, tmp_path / 'ours', name='x', options=OPTIONS)
  conversion.to_foreign(tmp_path / 'ours', tmp_path / 'out', naming='diffusers')
  for kind, network in networks.items():
    folder = tmp_path / 'out' / kind
    if kind == 'text_encoder':
      again = type(network).from_pretrained(folder)
    else:
      # What from_pretrained does; of its own it wants another package here.
      again = type(network).from_config(type(network).load_config(folder))
      file = folder / 'diffusion_pytorch_model.safetensors'
      again.load_state_dict(safetensors.torch.load_file(file))
    state = network.state_dict()
    assert again.state_dict().keys() == state.keys()
    for name, tensor in again.state_dict().items():
      assert torch.equal(tensor, state[name]), name
