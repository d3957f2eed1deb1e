"""Programs compiled for GPUs: what stands in them, and what does not."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest

from hiar_jax import noise_schedule, rollout
from hiar_jax.denoiser import Denoiser
from hiar_jax.models import vae
from hiar_jax.models.config import WanConfig
from hiar_jax.planning import chips, hlo, parts, roofline, stream

pytestmark = pytest.mark.skipif(
  chips.cuda_plugin() is None, reason='needs the extra plan-cuda'
)

# Sizes apart from each other, so that a shape tells what it is of.
MODEL = WanConfig(
  dim=256,
  ffn_dim=512,
  num_heads=2,
  num_layers=3,
  latent_height=16,
  latent_width=8,
  channels=4,
  freq_dim=16,
  text_dim=24,
  text_len=40,
  dtype='bfloat16',
  attention='auto',
)
ROLLOUT = rollout.RolloutConfig(
  levels=noise_schedule.warped_levels((1000, 750, 500, 250), 5.0), window=9
)
VAE = vae.VAEConfig(
  base_dim=16,
  z_dim=4,
  dim_mult=(1, 2),
  num_res_blocks=1,
  temporal_downsample=(True,),
  mean=(0.0,) * 4,
  std=(1.0,) * 4,
  dtype='bfloat16',
)


@functools.cache
def plan(topology: str = 'h100:1x1x4', mode: str = 'batched') -> stream.Plan:
  with jax.default_matmul_precision('default'):
    return stream.plan_tick(
      *(Denoiser(MODEL), ROLLOUT, topology),
      batch_size=1,
      weights_dtype='bfloat16',
      mode=mode,
    )


def instructions(text: str) -> list[hlo.Instruction]:
  program = hlo.parse(text)
  return [i for c in program.computations.values() for i in c.instructions]


def test_a_tick_takes_cudnns_attention_and_no_other():
  targets = [i.target for i in instructions(plan().hlo)]
  assert '__cudnn$fmhaSoftmax' in targets
  products = [
    i.op_name
    for i in instructions(plan().hlo)
    if i.opcode == 'dot' and 'attention' in i.op_name
  ]
  # Linear layers of the attention, and no scores outside of the kernel.
  assert products
  # One of them is another product on TPUs: the branch of a platform.
  linear = '/[qkvo]/(cond/branch_0_fun/)?dot_general'
  assert [p for p in products if not re.search(linear, p)] == []


def test_a_tick_sends_latents_and_nothing_else():
  assert {c.kind for c in plan().collectives} == {'collective-permute'}
  assert {c.shape for c in plan().collectives} == {'f32[1,1,3,16,8,4]'}


def test_a_tick_has_the_flops_of_the_formula_in_16_bits():
  total = plan().at_best.total
  # Beside the formula: time embedding, patches and the head.
  assert total.flops == pytest.approx(plan().flops.total, rel=0.1)
  products = [i for i in instructions(plan().hlo) if i.opcode == 'dot']
  wide = [
    i.op_name
    for i in products
    if i.arrays[0].dtype == 'f32' and 'layers' in i.op_name
  ]
  assert total.float32_flops < 0.05 * total.flops, wide


# Tokens of 9 frames, up to a multiple of what a kernel takes at a time.
WINDOW = 384


@pytest.mark.parametrize('mode', ['serial', 'shared', 'batched'])
def test_every_mode_of_one_gpu_has_a_plan(mode):
  found = plan('h100:1x1x1', mode)
  assert found.fits and f', {mode} |' in found.table()
  assert not found.collectives
  # A batch has the past, the others the whole window in place.
  tokens = 6 * 32 if mode == 'batched' else WINDOW
  assert found.caches == 4 * 2 * 3 * tokens * 256 * 2


# Of what goes between chip and memory; 0.6 % at 1.3B, see docs/gpu.md.
MOST_COPIES = 0.05


@pytest.mark.parametrize(
  ('topology', 'mode'),
  [
    ('h100:1x1x4', 'batched'),
    ('h100:1x1x1', 'serial'),
    ('h100:1x1x1', 'shared'),
  ],
)
def test_passes_copy_neither_keys_nor_weights(topology, mode):
  found = plan(topology, mode)
  total = found.at_best.total.num_bytes
  copies = found.at_best.classes[roofline.COPIES].num_bytes
  assert copies < MOST_COPIES * total
  # What a layer sees is read where it lies.
  moved = [
    one.name
    for one in instructions(found.hlo)
    if one.opcode in ('copy', 'concatenate', 'transpose', 'dynamic-slice')
    and any({9 * 32, WINDOW} & {*array.shape} for array in one.arrays)
  ]
  assert moved == []


def test_the_vae_decodes_in_16_bits_up_to_the_last_layer():
  with jax.default_matmul_precision('default'):
    found = parts.plan_vae_decode(
      VAE,
      'h100:1x1x1',
      frames=3,
      latent_height=8,
      latent_width=8,
      weights_dtype='bfloat16',
    )
  wide = [
    i
    for i in instructions(found.program.hlo)
    if i.target.startswith('__cudnn$conv') and i.arrays[0].dtype == 'f32'
  ]
  assert len(wide) <= 1
  work = found.program.at_best('h100:1x1x1').classes[roofline.CONVOLUTIONS]
  assert work.float32_flops < 0.05 * work.flops


def test_the_tiny_vae_has_a_plan():
  with jax.default_matmul_precision('default'):
    found = parts.plan_tiny_vae_decode(
      'h100:1x1x1', frames=3, latent_height=8, latent_width=8
    )
  assert found.fits and 'tiny VAE decode, 3 latent' in found.table()
  # A frame of each memory block: 3 of 256 channels, then fewer, twice as wide.
  frame = 4 * 8 * 8
  assert found.state == 3 * frame * (256 + 128 * 4 + 64 * 16)


def test_without_lengths_the_kernel_has_no_padding():
  cfg = dataclasses.replace(MODEL, num_layers=1)
  denoiser = Denoiser(cfg)
  place = jax.sharding.SingleDeviceSharding(
    chips.describe('h100:1x1x1').devices[0]
  )
  abstract = functools.partial(
    jax.tree.map,
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
  )
  params = abstract(jax.eval_shape(denoiser.init, jax.random.key(0)))
  x = abstract(jnp.zeros((1, 3, 16, 8, 4)))
  states = abstract(jnp.zeros((1, 40, 24)))

  def flow(params, x, states):
    return denoiser.flow(params, x, 0.5, denoiser.project_text(params, states))

  with jax.default_matmul_precision('default'):
    text = jax.jit(flow).lower(params, x, states).compile().as_text()
  calls = [i for i in instructions(text) if 'fmha' in i.target]
  assert len(calls) == 2
  assert all('"mask_type": "NO_MASK"' in i.rest for i in calls)
