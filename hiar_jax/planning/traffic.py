"""What a compiled program sends from chip to chip, loops counted in full."""

import dataclasses
import functools
import math
import re

from hiar_jax.planning import stream as planning_stream

# Bytes a second that a chip sends over all its links to other chips.
# Source: the specifications in the Google Cloud TPU documentation (1600, 4800
# and 3200 Gbit/s).
LINKS = {'v5e': 200e9, 'v5p': 600e9, 'v6e': 400e9}


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


_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_CALLED = re.compile(
  r'(body|condition|calls|to_apply|branch_computations|true_computation|'
  r'false_computation)=(\{[^}]*\}|%?[\w.\-]+)'
)
_TRIPS = re.compile(r'known_trip_count\W+n\W+(\d+)')
_GROUPS = re.compile(r'replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]*)\})')
# Axes of a mesh by name: mesh['a'=2,'b'=4] {'b'}, or a part of one, 'b':(1)2.
_NAMED_GROUPS = re.compile(r'replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}')


def traffic(hlo: str, *, unknown_trips: float) -> list[Traffic]:
  """What a compiled program sends, with every loop counted as often as it runs.

  Args:
    hlo: optimised program.
    unknown_trips: of loops whose count the compiler does not know; both
      branches of a condition count.
  """
  bodies: dict[str, list[str]] = {}
  entry, lines = '', []
  for line in hlo.splitlines():
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
      for one in planning_stream.collectives(line):
        add(one.kind, 1.0, _sent(one, line))
      for role, called in _CALLED.findall(line):
        times = 1.0
        if role in ('body', 'condition'):
          trips = _TRIPS.search(line)
          times = float(trips[1]) if trips else unknown_trips
        for other in re.findall(r'[\w.\-]+', called):
          for kind, (count, num_bytes) in inside(other).items():
            add(kind, times * count, times * num_bytes)
    return total

  return [
    Traffic(kind, count, num_bytes)
    for kind, (count, num_bytes) in sorted(inside(entry).items())
  ]


def _sent(one: planning_stream.Collective, line: str) -> float:
  """Bytes that a chip sends, by the usual ring; from the size of the result."""
  size = _group_size(line)
  share = (size - 1) / size
  if one.kind == 'all-reduce':
    return 2 * share * one.num_bytes
  if one.kind == 'reduce-scatter':
    return (size - 1) * one.num_bytes
  if one.kind == 'collective-permute':
    return float(one.num_bytes)
  return share * one.num_bytes


def _group_size(line: str) -> int:
  """Devices of a group, however the compiler writes it; 2 if it does not."""
  if named := _NAMED_GROUPS.search(line):
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
    parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
    return math.prod(int(part) if part else sizes[axis] for axis, part in parts)
  if groups := _GROUPS.search(line):
    return int(groups[1]) if groups[1] else groups[2].count(',') + 1
  return 2
