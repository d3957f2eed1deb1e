"""What the compiler says of a program that it made for a chip."""

import dataclasses
import math
import time
from typing import Any

import jax

from hiar_jax.planning import chips, roofline


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
    temporaries=_beside_arguments(memory, _platform(arguments)),
    flops=cost.get('flops'),
    compiler_seconds=cost.get('optimal_seconds'),
    compile_seconds=elapsed,
    hlo=compiled.as_text(),
  )


def _beside_arguments(memory: Any, platform: str) -> int:
  """Bytes of temporaries, results that reuse no argument, and the program.

  A TPU's compiler gives its temporaries places of their own as long as there is
  room, and old ones again where there is none: the sum of the places says
  little of what a program needs. What a chip is refused for is the peak
  (docs/tpu.md). A GPU's temporaries are one allocation, as large as they say.
  """
  results = memory.output_size_in_bytes - memory.alias_size_in_bytes
  beside = memory.temp_size_in_bytes + results
  if platform == 'tpu':
    at_peak = memory.peak_memory_in_bytes - memory.argument_size_in_bytes
    beside = max(at_peak, results)
  return beside + memory.generated_code_size_in_bytes


def _platform(arguments: tuple) -> str:
  """Of the devices that abstract arrays are placed on; else this machine's."""
  sharding = jax.tree.leaves(arguments)[0].sharding
  if sharding is None:
    return jax.default_backend()
  return next(iter(sharding.device_set)).platform


def bytes_per_chip(tree: Any) -> int:
  """Bytes that one chip holds of placed abstract arrays."""
  return sum(
    math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
    for a in jax.tree.leaves(tree)
  )
