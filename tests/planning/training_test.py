"""Plans of training: what is counted by hand, and what the compiler says."""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from hiar_jax.configs import hiar_1_3b
from hiar_jax.data import trajectories
from hiar_jax.denoiser import Denoiser
from hiar_jax.models import flops, lora, sharding
from hiar_jax.models.config import WanConfig
from hiar_jax.planning import chips, programs, roofline, traffic
from hiar_jax.planning import training as planning_training
from hiar_jax.training import distillation_phase, phase_parts
from hiar_jax.weights import networks
from tests import sharded_update

needs_compiler = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None, reason='needs the extra tpu'
)


# Large enough for the kernels of a TPU.
KERNEL = Denoiser(
  WanConfig(
    dim=256,
    ffn_dim=512,
    num_heads=2,
    num_layers=8,
    latent_height=32,
    latent_width=32,
    channels=4,
    freq_dim=32,
    text_dim=64,
    text_len=16,
    dtype='bfloat16',
    remat='full',
    attention='auto',
  )
)


def tiny(**mesh) -> programs.Training:
  return programs.Training(
    steps=sharded_update.steps(),
    mesh=sharding.MeshConfig(**mesh),
    batch_size=4,
    num_blocks=3,
    iterations=100,
    teacher_dtype='bfloat16',
    trajectory=trajectories.TrajectoryConfig(num_steps=4),
    trajectory_batch=4,
    trajectory_teacher=sharded_update.STUDENT,
    trajectory_dtype='bfloat16',
    trajectory_mesh=sharding.MeshConfig(data=-1),
  )


def full_size(**mesh) -> programs.Training:
  c = hiar_1_3b.get_config()
  return dataclasses.replace(
    tiny(**mesh),
    steps=distillation_phase.distillation(c),
    batch_size=c.batch_size,
    num_blocks=c.rollout_blocks[1],
    iterations=c.iterations,
    trajectory=phase_parts.trajectory_config(c),
  )


# --- Counting.


def test_collectives_in_loops_count_as_often_as_they_run():
  mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=8))
  split = NamedSharding(mesh, PartitionSpec('fsdp'))

  def body(carry, _):
    total = jax.lax.with_sharding_constraint(
      carry * 2, NamedSharding(mesh, PartitionSpec())
    )
    return jax.lax.with_sharding_constraint(jnp.sin(total), split), None

  def three_times_five(x):
    def outer(x, _):
      return jax.lax.scan(body, x, None, length=5)

    x = jax.lax.scan(outer, x, None, length=3)[0]
    # And once more, if at all, as terms of a loss do.
    finite = jnp.isfinite(jnp.sum(x))
    return jax.lax.while_loop(
      lambda state: (state[0] < 1) & finite,
      lambda state: (state[0] + 1, body(state[1], None)[0]),
      (jnp.int32(0), x),
    )[1]

  x = jax.ShapeDtypeStruct((64,), jnp.float32, sharding=split)
  hlo = jax.jit(three_times_five).lower(x).compile().as_text()
  found = traffic.traffic(hlo, unknown_trips=5.0)
  (gathers,) = [one for one in found if one.kind == 'all-gather']
  assert gathers.count == 15 + 1
  # 7 of 8 parts of 64 numbers, each time.
  assert gathers.num_bytes == 16 * 7 / 8 * 64 * 4


@needs_compiler
def test_loops_of_a_tpu_count_as_often_as_they_run():
  """Which says of none: 3 x 5 layers, 5 in a loop of unknown length, 5 once."""
  devices = chips.describe('v5e:2x2').devices
  mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4), devices)
  split = NamedSharding(mesh, PartitionSpec('fsdp'))
  rows = NamedSharding(mesh, PartitionSpec(None, 'fsdp'))
  whole = NamedSharding(mesh, PartitionSpec())

  def layers(x, w):
    def layer(x, w):
      w = jax.lax.with_sharding_constraint(w, whole)
      return jnp.tanh(x @ w), None

    return jax.lax.scan(layer, x, w)[0]

  def run(x, w, n):
    x = jax.lax.scan(lambda x, _: (layers(x, w), None), x, None, length=3)[0]
    x = jax.lax.fori_loop(0, n, lambda _, x: layers(x, w), x)
    finite = jnp.isfinite(x[0, 0])
    return jax.lax.while_loop(
      lambda state: (state[0] < 1) & finite,
      lambda state: (state[0] + 1, layers(state[1], w)),
      (jnp.int32(0), x),
    )[1]

  program = jax.jit(run).lower(
    jax.ShapeDtypeStruct((512, 256), jnp.float32, sharding=split),
    jax.ShapeDtypeStruct((5, 256, 256), jnp.bfloat16, sharding=rows),
    jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
  )
  text = program.compile().as_text()
  assert 'known_trip_count' not in text
  found = traffic.traffic(text, unknown_trips=2.0)
  (gathers,) = [one for one in found if one.kind == 'all-gather']
  assert gathers.count == 3 * 5 + 2 * 5 + 5
  # 3 of 4 parts of 256 x 256 in bfloat16, each time.
  assert gathers.num_bytes == 30 * 3 / 4 * 256 * 256 * 2


# As a TPU's compiler writes it: in three fusions, and it runs once.
ASYNCHRONOUS = """
%begun (p: f32[2]) -> (f32[2], f32[8]) {
  %p = f32[2]{0} parameter(0)
  %g = f32[8]{0} all-gather(%p), channel_id=5, replica_groups=[2,4]<=[8]
  ROOT %t = (f32[2]{0}, f32[8]{0}) tuple(%p, %g)
}

%async_collective_fusion.3 (p1: f32[2]) -> f32[8] {
  %p1 = f32[2]{0} parameter(0)
  ROOT %g1 = f32[8]{0} all-gather(%p1), channel_id=5, replica_groups=[2,4]<=[8]
}

%ended (p2: f32[2]) -> f32[8] {
  %p2 = f32[2]{0} parameter(0)
  ROOT %g2 = f32[8]{0} all-gather(%p2), channel_id=5, replica_groups=[2,4]<=[8]
}

ENTRY %main (x: f32[2]) -> f32[8] {
  %x = f32[2]{0} parameter(0)
  %async-collective-start.1 = (f32[2]{0}, f32[8]{0}) fusion(%x), kind=kCustom, \
calls=%begun
  %beside = f32[8]{0} fusion(%x), kind=kLoop, calls=%async_collective_fusion.3
  ROOT %async-collective-done.1 = f32[8]{0} fusion(%x), kind=kCustom, \
calls=%ended
}
"""


def test_an_asynchronous_gather_of_a_tpu_is_counted_once():
  (gathers,) = traffic.traffic(ASYNCHRONOUS, unknown_trips=1.0)
  assert (gathers.count, gathers.num_bytes) == (1, 24)
  chip = chips.chip_of('v5e:2x2')
  work = roofline.roofline(ASYNCHRONOUS, chip).classes[roofline.COLLECTIVES]
  assert work.num_bytes == 24 and work.seconds == 24 / chip.link


@pytest.mark.parametrize(
  ('line', 'num_bytes'),
  [
    ('%a = f32[8]{0} all-reduce(%x), replica_groups={{0,1,2,3}}', 48),
    ('%a = f32[8]{0} all-gather(%x), replica_groups=[2,4]<=[8]', 24),
    ("%a = f32[8]{0} all-gather(%x), replica_groups=mesh['a'=2] {'a'}", 16),
    (
      "%a = f32[8] all-gather(%x), replica_groups=mesh['a'=2,'b'=8] "
      "{'a','b':(1)2}",
      24,
    ),
    ('%a = f32[2]{0} reduce-scatter(%x), replica_groups=[2,4]<=[8]', 24),
    ('%a = f32[8]{0} collective-permute(%x), source_target_pairs={}', 32),
    # An asynchronous one gives its operands first; several may be one.
    (
      '%a = ((f32[8]{0}, f32[4]{0}), (f32[2]{0}, f32[1]{0})) '
      'reduce-scatter-start(%x, %y), replica_groups=[2,4]<=[8]',
      36,
    ),
    (
      '%a = ((f32[2]{0}, f32[1]{0}), (f32[8]{0}, f32[4]{0})) '
      'all-gather-start(%x, %y), replica_groups=[2,4]<=[8]',
      36,
    ),
    (
      '%a = (f32[8]{0}, f32[4]{0}) all-reduce-start(%x, %y), '
      'replica_groups={{0,1,2,3}}',
      72,
    ),
    (
      '%a = (f32[8]{0}, f32[8]{0}, u32[], u32[]) '
      'collective-permute-start(%x), source_target_pairs={}',
      32,
    ),
  ],
)
def test_bytes_that_a_chip_sends_in_a_ring(line, num_bytes):
  hlo = f'ENTRY %main (x: f32[8]) -> f32[8] {{\n  {line}\n}}'
  (one,) = traffic.traffic(hlo, unknown_trips=1.0)
  assert one.num_bytes == num_bytes


def test_full_size_flops_are_the_papers():
  training = full_size()
  generator = planning_training.part_flops(training, 'generator')
  critic = planning_training.part_flops(training, 'critic')
  # 2.5 sweeps of 13 passes (7 blocks, all but the last committed). With a full
  # window one is 40.4 TFLOP, 28.3 of them attention, see stream_test; block b
  # has b + 1 blocks of the window's 7 to see.
  blocks = [12.1e12 + 28.3e12 * (b + 1) / 7 for b in range(7)]
  assert generator['rollout'] == pytest.approx(
    64 * 2.5 * (2 * sum(blocks) - blocks[-1]), rel=0.002
  )
  assert critic['rollout'] == generator['rollout']
  # Two passes over 32,760 tokens of 40 layers: 28.9 T linear and cross, and
  # 4 * 40 * 32760^2 * 5120 / 1e12 of attention each.
  linear = 2 * 40 * 32760 * (6 * 5120**2 + 2 * 5120 * 13824)
  attention = 4 * 40 * 32760 * (32760 + 512) * 5120
  assert generator['real score'] == pytest.approx(
    64 * 2 * (linear + attention), rel=1e-6
  )
  # Critic: a forward, that again, and twice as much backward.
  one = flops.forward_flops(training.steps.critic.config, 21, 21)
  assert critic['critic'] == 64 * 4 * one


def test_an_iteration_has_a_part_of_a_generator_step():
  def plan(part, flops):
    return planning_training.TrainingPlan(
      part=part,
      topology='v5p:2x2x1',
      training=tiny(fsdp=4),
      held={},
      temporaries=0,
      flops={'all': flops * 4 * chips.CHIPS['v5p'].peak},
      traffic=[],
      compile_seconds=0.0,
    )

  said = planning_training.summary(plan('generator', 10.0), plan('critic', 3.0))
  assert said.startswith('5.00 s an iteration')
  assert 'modelled' in said


# --- What the compiler says.


@needs_compiler
@pytest.mark.parametrize(
  'part',
  [
    'trajectory',
    pytest.param('critic', marks=pytest.mark.slow),
    pytest.param('generator', marks=pytest.mark.slow),
  ],
)
def test_a_small_distillation_is_compiled_for_a_pod(part):
  training = dataclasses.replace(
    tiny(fsdp=2, context=2),
    # A size and a mesh of its own.
    trajectory_mesh=sharding.MeshConfig(fsdp=2, tensor=2),
  )
  plan = planning_training.plan_part(training, part, 'v5e:2x2')
  assert plan.fits and not plan.proposal
  assert {'all-gather'} <= {t.kind for t in plan.traffic}
  # In bfloat16, over the chips that divide parameters.
  network, ways = sharded_update.TEACHER, 2
  if part == 'trajectory':
    network, ways = sharded_update.STUDENT, 4
  whole = sum(2 * a.size for a in jax.tree.leaves(programs.params(network)))
  assert 1 <= plan.held['teacher'] / whole * ways < 1.5
  assert f'{part} on v5e:2x2' in plan.table()


@needs_compiler
def test_a_mesh_that_should_fit_is_proposed():
  training = full_size(fsdp=64)
  # If, compiled, this mesh took 153 GB of 95.
  said = planning_training.propose(training, 'v5p:4x4x4', 153e9)
  assert '--config.mesh.fsdp=16' in said and 'not compiled' in said
  # What took more than the formula says scales it.
  assert said != planning_training.propose(training, 'v5p:4x4x4', 400e9)
  said = planning_training.propose(training, 'v5e:2x2', 153e9)
  assert said.startswith('no mesh of v5e:2x2')


@needs_compiler
def test_an_exit_pass_of_blocks_is_proposed_where_it_suffices():
  training = full_size(fsdp=64)
  numbers = training.steps.config

  def said(**changes):
    config = dataclasses.replace(numbers, **changes)
    steps = dataclasses.replace(training.steps, config=config)
    planned = dataclasses.replace(training, steps=steps)
    # Of v5p's 95 GB; what should fit leaves a quarter free.
    return planning_training.propose(planned, 'v5p:4x4x4', 78e9)

  assert 'fsdp=64' in said()
  assert 'exit_pass=blocks' in said()
  # A block's past is detached.
  assert 'exit_pass' not in said(past_gradient='straight_through')
  # What is proposed can be given to the config.
  config = hiar_1_3b.get_config('distill')
  keys = re.findall(r'--config\.(\w+)\.(\w+)=', said())
  assert keys and all(name in config[section] for section, name in keys)


@pytest.mark.parametrize(
  ('way', 'phases'), [('parallel', 15.2), ('blocks', 12)]
)
def test_the_formula_is_near_the_sum_of_compiled_phases(way, phases):
  """GB of one v5p chip of 64, see docs/tpu.md."""
  training = full_size(fsdp=64)
  training = training.with_mesh(training.mesh, 1, way)
  said = planning_training.estimated_bytes(training)
  assert said / 1e9 == pytest.approx(phases, rel=0.1)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize('part', ['generator', 'critic'])
def test_no_collective_is_larger_than_a_layer_or_a_samples_keys(part):
  """On eight chips that divide samples and parameters.

  What becomes of a layout that is not laid out on each chip, the next but one
  test sees: here the compiler divides it.
  """
  model = KERNEL.config
  steps = dataclasses.replace(
    sharded_update.steps(), student=KERNEL, critic=KERNEL, teacher=KERNEL
  )
  training = dataclasses.replace(
    tiny(fsdp=8), steps=steps, batch_size=8, num_blocks=2
  )
  mesh, training = planning_training._on_topology(training, part, 'v5e:2x4')
  run, arguments, _ = programs.program(training, part, mesh)
  # Not the precision of the tests, in which the kernel has no 16-bit products.
  with jax.set_mesh(mesh), jax.default_matmul_precision('default'):
    text = run.lower(*arguments).compile().as_text()
  layer = 4 * (6 * model.dim**2 + 2 * model.dim * model.ffn_dim)
  frames = training.num_frames
  keys = 2 * 2 * frames * model.tokens_per_frame * model.dim
  # What a gather of the keys of all samples would take.
  assert 8 * keys / 2 > max(layer, keys)
  large = [
    one for one in traffic.collectives(text) if one.num_bytes > max(layer, keys)
  ]
  assert not large, large


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize('way', ['adapters', 'blocks'])
def test_one_chip_makes_every_pass_once(way):
  """What no turn of a loop changes, XLA takes out of it, and makes it twice."""
  steps = dataclasses.replace(
    sharded_update.steps(), student=KERNEL, critic=KERNEL, teacher=KERNEL
  )
  if way == 'adapters':
    steps = dataclasses.replace(steps, adapters=lora.LoRAConfig(rank=4))
  else:
    numbers = dataclasses.replace(steps.config, exit_pass=way)
    steps = dataclasses.replace(steps, config=numbers)
  training = dataclasses.replace(
    tiny(fsdp=1), steps=steps, batch_size=1, num_blocks=2
  )
  mesh, training = planning_training._on_topology(
    training, 'generator', 'v5e:1x1'
  )
  run, arguments, _ = programs.program(training, 'generator', mesh)
  with jax.set_mesh(mesh), jax.default_matmul_precision('default'):
    text = run.lower(*arguments).compile().as_text()
  kernels = ('fwd_segmented_residuals', 'dq_segmented', 'dkv_segmented')
  found = [
    len(re.findall(rf'%splash_mha_{kernel}[\w.]* = ', text))
    for kernel in kernels
  ]
  # Self-attention of two blocks and of the forward KL. Cross-attention of the
  # exit pass, once or for each block, and of the forward KL.
  passes = 3 + (2 if way == 'adapters' else 3)
  # And the values again, which remat does not keep.
  assert found == [2 * passes, passes, passes]


def test_adapters_of_the_teachers_own_network_have_no_base_beside_it():
  training = tiny(fsdp=2, tensor=2, context=2)
  steps = dataclasses.replace(
    training.steps,
    teacher=training.steps.student,
    adapters=lora.LoRAConfig(rank=2),
  )
  mesh = sharding.make_mesh(training.mesh)
  for teacher, beside in (
    (steps.teacher, 0),
    (training.steps.teacher, 1),
  ):
    planned = dataclasses.replace(
      training, steps=dataclasses.replace(steps, teacher=teacher)
    )
    _, (state, frozen, *_), _ = programs.program(planned, 'critic', mesh)
    bases = [frozen.student_base, frozen.critic_base]
    assert [base is not None for base in bases] == [bool(beside)] * 2
    names = networks.shapes(state.student.params)
    assert names['layers/ffn_in/lora_down'][-1] == 2
    assert 'layers/ffn_in/kernel' not in names


@needs_compiler
def test_keys_are_laid_out_without_gathering_other_samples():
  """On 64 chips: on 8 or 16 the compiler divides a layout by itself."""
  model = WanConfig(
    dim=256,
    ffn_dim=256,
    num_heads=2,
    num_layers=2,
    latent_height=16,
    latent_width=32,
    channels=4,
    freq_dim=64,
    text_dim=64,
    text_len=16,
    dtype='bfloat16',
    attention='auto',
  )
  denoiser = Denoiser(model)
  devices = chips.describe('v5p:4x4x4').devices
  mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=64), devices)
  by_sample = NamedSharding(mesh, PartitionSpec(sharding.BATCH))
  array = lambda *shape: jax.ShapeDtypeStruct(
    shape, 'float32', sharding=by_sample
  )

  def flow(params, x, states):
    text = denoiser.project_text(params, states)
    return denoiser.flow(params, x, 0.5, text)[0]

  shapes = jax.eval_shape(denoiser.init, jax.random.key(0))
  with jax.set_mesh(mesh), jax.default_matmul_precision('default'):
    text = (
      jax.jit(flow)
      .lower(
        sharding.abstract(shapes, mesh),
        array(64, 6, 16, 32, 4),
        array(64, 16, 64),
      )
      .compile()
      .as_text()
    )
  one_sample = 2 * 6 * model.tokens_per_frame * model.dim
  layer = 2 * (6 * model.dim**2 + 2 * model.dim * model.ffn_dim)
  found = traffic.collectives(text)
  assert found
  large = [one for one in found if one.num_bytes > max(layer, one_sample)]
  assert not large, large
