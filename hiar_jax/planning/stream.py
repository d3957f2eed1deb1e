"""Does a config fit a chip? Answered by compiling for it, without having one.

The streaming tick is compiled ahead of time for TPUs or GPUs on a machine that
has only the compiler, see `chips`. Every argument is abstract, so
nothing of the network's size is allocated. What the compiler says of its
program is read from it; FLOPs come from the network's own formula, because
the compiler counts a loop's body once and a kernel as nothing.
"""

# B batch, f frames per block, S stages, M prompts in the bank, N layers

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hiar_jax.denoiser import Denoiser
from hiar_jax.models import flops
from hiar_jax.models.config import WanConfig
from hiar_jax.planning import chips, roofline, traffic
from hiar_jax.rollout import RolloutConfig
from hiar_jax.sampling import pipeline
from hiar_jax.sampling.streaming import Engine

_NUM_TICKS = 2  # One block in the steady state.
_GB = 1e9


def pass_flops(model: WanConfig, config: RolloutConfig) -> flops.PassFlops:
  """FLOPs of one pass of one sample's block at the full window."""
  return flops.pass_flops(model, config.frames_per_block, config.window)


@dataclasses.dataclass(frozen=True)
class Plan:
  """What the streaming tick needs of one chip; bytes are a chip's.

  Attributes:
    topology: such as 'v5e:2x2'.
    num_chips: all of them.
    stages_per_chip: denoising steps that a chip owns.
    weights: bytes of the network, text projection included.
    caches: bytes of the pasts of its stages.
    other: bytes of all other arguments: prompts, latents, keys.
    temporaries: bytes of temporaries, of results that reuse no argument and of
      the program; None where the compiler found no place for them.
    flops: of a tick, see `pass_flops`.
    collectives: of a tick.
    compiler_seconds: its estimate of the time of a call, as it gives it.
    compile_seconds: tracing, lowering and compiling, on this machine.
    refusal: what the compiler says if the program does not fit.
    hlo: the compiled program.
    at_best: its work a tick, None where there is no program.
  """

  topology: str
  num_chips: int
  stages_per_chip: int
  weights: int
  caches: int
  other: int
  temporaries: int | None
  flops: flops.PassFlops
  collectives: list[traffic.Collective]
  compiler_seconds: float | None
  compile_seconds: float
  refusal: str = ''
  hlo: str = dataclasses.field(default='', repr=False)
  at_best: roofline.Roofline | None = None

  @property
  def chip(self) -> chips.Chip:
    return chips.chip_of(self.topology)

  @property
  def total(self) -> int:
    """Bytes of one chip, as far as they are known."""
    known = self.weights + self.caches + self.other
    return known + (self.temporaries or 0)

  @property
  def fits(self) -> bool:
    return self.temporaries is not None and self.total <= self.chip.hbm

  @property
  def shortest_tick(self) -> float:
    """Seconds of a tick at the chip's peak rate: modelled, a lower bound."""
    return self.flops.total / self.chip.peak

  def compiler_estimate(self) -> str:
    """See `compiler_estimate`."""
    return compiler_estimate(
      self.compiler_seconds,
      _NUM_TICKS * self.shortest_tick,
      f' for {_NUM_TICKS} ticks',
    )

  def table(self) -> str:
    """A Markdown table."""
    room = f'{gigabytes(self.total)} of {gigabytes(self.chip.hbm)} a chip'
    fits = f'yes: {room}' if self.fits else f'no: {room}'
    temporaries = 'unknown'
    if self.temporaries is None:
      fits = f'no: {self.refusal}'
    else:
      temporaries = gigabytes(self.temporaries)
    hops = 'none'
    if self.collectives:
      hops = '; '.join(
        f'{c.kind} of {c.shape}, {c.num_bytes / 1e6:.2f} MB'
        for c in self.collectives
      )
    flops = self.flops
    parts = ' + '.join(
      f'{name} {value / 1e12:.3g}'
      for name, value in (
        ('linear', flops.linear),
        ('attention', flops.attention),
        ('cross', flops.cross),
      )
    )
    rows = (
      ('fits', fits),
      ('weights', gigabytes(self.weights)),
      ('caches', gigabytes(self.caches)),
      ('other arguments', gigabytes(self.other)),
      ('temporaries', temporaries),
      ('FLOPs a tick and chip', f'{flops.total / 1e12:.3g} T: {parts}'),
      (
        'tick at peak rate (modelled)',
        f'{1e3 * self.shortest_tick:.0f} ms at '
        f'{self.chip.peak / 1e12:.0f} TFLOP/s',
      ),
      ('collectives a tick', hops),
      *(self.at_best.rows() if self.at_best else ()),
      ("compiler's time estimate", self.compiler_estimate()),
      ('compiling took', f'{self.compile_seconds:.0f} s'),
    )
    title = (
      f'{self.topology}: {self.num_chips} chips',
      f'{self.stages_per_chip} of the stages on each',
    )
    return markdown([title, *rows])


def compiler_estimate(
  seconds: float | None, shortest: float, of: str = ''
) -> str:
  """The compiler's time, with what is wrong with it where that shows.

  Args:
    seconds: as the compiler gives it.
    shortest: the time that the FLOPs take at the chip's peak rate.
    of: what the time is of.
  """
  if not seconds or not 0 < seconds < math.inf:
    return 'none given'
  estimate = f'{seconds:.3g} s{of}'
  if seconds < shortest:
    # It counts the body of a loop once, and a kernel as nothing.
    estimate += ', not to be used: less than at peak rate'
  return estimate


def markdown(rows: list[tuple[str, str]]) -> str:
  """A table of two columns whose first row is its head."""
  head, *body = rows
  return '\n'.join(
    f'| {left} | {right} |' for left, right in (head, ('---', '---'), *body)
  )


def gigabytes(num_bytes: float) -> str:
  """Bytes for people, in 10^9."""
  return f'{num_bytes / _GB:.2f} GB'


def stage_mesh(topology: str, num_stages: int) -> Mesh:
  """All chips of a topology as the pipeline's mesh.

  Args:
    topology: see `chips.describe`.
    num_stages: denoising steps.

  Raises:
    ValueError: see `chips.describe`; also if the stages do not divide over it.
  """
  description = chips.describe(topology)
  num_chips = len(description.devices)
  if num_stages % num_chips:
    raise ValueError(
      f'{num_stages} stages do not divide over the {num_chips} chips of '
      f'{topology!r}'
    )
  return topologies.make_mesh(description, (num_chips,), (pipeline.STAGE,))


def plan_tick(
  denoiser: Denoiser,
  config: RolloutConfig,
  topology: str,
  *,
  batch_size: int,
  weights_dtype: str,
) -> Plan:
  """Compiles two ticks of the stream, one block, for a topology.

  Args:
    denoiser: network.
    config: how blocks are denoised.
    topology: see `stage_mesh`; the stages are divided over all its chips.
    batch_size: videos at a time.
    weights_dtype: in which the weights are held.

  Raises:
    ValueError: see `stage_mesh`.
  """
  mesh = stage_mesh(topology, config.num_steps)
  engine = Engine(denoiser, config, mesh=mesh)
  arguments = _tick_arguments(engine, batch_size, jnp.dtype(weights_dtype))
  params, *_, state = arguments
  per_chip = config.num_steps // mesh.size
  each = pass_flops(denoiser.config, config)
  scale = per_chip * batch_size
  known = {
    'topology': topology,
    'num_chips': mesh.size,
    'stages_per_chip': per_chip,
    'weights': bytes_per_chip(params),
    'caches': bytes_per_chip((state.past.k, state.past.v)),
    'flops': flops.PassFlops(
      scale * each.linear, scale * each.attention, scale * each.cross
    ),
  }
  # All weights stay on the chip, those that the tick does not use as well.
  run = jax.jit(engine.stages.run, donate_argnums=4, keep_unused=True)
  program = compile_program(run, arguments)
  return Plan(
    **known,
    other=program.arguments - known['weights'] - known['caches'],
    temporaries=program.temporaries,
    collectives=traffic.collectives(program.hlo),
    compiler_seconds=program.compiler_seconds,
    compile_seconds=program.compile_seconds,
    refusal=program.refusal,
    hlo=program.hlo,
    at_best=program.at_best(topology, 1 / _NUM_TICKS),
  )


@dataclasses.dataclass(frozen=True)
class Program:
  """What the compiler says of a program; bytes are a chip's.

  Attributes:
    arguments: bytes of the arguments. If the program fits, that is the
      compiler's own count: it pads arrays to its tiles.
    temporaries: see Plan.
    flops: as the compiler counts them, or None.
    compiler_seconds: see Plan.
    compile_seconds: see Plan.
    refusal: see Plan.
    hlo: the compiled program.
  """

  arguments: int
  temporaries: int | None = None
  flops: float | None = None
  compiler_seconds: float | None = None
  compile_seconds: float = 0.0
  refusal: str = ''
  hlo: str = ''

  def at_best(
    self, topology: str, times: float = 1, *, unknown_trips: float = 1
  ) -> roofline.Roofline | None:
    """See `roofline.roofline`; so many times of it. None without a program."""
    if not self.hlo:
      return None
    chip = chips.chip_of(topology)
    found = roofline.roofline(self.hlo, chip, unknown_trips=unknown_trips)
    return found * times


def compile_program(run: Any, arguments: tuple) -> Program:
  """Compiles a jitted function for the devices of its abstract arguments."""
  started = time.monotonic()
  lowered = run.lower(*arguments)
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return Program(
      arguments=bytes_per_chip(arguments),
      compile_seconds=time.monotonic() - started,
      refusal=str(error).splitlines()[0],
    )
  elapsed = time.monotonic() - started
  memory = compiled.memory_analysis()
  # None of a GPU's program.
  cost = compiled.cost_analysis() or {}
  return Program(
    arguments=memory.argument_size_in_bytes,
    temporaries=memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.generated_code_size_in_bytes,
    flops=cost.get('flops'),
    compiler_seconds=cost.get('optimal_seconds'),
    compile_seconds=elapsed,
    hlo=compiled.as_text(),
  )


def _tick_arguments(engine: Engine, batch_size: int, weights_dtype) -> tuple:
  """Abstract, placed arguments of `Pipeline.run` for two ticks."""
  denoiser, config, stages = engine.denoiser, engine.config, engine.stages
  model = denoiser.config
  params = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, weights_dtype),
    jax.eval_shape(denoiser.init, jax.random.key(0)),
  )
  states = jax.ShapeDtypeStruct(
    (batch_size, model.text_len, model.text_dim), model.dtype
  )
  text = jax.eval_shape(denoiser.project_text, params, states)
  bank = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct((engine.bank_size, *a.shape), a.dtype), text
  )
  slots = jax.ShapeDtypeStruct((_NUM_TICKS, config.num_steps), np.int32)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch_size))
  state = jax.eval_shape(stages.init_state, params, text)

  def place(tree: Any, *axes: str | None) -> Any:
    sharding = NamedSharding(engine.mesh, PartitionSpec(*axes))
    return jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree
    )

  return (
    place(params),
    place(bank),
    place(slots, None, pipeline.STAGE),
    place(keys),
    pipeline.PipelineState(
      tick=place(state.tick),
      hold=place(state.hold, pipeline.STAGE),
      inbox=place(state.inbox, pipeline.STAGE),
      past=place(state.past, pipeline.STAGE),
    ),
  )


def bytes_per_chip(tree: Any) -> int:
  """Bytes that one chip holds of placed abstract arrays."""
  return sum(
    math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
    for a in jax.tree.leaves(tree)
  )
