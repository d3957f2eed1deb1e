"""Does a config fit a chip? Answered by compiling for it, without having one.

The streaming tick is compiled ahead of time for TPUs or GPUs on a machine that
has only the compiler, see `chips`. Every argument is abstract, so
nothing of the network's size is allocated. What the compiler says of its
program is read from it; FLOPs come from the network's own formula, because
the compiler counts a loop's body once and a kernel as nothing.
"""

# B batch, f frames per block, S stages, M prompts in the bank, N layers

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import (
  Mesh,
  NamedSharding,
  PartitionSpec,
  SingleDeviceSharding,
)

from hiar_jax import rollout
from hiar_jax.denoiser import Denoiser
from hiar_jax.models import flops, sharding
from hiar_jax.models.config import WanConfig
from hiar_jax.planning import chips, hlo, peak, roofline, traffic
from hiar_jax.planning.compiled import Program, bytes_per_chip, compile_program
from hiar_jax.rollout import RolloutConfig
from hiar_jax.sampling import (
  block_stream,
  executors,
  meshes,
  passes,
  pipeline,
  streaming,
)
from hiar_jax.weights import held

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
    mode: of the stream.
    unit: what FLOPs and work are of: a tick, or a block where there are none.
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
  mode: str = 'batched'
  unit: str = 'tick'

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
    turns = _NUM_TICKS if self.unit == 'tick' else 1
    return compiler_estimate(
      self.compiler_seconds,
      turns * self.shortest_tick,
      f' for {turns} {self.unit}s',
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
      *largest_rows(self.hlo),
      (f'FLOPs a {self.unit} and chip', f'{flops.total / 1e12:.3g} T: {parts}'),
      (
        f'{self.unit} at peak rate (modelled)',
        f'{1e3 * self.shortest_tick:.0f} ms at '
        f'{self.chip.peak / 1e12:.0f} TFLOP/s',
      ),
      (f'collectives a {self.unit}', hops),
      *(self.at_best.rows() if self.at_best else ()),
      ("compiler's time estimate", self.compiler_estimate()),
      ('compiling took', f'{self.compile_seconds:.0f} s'),
    )
    how = f'{self.stages_per_chip} of the stages on each'
    if self.stages_per_chip > 1:
      how += f', {self.mode}'
    if self.mode == 'block_first':
      how = 'block after block, one past'
    title = (f'{self.topology}: {self.num_chips} chips', how)
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


def largest_rows(text: str) -> list[tuple[str, str]]:
  """A row of what is largest at a program's peak, if there is a program."""
  if not text:
    return []
  return [('- the largest (estimated)', peak.largest(hlo.parse(text)))]


def markdown(rows: list[tuple[str, str]]) -> str:
  """A table of two columns whose first row is its head."""
  head, *body = rows
  return '\n'.join(
    f'| {left} | {right} |' for left, right in (head, ('---', '---'), *body)
  )


def gigabytes(num_bytes: float) -> str:
  """Bytes for people, in 10^9."""
  return f'{num_bytes / _GB:.2f} GB'


def stage_mesh(
  topology: str, num_stages: int, sizes: meshes.SamplingMesh | None = None
) -> Mesh:
  """All chips of a topology as the pipeline's mesh.

  Args:
    topology: see `chips.describe`.
    num_stages: denoising steps.
    sizes: how they are divided; None: into stages alone.

  Raises:
    ValueError: see `chips.describe`; also if the stages do not divide over it,
      or the sizes do not make up the chips.
  """
  description = chips.describe(topology)
  num_chips = len(description.devices)
  if sizes is not None:
    if sizes.num_denoising != num_chips or sizes.decode:
      raise ValueError(
        f'{sizes} is of {sizes.num_denoising + sizes.decode} devices that '
        f'denoise or decode; a plan takes the {num_chips} of {topology!r} to '
        'denoise'
      )
    return meshes.make(sizes, description.devices)
  if num_stages % num_chips:
    raise ValueError(
      f'{num_stages} stages do not divide over the {num_chips} chips of '
      f'{topology!r}'
    )
  return topologies.make_mesh(description, (num_chips,), (executors.STAGE,))


def plan_tick(
  denoiser: Denoiser,
  config: RolloutConfig,
  topology: str,
  *,
  batch_size: int,
  weights_dtype: str,
  products_dtype: str | None = None,
  mode: str = 'batched',
  mesh: meshes.SamplingMesh | None = None,
) -> Plan:
  """Compiles one block of the stream for a topology.

  Args:
    denoiser: network.
    config: how blocks are denoised; its context is that of the mode.
    topology: see `stage_mesh`; the stages are divided over all its chips.
    batch_size: videos at a time.
    weights_dtype: in which the weights are held, see `held.Held`.
    products_dtype: likewise.
    mode: see `streaming.Engine`; on one chip all of them, on several 'batched'.
    mesh: how the chips are divided; None: into stages alone.

  Raises:
    ValueError: see `stage_mesh`; also for a mode that does not serve.
  """
  engine = _engine(denoiser, config, topology, mode, mesh)
  devices = 1 if engine.mesh is None else engine.mesh.size
  parts = meshes.num_parts(engine.mesh)
  chips_used = devices // parts
  unit, turns, num_passes = 'tick', _NUM_TICKS, config.num_steps // chips_used
  if mode in ('shared', 'block_first'):
    unit, turns, num_passes = 'block', 1, config.num_steps + 1
  each = pass_flops(denoiser.config, config)
  scale = num_passes * batch_size / parts
  arguments = _block_arguments(
    engine, topology, batch_size, held.Held(weights_dtype, products_dtype)
  )
  params = arguments[0]
  if engine.by_pass:
    program, past = _pass_program(engine, arguments), arguments[-1]
    at_best = program.at_best(topology, num_passes)
    if mode == 'shared':
      more = _hand_over(engine, past).at_best(topology, config.num_steps - 1)
      at_best = at_best and more and at_best + more
  else:
    program, past = _block_program(engine, arguments), arguments[4]
    past = getattr(past, 'past', past)  # Pasts of shared context are the state.
    at_best = program.at_best(topology, 1 / turns)
  weights, caches = bytes_per_chip(params), bytes_per_chip((past.k, past.v))
  others = caches * (engine.num_pasts - 1) if engine.by_pass else 0
  return Plan(
    topology=topology,
    num_chips=devices,
    stages_per_chip=config.num_steps // chips_used,
    mode=mode,
    unit=unit,
    weights=weights,
    caches=caches + others,
    other=program.arguments - weights - caches,
    temporaries=program.temporaries,
    flops=flops.PassFlops(
      scale * each.linear, scale * each.attention, scale * each.cross
    ),
    collectives=traffic.collectives(program.hlo),
    compiler_seconds=program.compiler_seconds,
    compile_seconds=program.compile_seconds,
    refusal=program.refusal,
    hlo=program.hlo,
    at_best=at_best,
  )


def _pass_program(engine: streaming.Engine, arguments: tuple) -> Program:
  """The pass of a block; its commit is no more."""
  return compile_program(
    jax.jit(
      functools.partial(_plain(passes.denoise), denoiser=engine.denoiser),
      donate_argnums=6,
      keep_unused=True,
    ),
    arguments,
  )


def _hand_over(engine: streaming.Engine, past: Any) -> Program:
  size = engine.config.frames_per_block
  run = functools.partial(_plain(passes.hand_over), num_frames=size)
  return compile_program(jax.jit(run, donate_argnums=0), (past, past))


def _block_program(engine: streaming.Engine, arguments: tuple) -> Program:
  if engine.stages is not None:
    # What leaves the mesh is no part of a tick.
    run = engine.stages.run if engine.mesh else _of(engine, streaming.run_turns)
  elif engine.mode == 'block_first':
    run = _of(engine, block_stream.run_block)
  else:
    run = _of(engine, streaming.run_shared_block)
  # All weights stay on the chip, those that the tick does not use as well.
  run = jax.jit(run, donate_argnums=4, keep_unused=True)
  with meshes.under(engine.mesh):
    return compile_program(run, arguments)


def _of(engine: streaming.Engine, run: Any) -> Callable[..., Any]:
  return functools.partial(_plain(run), engine=engine)


def _plain(run: Any) -> Callable[..., Any]:
  """What a jitted function was made of."""
  return run.__wrapped__


def _engine(
  denoiser: Any, config: Any, topology: str, mode: str, sizes: Any = None
) -> streaming.Engine:
  mesh = stage_mesh(topology, config.num_steps, sizes)
  if sizes is None and mesh.size > 1 and mode != 'batched':
    raise ValueError(
      f'mode {mode!r} is one of a single chip, and {topology!r} has {mesh.size}'
    )
  context = config.context
  if mode == 'shared' or context == 'shared':
    context = 'shared' if mode == 'shared' else 'matched'
  engine = streaming.Engine(
    denoiser,
    dataclasses.replace(config, context=context),
    mode,
    mesh if mesh.size > 1 else None,
  )
  return engine.written_in_place()


def _block_arguments(
  engine: streaming.Engine, topology: str, batch_size: int, how: held.Held
) -> tuple:
  """Abstract, placed arguments of the program that makes a block."""
  denoiser, config, stages = engine.denoiser, engine.config, engine.stages
  model = denoiser.config
  params = how.shapes(
    jax.eval_shape(denoiser.init, jax.random.key(0)), model.dtype
  )
  if meshes.num_parts(engine.mesh) == 1:
    params = jax.eval_shape(denoiser.unstack_layers, params)
  states = jax.ShapeDtypeStruct(
    (batch_size, model.text_len, model.text_dim), model.dtype
  )
  text = jax.eval_shape(denoiser.project_text, params, states)
  bank = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct((engine.bank_size, *a.shape), a.dtype), text
  )
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch_size))
  device = SingleDeviceSharding(chips.describe(topology).devices[0])

  def place(tree: Any, *axes: str | None) -> Any:
    where = jax.tree.map(lambda _: device, tree)
    if engine.mesh is not None:
      specs = jax.tree.map(lambda _: PartitionSpec(*axes), tree)
      where = meshes.places(tree, engine.mesh, specs)
    return jax.tree.map(
      lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
      tree,
      where,
    )

  def place_text(bank: Any) -> Any:
    if not meshes.divides(engine.mesh):
      return place(bank)
    assert engine.mesh is not None
    heads = NamedSharding(
      engine.mesh, PartitionSpec(*(None,) * 4, 'tensor', None)
    )
    return jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=heads), bank
    )

  def place_params(params: Any) -> Any:
    if not meshes.divides(engine.mesh) or isinstance(params['layers'], tuple):
      return place(params)
    return sharding.abstract(params, engine.mesh)

  if engine.by_pass:
    x = (batch_size, *config.block_shape(model))
    one_pass = (
      jax.ShapeDtypeStruct((), np.int32),
      jax.ShapeDtypeStruct(x, np.float32),
      jax.ShapeDtypeStruct((), np.float32),
      jax.ShapeDtypeStruct((config.frames_per_block,), np.int32),
      jax.eval_shape(
        lambda text: engine.sampler(params, text).empty_past(), text
      ),
    )
    return (place_params(params), place_text(bank), *map(place, one_pass))
  if stages is None:
    begin: Callable[..., Any] = rollout.stacked_pasts
    if engine.mode == 'block_first':
      begin = block_stream.begin
    pasts = jax.eval_shape(
      lambda params, text: begin(engine.sampler(params, text), None),
      params,
      text,
    )
    slots = jax.ShapeDtypeStruct((1, 1), np.int32)
    block = jax.ShapeDtypeStruct((), np.int32)
    rest = tuple(map(place, (slots, keys, pasts, block)))
    return (place_params(params), place_text(bank), *rest)
  slots = jax.ShapeDtypeStruct((_NUM_TICKS, config.num_steps), np.int32)
  state = jax.eval_shape(stages.init_state, params, text)
  return (
    place_params(params),
    place_text(bank),
    place(slots, None, executors.STAGE),
    place(keys),
    pipeline.PipelineState(
      tick=place(state.tick),
      hold=place(state.hold, executors.STAGE),
      inbox=place(state.inbox, executors.STAGE),
      past=place(state.past, executors.STAGE),
    ),
  )
