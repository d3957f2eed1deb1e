"""Does a distillation fit a TPU pod? Answered by compiling it, as in stream.py.

Three programs: the generator's step, the critic's step, and the teacher's
sampling of trajectories, each divided over all chips of a topology as training
divides it (models/sharding.py). Times are modelled: FLOPs at the chips' peak
rate, and collectives at the full rate of their links, whichever is longer.
"""

# B batch, F latent frames, P tokens per frame, N layers, S steps, D width

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hiar_jax.data import trajectories
from hiar_jax.models import flops, sharding
from hiar_jax.planning import chips, compiled, programs, roofline, traffic
from hiar_jax.planning import stream as planning_stream
from hiar_jax.planning.programs import PARTS, Training
from hiar_jax.training import exit_pass
from hiar_jax.training import flops as training_flops

_DAY = 86400.0
# Token streams and feed-forward widths that a layer holds at a time, with its
# gradient and without, see `estimated_bytes`.
_TRAINED, _SCORED = 8, 3.5


def part_flops(training: Training, part: str) -> dict[str, float]:
  """FLOPs of a part by what they are for, all chips together.

  Those of `training_flops.distillation_flops`, with what remat computes again;
  of 'trajectory' all steps of the teacher, with guidance.
  """
  steps = training.steps
  if part == 'trajectory':
    levels, _ = trajectories.solver_levels(
      training.trajectory, steps.rollout.levels
    )
    passes = 2 * (len(levels) - 1) * training.trajectory_batch
    frames = training.num_frames
    teacher = training.trajectory_teacher.config
    one = flops.forward_flops(teacher, frames, frames)
    return {'teacher': passes * one}
  return training_flops.distillation_flops(
    *(steps, part, training.batch_size, training.num_blocks), recompute=True
  )


# --- Plans.


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
  """What a part needs of one chip; bytes are a chip's.

  Attributes:
    part: one of PARTS.
    topology: such as 'v5p:4x4x4'.
    training: what was planned, its mesh filled up.
    held: bytes of the arguments by what they are.
    temporaries: see planning.Plan.
    flops: of a call, all chips together, by what they are for.
    traffic: of a call, one chip's.
    compile_seconds: see planning.Plan.
    refusal: see planning.Plan.
    proposal: see `propose`, where this does not fit.
    at_best: work of one chip.
    hlo: the compiled program.
  """

  part: str
  topology: str
  training: Training
  held: dict[str, int]
  temporaries: int | None
  flops: dict[str, float]
  traffic: list[traffic.Traffic]
  compile_seconds: float
  refusal: str = ''
  proposal: str = ''
  at_best: roofline.Roofline | None = None
  hlo: str = dataclasses.field(default='', repr=False)

  @property
  def kind(self) -> str:
    return self.topology.partition(':')[0]

  @property
  def chip(self) -> chips.Chip:
    return chips.chip_of(self.topology)

  @property
  def num_chips(self) -> int:
    return math.prod(dataclasses.astuple(self.training.mesh))

  @property
  def total(self) -> int:
    """Bytes of one chip, as far as they are known."""
    return sum(self.held.values()) + (self.temporaries or 0)

  @property
  def fits(self) -> bool:
    return self.temporaries is not None and self.total <= self.chip.hbm

  @property
  def compute_seconds(self) -> float:
    flops = sum(self.flops.values())
    return flops / self.num_chips / self.chip.peak

  @property
  def link_seconds(self) -> float:
    return sum(t.num_bytes for t in self.traffic) / self.chip.link

  @property
  def seconds(self) -> float:
    """Modelled time of a call, as if all ran at its peak: a lower bound."""
    return max(self.compute_seconds, self.link_seconds)

  def table(self) -> str:
    """A Markdown table."""
    gigabytes, link = planning_stream.gigabytes, self.chip.link
    room = f'{gigabytes(self.total)} of {gigabytes(self.chip.hbm)} a chip'
    fits = f'yes: {room}' if self.fits else f'no: {self.refusal or room}'
    temporaries = 'unknown'
    if self.temporaries is not None:
      temporaries = gigabytes(self.temporaries)
    flops = ' + '.join(
      f'{name} {value / 1e15:.3g}' for name, value in self.flops.items()
    )
    sent = '; '.join(
      f'{t.kind} {t.count:.0f} times, {gigabytes(t.num_bytes)}'
      for t in self.traffic
    )
    rows = [
      (f'{self.part} on {self.topology}', str(self.training.mesh)),
      ('fits', fits),
      *((name, gigabytes(size)) for name, size in self.held.items()),
      ('temporaries', temporaries),
      *planning_stream.largest_rows(self.hlo),
      (
        'FLOPs, all chips',
        f'{sum(self.flops.values()) / 1e15:.4g} P: {flops}',
      ),
      (
        'at peak rate (modelled)',
        f'{self.compute_seconds:.2f} s at {self.chip.peak / 1e12:.0f} TFLOP/s',
      ),
      ('a chip sends', sent or 'nothing'),
      (
        'at full link rate (modelled)',
        f'{self.link_seconds:.2f} s at {link / 1e9:.0f} GB/s',
      ),
      *(self.at_best.rows() if self.at_best else ()),
      ('compiling took', f'{self.compile_seconds:.0f} s'),
    ]
    if self.proposal:
      rows.append(('instead', self.proposal))
    return planning_stream.markdown(rows)


def summary(generator: TrainingPlan, critic: TrainingPlan) -> str:
  """One line: the run's time if all went at its peak."""
  training = generator.training
  every = training.steps.config.generator_every
  iteration = critic.seconds + generator.seconds / every
  days = training.iterations * iteration / _DAY
  return (
    f'{iteration:.2f} s an iteration (a critic step, and a generator step '
    f'every {every}), {days:.1f} days for {training.iterations} iterations: '
    'modelled, at the peak rate of chips or links, so a lower bound'
  )


def plan_part(training: Training, part: str, topology: str) -> TrainingPlan:
  """Compiles a part for all chips of a topology.

  Args:
    training: what is planned.
    part: one of PARTS.
    topology: see chips.describe.

  Raises:
    ValueError: see chips.describe and sharding; also for an unknown part.
  """
  if part not in PARTS:
    raise ValueError(f'part {part!r} is not one of {PARTS}')
  if part == 'trajectory':
    training = dataclasses.replace(training, mesh=training.trajectory_mesh)
  mesh, training = _on_topology(training, part, topology)
  run, arguments, named = programs.program(training, part, mesh)
  with jax.set_mesh(mesh):
    program = compiled.compile_program(run, arguments)
  held = {name: compiled.bytes_per_chip(tree) for name, tree in named.items()}
  # The compiler pads arrays to its tiles.
  held['other arguments'] = program.arguments - sum(held.values())
  unknown_trips = (training.steps.rollout.num_steps - 1) / 2
  plan = TrainingPlan(
    part=part,
    topology=topology,
    training=training,
    held=held,
    temporaries=program.temporaries,
    flops=part_flops(training, part),
    traffic=traffic.traffic(program.hlo, unknown_trips=unknown_trips),
    at_best=program.at_best(topology, unknown_trips=unknown_trips),
    compile_seconds=program.compile_seconds,
    refusal=program.refusal,
    hlo=program.hlo,
  )
  if plan.fits or part == 'trajectory':
    return plan
  # A refusal does not say how much it would have taken: more than there is.
  size = max(plan.total, plan.chip.hbm)
  return dataclasses.replace(plan, proposal=propose(training, topology, size))


def _on_topology(
  training: Training, part: str, topology: str
) -> tuple[Mesh, Training]:
  devices = chips.describe(topology).devices
  filled = training.mesh.filled(len(devices))
  mesh = sharding.make_mesh(filled, devices)
  if part == 'trajectory':
    teacher = training.trajectory_teacher
    sharding.check_model('trajectory_teacher', teacher.config, mesh)
    sharding.check_batch(training.trajectory_batch, 1, mesh)
  else:
    _check_networks(training, mesh)
    sharding.check_batch(training.batch_size, training.microbatches, mesh)
  return mesh, dataclasses.replace(training, mesh=filled)


def _check_networks(training: Training, mesh: Mesh) -> None:
  """Raises a ValueError if a size of a network does not divide."""
  steps = training.steps
  sharding.check_model('model', steps.student.config, mesh)
  sharding.check_model('teacher', steps.teacher.config, mesh)
  for denoiser in (steps.student, steps.teacher):
    sharding.shardings(programs.params(denoiser), mesh)


# --- A mesh that fits.


def propose(training: Training, topology: str, compiled_bytes: float) -> str:
  """What should fit, as flags of launch/plan.py.

  Candidates are ranked by how little they divide inside of a sample, then by
  how few microbatches they need, then those with an exit pass of all blocks at
  once come first; the first whose bytes, by a formula and not by the compiler,
  leave a quarter of a chip free is proposed.

  Args:
    training: what did not fit; its mesh is filled up.
    topology: see chips.describe.
    compiled_bytes: of a chip that it takes. Where that is more than the formula
      says, the formula is scaled to it.
  """
  devices = chips.describe(topology).devices
  hbm = chips.chip_of(topology).hbm
  scale = max(1.0, compiled_bytes / estimated_bytes(training))
  numbers, tried = training.steps.config, []
  ways = [numbers.exit_pass]
  if numbers.past_gradient == 'detached':
    ways = list(exit_pass.WAYS)
  for tensor, context in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16)):
    if len(devices) % (tensor * context):
      continue
    config = sharding.MeshConfig(1, -1, tensor, context).filled(len(devices))
    mesh = sharding.make_mesh(config, devices)
    try:
      _check_networks(training, mesh)
    except ValueError:  # Does not divide.
      continue
    for microbatches, way in itertools.product((1, 2, 4, 8, 16), ways):
      if training.batch_size % (microbatches * config.fsdp) == 0:
        other = training.with_mesh(config, microbatches, way)
        rank = (tensor * context, microbatches, way == 'blocks', -context)
        tried.append((rank, other))
  tried.sort(key=lambda entry: entry[0])
  for _, other in tried:
    if (size := scale * estimated_bytes(other)) <= 0.75 * hbm:
      flags = ' '.join(
        f'--config.mesh.{axis}={ways}'
        for axis, ways in dataclasses.asdict(other.mesh).items()
      )
      flags += f' --config.distill.microbatches={other.microbatches}'
      if (way := other.steps.config.exit_pass) != numbers.exit_pass:
        flags += f' --config.distill.exit_pass={way}'
      return (
        f'{flags}: '
        f'{planning_stream.gigabytes(size)} a chip by a formula, not compiled'
      )
  return f'no mesh of {topology} that a formula would let fit: take more chips'


def estimated_bytes(training: Training) -> float:
  """Bytes of one chip in the generator's step, roughly; its mesh is filled up.

  Parameters and optimisers exactly, and the most of what its phases hold, which
  follow each other: the exit pass beside the ring, the teacher beside the ring,
  the forward KL. Each holds the inputs of its layers where it has a gradient,
  and what one layer holds; attention is taken to hold no scores. How much a
  layer holds is fitted to phases that were compiled alone (docs/tpu.md).
  """
  steps, sizes = training.steps, training.mesh
  model = steps.student.config
  width = jnp.dtype(model.dtype).itemsize

  def parameters(tree):
    return sum(
      math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree)
    )

  state = jax.eval_shape(lambda: programs.first_state(steps))
  # One stack of gradients beside the state (training/microbatches.py).
  held = parameters(state) + parameters(state.student.params)
  scale = jnp.dtype(training.teacher_dtype).itemsize / 4
  held += scale * parameters(programs.params(steps.teacher))
  held /= sizes.fsdp * sizes.tensor
  ways = sizes.data * sizes.fsdp * training.microbatches
  samples = max(1, training.batch_size // ways)
  tokens = training.num_frames * model.tokens_per_frame
  cached = steps.rollout.past_frames * model.tokens_per_frame
  ring = 2 * width * model.num_layers * cached * model.dim / sizes.tensor

  def layer(network, streams):
    wide = network.dim + network.ffn_dim / sizes.tensor
    return streams * width * tokens * wide / sizes.context

  def trained(tokens_at_a_time):
    share = tokens_at_a_time / tokens
    inputs = width * model.num_layers * tokens * model.dim / sizes.context
    return share * (inputs + layer(model, _TRAINED))

  kept = tokens
  if steps.config.exit_pass == 'blocks':
    kept = steps.rollout.frames_per_block * model.tokens_per_frame
  teacher = steps.teacher.config
  # Gathered whole, one beside the next.
  matrices = 6 * teacher.dim**2 + 2 * teacher.dim * teacher.ffn_dim
  weights = 2 * width * matrices / sizes.tensor
  phases = [
    samples * (ring + trained(kept)),
    samples * (ring + layer(teacher, _SCORED)) + weights,
  ]
  if steps.config.forward_kl_weight:
    phases.append(samples * trained(tokens))
  return held + max(phases)
