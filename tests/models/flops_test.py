"""Modelled FLOPs agree with what XLA counts, and speed becomes utilisation."""

import types

import jax
import jax.numpy as jnp
import pytest

from hiar_jax.denoiser import Denoiser
from hiar_jax.models import flops
from hiar_jax.models.config import WanConfig
from hiar_jax.runtime import profiling
from hiar_jax.training import phases
from tests import tiny

# Wide enough for the matrix products to be nearly all.
_MODEL = WanConfig(
  dim=256,
  ffn_dim=1024,
  num_heads=2,
  num_layers=2,
  unroll=2,
  latent_height=8,
  latent_width=8,
  channels=4,
  freq_dim=32,
  text_dim=16,
  text_len=8,
)


def test_a_pass_counts_what_xla_counts():
  denoiser, frames = Denoiser(_MODEL), 6
  params = jax.eval_shape(lambda: denoiser.init(jax.random.key(0)))
  text = jax.eval_shape(
    denoiser.project_text, params, jnp.zeros((1, 8, 16), jnp.float32)
  )
  shape = (1, frames, 8, 8, 4)
  program = jax.jit(lambda p, x, text: denoiser.flow(p, x, 0.5, text)[0])
  cost = program.lower(
    params, jax.ShapeDtypeStruct(shape, jnp.float32), text
  ).cost_analysis()
  ours = flops.forward_flops(_MODEL, frames, frames)
  # Above ours: what the module's docstring leaves out.
  assert 1.0 < cost['flops'] / ours < 1.1


def test_every_phase_of_the_networks_knows_its_flops_and_tokens(tmp_path):
  tiny.write_inputs(tmp_path)
  phase = {
    name: phases.build(tiny.config(name, tmp_path))
    for name in ('codec', 'teacher', 'student_start', 'distill')
  }
  # Two videos of 6 frames, or 2 blocks of 3, of 4 tokens each.
  tokens = {name: built.tokens for name, built in phase.items()}
  assert tokens.pop('codec') is None
  assert {*tokens.values()} == {2 * 6 * 4}
  built = {name: built.flops for name, built in phase.items()}
  assert built.pop('codec') is None
  config = tiny.config('teacher', tmp_path)
  one = flops.forward_flops(WanConfig(**config.model), 6, 6)
  assert built['teacher'] == config.batch_size * 3 * one
  # Two passes, of which masks leave less than two.
  assert 1 < built['student_start'] / built['teacher'] < 2
  assert built['distill'] > built['teacher']


def test_devices_of_a_kind_that_is_not_known_have_no_peak():
  device = types.SimpleNamespace(device_kind='TPU v5 lite')
  assert flops.peak([device, device]) == 2 * 197e12
  assert flops.peak([device, types.SimpleNamespace(device_kind='abacus')]) is (
    None
  )


@pytest.mark.parametrize('peak', [None, 1e12])
def test_utilisation_is_the_rate_over_the_peak(peak):
  now = iter([0.0, 8.0])
  speed = profiling.Speed(10, 4e11, peak, clock=lambda: next(now))
  values = speed.look(14)  # Half an iteration a second.
  assert values['model_tflops_per_second'] == pytest.approx(0.2)
  assert values.get('mfu') == (peak and pytest.approx(0.2))


def test_videos_and_tokens_a_second_are_those_of_the_iterations():
  now = iter([0.0, 8.0])
  speed = profiling.Speed(10, videos=6, tokens=24.0, clock=lambda: next(now))
  values = speed.look(14)  # Half an iteration a second.
  assert values['videos_per_second'] == 3
  assert values['tokens_per_second'] == 12
  now = iter([0.0, 8.0])
  unknown = profiling.Speed(10, clock=lambda: next(now)).look(14)
  assert 'videos_per_second' not in unknown
