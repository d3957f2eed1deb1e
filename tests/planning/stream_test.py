"""Plans: what is counted by hand, and what a TPU's compiler says."""

import functools
import importlib.util

import jax
import pytest

from hiar_jax import noise_schedule, rollout
from hiar_jax.configs import hiar_1_3b
from hiar_jax.denoiser import Denoiser
from hiar_jax.models import splash, umt5, vae
from hiar_jax.models.config import WanConfig
from hiar_jax.models.flops import PassFlops
from hiar_jax.planning import chips, compiled, hlo, traffic
from hiar_jax.planning import parts as planning_parts
from hiar_jax.planning import stream as planning_stream
from hiar_jax.sampling import meshes

LEVELS = noise_schedule.warped_levels((1000, 750, 500, 250), 5.0)
# Sizes apart from each other, so that a shape tells what it is of.
MODEL = WanConfig(
  dim=256,
  ffn_dim=512,
  num_heads=2,
  num_layers=3,
  latent_height=8,
  latent_width=8,
  channels=4,
  freq_dim=16,
  text_dim=24,
  text_len=40,
  dtype='bfloat16',
  attention='splash',
)
ROLLOUT = rollout.RolloutConfig(levels=LEVELS, window=9)

needs_compiler = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None, reason='needs the extra tpu'
)


@functools.cache
def tiny_plan() -> planning_stream.Plan:
  # The tests' precision, 'highest', is not one of a product of bfloat16 in a
  # TPU kernel.
  with jax.default_matmul_precision('default'):
    return planning_stream.plan_tick(
      Denoiser(MODEL),
      ROLLOUT,
      'v5e:2x2',
      batch_size=1,
      weights_dtype='bfloat16',
    )


@needs_compiler
def test_a_plan_divides_passes_over_chips():
  def plan(**options):
    with jax.default_matmul_precision('default'):
      return planning_stream.plan_tick(
        *(Denoiser(MODEL), ROLLOUT, 'v5e:2x1'),
        **dict(batch_size=1, mode='block_first', **options),
      )

  mesh = meshes.SamplingMesh(tensor=2)
  whole = plan(weights_dtype='bfloat16', mesh=mesh)
  # Two heads, one on each; kernels divided by hand over all axes.
  assert whole.num_chips == 2 and whole.fits
  past = 6 * MODEL.tokens_per_frame * MODEL.dim * MODEL.num_layers
  assert whole.caches == 2 * 2 * past // 2
  eight = plan(weights_dtype='int8', products_dtype='int8', mesh=mesh)
  assert eight.weights < 0.7 * whole.weights
  with pytest.raises(ValueError, match='a plan takes the 2 of'):
    plan(weights_dtype='bfloat16', mesh=meshes.SamplingMesh(tensor=4))


def test_the_full_size_pass_has_the_papers_flops():
  config = hiar_1_3b.get_config()
  flops = planning_stream.pass_flops(
    WanConfig(**config.model),
    rollout.RolloutConfig(levels=LEVELS, **config.rollout),
  )
  # HiAR at 480x832: 4680 tokens a block, 32,760 in the window.
  assert flops.linear == pytest.approx(11.7e12, rel=0.005)
  assert flops.attention == pytest.approx(28.3e12, rel=0.005)
  assert flops.cross == pytest.approx(0.44e12, rel=0.005)
  assert flops.total == pytest.approx(40.4e12, rel=0.002)


@pytest.mark.parametrize(
  'seconds, words',
  [
    (None, 'none given'),
    (-1.0, 'none given'),
    (1.0, '1 s for 2 ticks, not to be used: less than at peak rate'),
    (3.0, '3 s for 2 ticks'),
  ],
)
def test_a_time_that_no_chip_can_reach_is_marked(seconds, words):
  peak = chips.CHIPS['v5e'].peak
  plan = planning_stream.Plan(
    topology='v5e:2x2',
    num_chips=4,
    stages_per_chip=1,
    weights=0,
    caches=0,
    other=0,
    temporaries=0,
    flops=PassFlops(linear=peak, attention=0.0, cross=0.0),
    collectives=[],
    compiler_seconds=seconds,
    compile_seconds=0.0,
  )
  assert plan.compiler_estimate() == words
  assert words in plan.table()


def test_flops_of_the_formula_are_those_that_the_compiler_counts():
  # One layer, as the compiler counts a loop's body once.
  model = WanConfig(
    dim=256,
    ffn_dim=512,
    num_heads=2,
    num_layers=1,
    latent_height=16,
    latent_width=16,
    text_dim=24,
    text_len=40,
  )
  denoiser = Denoiser(model)
  params = jax.eval_shape(denoiser.init, jax.random.key(0))
  states = jax.ShapeDtypeStruct((1, 40, 24), 'float32')
  text = jax.eval_shape(denoiser.project_text, params, states)
  sampler = rollout.Sampler(denoiser, params, text, ROLLOUT)
  past = jax.eval_shape(sampler.empty_past)
  x = jax.ShapeDtypeStruct((1, *ROLLOUT.block_shape(model)), 'float32')

  def one_pass(params, x, text, past):
    return denoiser.flow(params, x, 0.5, text, past=past)

  counted = jax.jit(one_pass).lower(params, x, text, past).compile()
  counted = counted.cost_analysis()['flops']
  ours = planning_stream.pass_flops(model, ROLLOUT).total
  # It also counts norms, softmax and what else goes element by element.
  assert ours == pytest.approx(counted, rel=0.08)


def test_collectives_and_their_bytes_are_found_in_a_program():
  hlo = """
  %a = f32[1,3,4]{2,1,0:T(8,128)} parameter(0)
  %p = (f32[1,3,4]{2,1,0:T(8,128)}, f32[1,3,4]{2,1,0:T(8,128)}, u32[]{:S(2)})\
 collective-permute-start(%a), channel_id=1
  %d = f32[1,3,4]{2,1,0:T(8,128)} collective-permute-done(%p)
  ROOT %g = bf16[8,16]{1,0:T(8,128)(2,1)} all-gather(%b), dimensions={0}
  %r = (pred[5]{0}, s32[]{:T(128)}) all-reduce(%x, %y), to_apply=%sum
  """
  assert traffic.collectives(hlo) == [
    traffic.Collective('collective-permute', 'f32[1,3,4]', 48, 48),
    traffic.Collective('all-gather', 'bf16[8,16]', 256, 128),
    traffic.Collective('all-reduce', 'pred[5], s32[]', 9, 9),
  ]


@pytest.mark.parametrize(
  ('topology', 'message'),
  [
    ('v9z:2x2', "topology 'v9z:2x2' does not begin with one of"),
    ('', "topology '' does not begin with one of"),
  ],
)
def test_a_chip_that_is_unknown_is_refused(topology, message):
  with pytest.raises(ValueError, match=message):
    planning_stream.stage_mesh(topology, 4)


@needs_compiler
@pytest.mark.parametrize(
  ('topology', 'message'),
  [
    ('v5e', "libtpu knows no topology 'v5e'"),
    ('v5e:3x3', "libtpu knows no topology 'v5e:3x3'"),
    ('v5e:2x4', '4 stages do not divide over the 8 chips'),
  ],
)
def test_a_topology_that_does_not_serve_is_refused(topology, message):
  with pytest.raises(ValueError, match=message):
    planning_stream.stage_mesh(topology, 4)


def test_a_missing_compiler_is_named_with_its_extra(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=r"needs libtpu.*'hiar_jax\[tpu\]'"):
    planning_stream.stage_mesh('v5e:2x2', 4)


@needs_compiler
def test_a_tick_on_a_tpu_moves_latents_and_nothing_else():
  plan = tiny_plan()
  assert plan.collectives
  for collective in plan.collectives:
    assert collective.kind == 'collective-permute'
    assert collective.shape == 'f32[1,1,3,8,8,4]'
  # The parser would miss what it does not know.
  for name in ('all-gather', 'all-reduce', 'all-to-all', 'reduce-scatter'):
    assert name not in plan.hlo
  assert 'tpu_custom_call' in plan.hlo, 'not the kernel that was asked for'


@needs_compiler
def test_a_tick_on_a_tpu_copies_no_window():
  window = {splash.padded(9 * 16), MODEL.num_heads, MODEL.head_dim}
  program = hlo.parse(tiny_plan().hlo)
  # So few heads lie otherwise outside of the program.
  moved = [
    one.name
    for name, computation in program.computations.items()
    for one in computation.instructions
    if name != program.entry
    and one.opcode in ('copy', 'copy-start', 'pad', 'concatenate', 'transpose')
    and any(set(array.shape) - {1} == window for array in one.arrays)
  ]
  assert moved == []


@needs_compiler
def test_a_chip_holds_all_weights_and_the_caches_of_its_own_stages():
  plan = tiny_plan()
  params = jax.eval_shape(Denoiser(MODEL).init, jax.random.key(0))
  assert plan.weights == 2 * sum(a.size for a in jax.tree.leaves(params))
  # Keys and values: layers x tokens of the window x width x 2 bytes.
  assert plan.caches == 2 * 3 * splash.padded(9 * 16) * 256 * 2
  assert plan.other > 0 and plan.temporaries > 0
  assert plan.fits and '| fits | yes' in plan.table()


ENCODER = umt5.UMT5Config(
  vocab_size=32,
  dim=128,
  ffn_dim=320,
  num_heads=4,
  attention_dim=128,
  num_layers=1,
)
VAE = vae.VAEConfig(
  base_dim=8,
  z_dim=4,
  dim_mult=(1, 2),
  num_res_blocks=1,
  temporal_downsample=(True,),
  mean=(0.0,) * 4,
  std=(1.0,) * 4,
)


def test_a_mode_of_one_chip_is_refused_on_several():
  mesh = jax.make_mesh((4,), ('stage',))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(planning_stream, 'stage_mesh', lambda *_: mesh)
    with pytest.raises(ValueError, match="mode 'serial' is one of a single"):
      planning_stream.plan_tick(
        *(Denoiser(MODEL), ROLLOUT, 'v5e:2x2'),
        batch_size=1,
        weights_dtype='bfloat16',
        mode='serial',
      )


def test_flops_of_a_prompt_are_those_that_the_compiler_counts():
  params = jax.eval_shape(lambda: umt5.init(ENCODER, jax.random.key(0)))
  ids = jax.ShapeDtypeStruct((1, 64), 'int32')
  program = compiled.compile_program(
    jax.jit(lambda params, ids: umt5.encode(ENCODER, params, ids, ids)),
    (params, ids),
  )
  ours = planning_parts.text_flops(ENCODER, 64)
  assert ours == pytest.approx(program.flops, rel=0.08)


@needs_compiler
def test_a_decode_in_tiles_over_chips_has_every_band_once():
  def plan(**bands):
    return planning_parts.plan_vae_decode(
      VAE,
      'v5e:2x2',
      frames=3,
      latent_height=96,
      latent_width=2,
      weights_dtype='bfloat16',
      **bands,
    )

  with jax.default_matmul_precision('default'):
    whole, found = plan(), plan(tiles=2, decode=2)
  assert '2 tiles | each of 2 chips' in found.table()
  # A chip has half of the bands, with their margins, and not all of the past.
  assert found.state < whole.state
  # Both turns of a chip are counted, where the compiler counts one.
  assert found.flops > 1.3 * found.program.flops


@needs_compiler
@pytest.mark.parametrize('part', ['vae', 'text'])
def test_a_part_fits_a_chip_and_says_what_it_holds(part):
  with jax.default_matmul_precision('default'):
    if part == 'vae':
      plan = planning_parts.plan_vae_decode(
        VAE,
        'v5e:2x2',
        frames=3,
        latent_height=8,
        latent_width=8,
        weights_dtype='bfloat16',
      )
      params = jax.eval_shape(lambda: vae.init(VAE, jax.random.key(0)))
      params = params['decoder']
      assert plan.state > 0
    else:
      plan = planning_parts.plan_text_encoder(
        ENCODER, 'v5e:2x2', tokens=16, weights_dtype='bfloat16'
      )
      params = jax.eval_shape(lambda: umt5.init(ENCODER, jax.random.key(0)))
  assert plan.weights == 2 * sum(a.size for a in jax.tree.leaves(params))
  assert plan.fits and '| fits | yes' in plan.table()
  assert plan.flops > 0
