"""What a compiled program sends from chip to chip, loops counted in full."""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence

from hiar_jax.planning import hlo as planning_hlo


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation of a compiled program.

  Attributes:
    kind: such as 'collective-permute'.
    shape: of what it moves, as the compiler writes it.
    num_bytes: of that, a chip.
    sent: bytes that a chip sends for it.
  """

  kind: str
  shape: str
  num_bytes: int
  sent: float


@dataclasses.dataclass(frozen=True)
class Traffic:
  """All collectives of a kind in one call.

  Attributes:
    kind: such as 'all-gather'.
    count: how often one runs, loops counted in full.
    num_bytes: that a chip sends for them.
  """

  kind: str
  count: float
  num_bytes: float


_KINDS = (
  'all-gather|all-reduce|all-to-all|ragged-all-to-all|collective-broadcast|'
  'collective-permute|reduce-scatter'
)
_COLLECTIVE = re.compile(rf'= (.+?) ({_KINDS})(-start)?(\(.*)')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_CALLED = re.compile(
  r'(body|condition|calls|to_apply|branch_computations|true_computation|'
  r'false_computation)=(\{[^}]*\}|%?[\w.\-]+)'
)
# A TPU's program has an asynchronous collective in the fusion that starts it,
# in every fusion beside which it runs on, and in the one that ends it.
_GOES_ON = re.compile(
  r'%async-collective-done[\w.\-]* = |calls=%?async_collective_fusion'
)
_GROUPS = re.compile(r'replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]*)\})')
# Axes of a mesh by name: mesh['a'=2,'b'=4] {'b'}, or a part of one, 'b':(1)2.
_NAMED_GROUPS = re.compile(r'replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}')


def traffic(text: str, *, unknown_trips: float) -> list[Traffic]:
  """What a compiled program sends, with every loop counted as often as it runs.

  Args:
    text: optimised HLO program.
    unknown_trips: of loops whose count is not in the program, see hlo.py;
      both branches of a condition count.
  """
  program = planning_hlo.parse(text)
  trips = {
    name: planning_hlo.trips(program, one)
    for computation in program.computations.values()
    for one in computation.instructions
    if one.opcode == 'while'
    for name in (one.body, one.condition)
  }
  bodies: dict[str, list[str]] = {}
  entry, lines = '', []
  for line in text.splitlines():
    if head := _COMPUTATION.match(line):
      lines = bodies.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    else:
      lines.append(line)

  @functools.cache
  def inside(name: str) -> dict[str, tuple[float, float]]:
    total: dict[str, tuple[float, float]] = {}

    def add(kind, count, num_bytes):
      old = total.get(kind, (0.0, 0.0))
      total[kind] = (old[0] + count, old[1] + num_bytes)

    for line in bodies.get(name, ()):
      for one in collectives(line):
        add(one.kind, 1.0, one.sent)
      if _GOES_ON.search(line):
        continue
      for role, called in _CALLED.findall(line):
        times = 1.0
        if role in ('body', 'condition'):
          known = trips.get(called.lstrip('%'))
          times = unknown_trips if known is None else float(known)
        for other in re.findall(r'[\w.\-]+', called):
          for kind, (count, num_bytes) in inside(other).items():
            add(kind, times * count, times * num_bytes)
    return total

  return [
    Traffic(kind, count, num_bytes)
    for kind, (count, num_bytes) in sorted(inside(entry).items())
  ]


def collectives(hlo: str) -> list[Collective]:
  """The collectives of an optimised HLO program, as often as they stand in it.

  The tick stands in it once, as the body of the loop over ticks.
  """
  found = []
  for shape, kind, start, rest in _COLLECTIVE.findall(hlo):
    arrays = _results(kind + start, planning_hlo.arrays(shape))
    found.append(
      Collective(
        kind,
        ', '.join(f'{a.dtype}[{",".join(map(str, a.shape))}]' for a in arrays),
        sum(a.num_bytes for a in arrays),
        _ring(kind, arrays, rest),
      )
    )
  return found


def is_collective(opcode: str) -> bool:
  """Whether an operation moves numbers from chip to chip."""
  return re.fullmatch(f'({_KINDS})(-start)?', opcode) is not None


def goes_on(one: planning_hlo.Instruction) -> bool:
  """Whether a fusion ends a collective that another one started."""
  return one.name.startswith('async-collective-done')


def starts(one: planning_hlo.Instruction) -> bool:
  """Whether a fusion does no more than to start a collective."""
  return one.name.startswith('async-collective-start')


def sent(
  opcode: str, arrays: tuple[planning_hlo.Array, ...], attributes: str
) -> float:
  """Bytes that a chip sends for a collective, by the usual ring.

  Args:
    opcode: such as 'all-gather' or 'all-gather-start'.
    arrays: that it returns, as the compiler writes them.
    attributes: what the compiler writes after its operands.
  """
  kind = opcode.removesuffix('-start')
  return _ring(kind, _results(opcode, arrays), attributes)


def _results(
  opcode: str, arrays: tuple[planning_hlo.Array, ...]
) -> tuple[planning_hlo.Array, ...]:
  """The results among the arrays of an operation.

  An asynchronous one, but for all-reduce, gives its operands before them, and
  two flags after them if it is a permute.
  """
  if not opcode.endswith('-start') or opcode == 'all-reduce-start':
    return arrays
  if opcode == 'collective-permute-start' and arrays[-1].dtype == 'u32':
    arrays = arrays[:-2]
  return arrays[len(arrays) // 2 :]


def _ring(
  kind: str, results: Sequence[planning_hlo.Array], attributes: str
) -> float:
  num_bytes = sum(a.num_bytes for a in results)
  size = _group_size(attributes)
  share = (size - 1) / size
  if kind == 'all-reduce':
    return 2 * share * num_bytes
  if kind == 'reduce-scatter':
    return float((size - 1) * num_bytes)
  if kind == 'collective-permute':
    return float(num_bytes)
  return share * num_bytes


def _group_size(line: str) -> int:
  """Devices of a group, however the compiler writes it; 2 if it does not."""
  if named := _NAMED_GROUPS.search(line):
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
    parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
    return math.prod(int(part) if part else sizes[axis] for axis, part in parts)
  if groups := _GROUPS.search(line):
    return int(groups[1]) if groups[1] else groups[2].count(',') + 1
  return 2
