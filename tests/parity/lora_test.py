"""Adapters that are saved here, read by diffusers' own loader."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')
pytest.importorskip('peft')

from hiar_jax.models import lora  # noqa: E402
from hiar_jax.weights import (  # noqa: E402
  adapter_files,
  conversion,
  identity,
  networks,
  tables,
)
from tests import fake_release  # noqa: E402

MODEL = fake_release.CONFIGS['transformer']
CONFIG = lora.LoRAConfig(rank=4, alpha=6.0)

# torch and its companions are not written for warnings that are errors.
pytestmark = pytest.mark.filterwarnings('default')


def drawn(shapes, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda a: rng.normal(0, 0.3, a.shape).astype(np.float32), shapes
  )


@pytest.mark.parametrize('naming', adapter_files.NAMINGS)
def test_diffusers_fuses_what_we_merge(tmp_path, naming):
  base = drawn(identity.abstract_params(MODEL), 0)
  adapters = drawn(lora.init(CONFIG, base, jax.random.key(0)), 1)
  ours = tmp_path / 'ours.safetensors'
  networks.save_weights(ours, base)
  model = tmp_path / 'model' / 'diffusion_pytorch_model.safetensors'
  conversion.network_to_foreign(ours, MODEL, model, naming='diffusers')
  adapter_files.save(
    tmp_path / 'lora.safetensors', adapters, CONFIG, MODEL, naming=naming
  )
  peer = diffusers.WanTransformer3DModel.from_pretrained(model.parent)
  state = diffusers.WanPipeline.lora_state_dict(
    tmp_path, weight_name='lora.safetensors'
  )
  peer.load_lora_adapter(state)
  peer.fuse_lora()
  peer.unload_lora()
  fused = {name: t.detach().numpy() for name, t in peer.state_dict().items()}
  merged = tables.flatten(lora.merge(base, adapters, CONFIG.scale))
  expected = identity.expected_slots(MODEL, 'diffusers')
  assert expected.keys() <= fused.keys()
  plain = tables.flatten(base)
  for name, slot in expected.items():
    of = lambda a, i=slot.index: np.asarray(a if i is None else a[i])
    np.testing.assert_allclose(
      fused[name],
      slot.to_foreign(of(merged[slot.path])),
      atol=1e-5,
      err_msg=name,
    )
    changed = lora.factors(slot.path)[0] in tables.flatten(adapters)
    same = np.array_equal(fused[name], slot.to_foreign(of(plain[slot.path])))
    assert same != changed, name
