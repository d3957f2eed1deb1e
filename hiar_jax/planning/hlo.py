"""A compiled program, read: computations, instructions, arrays, loops.

The text is XLA's own of an optimised and scheduled HLO program, the same for
TPUs and GPUs.
"""

import dataclasses
import functools
import math
import re


@dataclasses.dataclass(frozen=True)
class Array:
  """An array as an instruction gives it.

  Attributes:
    dtype: such as 'bf16'.
    shape: its sizes.
    on_chip: whether it lies in a memory of the chip's own (a TPU's VMEM).
    layout: as the compiler writes it, such as '{1,0:T(8,128)}'.
  """

  dtype: str
  shape: tuple[int, ...]
  on_chip: bool = False
  layout: str = ''

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def num_bytes(self) -> int:
    bits = re.match(r'[a-z]+(\d+)', self.dtype)
    return self.size * max(int(bits[1]) if bits else 8, 8) // 8

  @property
  def held_bytes(self) -> int:
    """With the innermost axes filled up to whole tiles."""
    order = re.match(r'\{([\d,]+)', self.layout)
    tile = re.search(r'T\((\d+),(\d+)\)', self.layout)
    if order is None or tile is None or not self.size:
      return self.num_bytes
    padded = self.num_bytes
    # The innermost axis is the second of a tile.
    for axis, step in zip(_ints(order[1]), (int(tile[2]), int(tile[1]))):
      size = self.shape[axis]
      padded = padded // size * (-(-size // step) * step)
    return padded


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: unique in the program.
    arrays: of its result; several if that is a tuple.
    opcode: such as 'fusion'.
    inputs: what stands in its brackets.
    rest: all that follows: attributes, metadata, the compiler's own notes.
    is_root: whether it is the result of its computation.
  """

  name: str
  arrays: tuple[Array, ...]
  opcode: str
  inputs: str
  rest: str
  is_root: bool

  @functools.cached_property
  def operands(self) -> tuple[str, ...]:
    """Names of instructions of the same computation."""
    return tuple(re.findall(r'%([\w.\-]+)', self.inputs))

  @property
  def op_name(self) -> str:
    """Where in the source's call tree it is from."""
    found = re.search(r'op_name="([^"]*)"', self.rest)
    return found[1] if found else ''

  @property
  def target(self) -> str:
    """What a custom call calls."""
    found = re.search(r'custom_call_target="([^"]*)"', self.rest)
    return found[1] if found else ''

  @property
  def called(self) -> tuple[str, ...]:
    """Computations that run once where this one does."""
    pattern = r'(?:calls|to_apply)=(\{[^}]*\}|%?[\w.\-]+)'
    return tuple(
      name
      for group in re.findall(pattern, self.rest)
      for name in re.findall(r'[\w.\-]+', group)
    )

  @property
  def body(self) -> str:
    """Of a loop."""
    return _found(re.search(r'body=%?([\w.\-]+)', self.rest))[1]

  @property
  def condition(self) -> str:
    """Of a loop, whether it goes on."""
    return _found(re.search(r'condition=%?([\w.\-]+)', self.rest))[1]

  @property
  def branches(self) -> tuple[str, ...]:
    """Of a condition."""
    pattern = (
      r'(?:branch_computations|true_computation|false_computation)='
      r'(\{[^}]*\}|%?[\w.\-]+)'
    )
    return tuple(
      name
      for group in re.findall(pattern, self.rest)
      for name in re.findall(r'[\w.\-]+', group)
    )

  @property
  def trips(self) -> int | None:
    """How often a loop runs; None where the compiler does not know."""
    found = re.search(r'known_trip_count\W+n\W+(\d+)', self.rest)
    return int(found[1]) if found else None

  def sizes(self, attribute: str) -> tuple[int, ...]:
    """Such as those of 'lhs_contracting_dims'."""
    found = re.search(attribute + r'=\{([\d,]*)\}', self.rest)
    return _ints(found[1]) if found else ()


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions in the order in which they run."""

  instructions: tuple[Instruction, ...]

  @functools.cached_property
  def named(self) -> dict[str, Instruction]:
    return {one.name: one for one in self.instructions}

  @functools.cached_property
  def root(self) -> Instruction:
    return next(one for one in self.instructions if one.is_root)

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    found: dict[str, list[Instruction]] = {}
    for one in self.instructions:
      for operand in one.operands:
        found.setdefault(operand, []).append(one)
    return found


@dataclasses.dataclass(frozen=True)
class Program:
  """A program.

  Attributes:
    computations: all of them by name.
    entry: which of them is the program itself.
    reused: results, by their place, that lie where an argument was.
  """

  computations: dict[str, Computation]
  entry: str
  reused: frozenset[int] = frozenset()


_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_NAME = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = ')
_OPCODE = re.compile(r' ?([\w\-]+)\(')
_ARRAY = re.compile(r'\b(pred|token|[a-z]+\d\w*)\[([\d,<=]*)\](\{[^}]*\})?')


def parse(text: str) -> Program:
  """Reads what `as_text` of a compiled program gives."""
  computations: dict[str, list[str]] = {}
  entry, lines = '', list[str]()
  for line in text.splitlines():
    if head := _HEAD.match(line):
      lines = computations.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    elif _NAME.match(line):
      lines.append(line)
    elif lines:  # What a kernel says of itself may have lines of its own.
      lines[-1] += line
  module, *_ = text.split('\n', 1)
  aliases = re.search(r'input_output_alias=\{(.*?\)) \}', module)
  reused = re.findall(r'\{(\d+)\}: \(', aliases[1]) if aliases else ()
  return Program(
    {
      name: Computation(tuple(map(_instruction, lines)))
      for name, lines in computations.items()
    },
    entry,
    frozenset(map(int, reused)),
  )


def trips(program: Program, loop: Instruction) -> int | None:
  """How often a loop runs, as far as the program tells.

  A GPU's says it. A TPU's does not; jax counts its loops of known length from 0
  up to a constant of the condition.
  """
  if loop.trips is not None:
    return loop.trips
  condition = program.computations[loop.condition]
  return _limit(program, condition, condition.root)


def _limit(
  program: Program, computation: Computation, one: Instruction
) -> int | None:
  """Up to which constant a number may count, by a condition."""
  if one.opcode == 'fusion':
    inner = program.computations[one.called[0]]
    return _limit(program, inner, inner.root)
  operands = [computation.named[name] for name in one.operands]
  if one.opcode == 'and':
    # What ends early counts as if it did not.
    limits = [_limit(program, computation, operand) for operand in operands]
    return min((n for n in limits if n is not None), default=None)
  if one.opcode != 'compare' or 'direction=LT' not in one.rest:
    return None
  return int(operands[1].inputs) if operands[1].opcode == 'constant' else None


def arrays(text: str) -> tuple[Array, ...]:
  """All arrays that a shape names, as the compiler writes it."""
  return tuple(
    Array(dtype, _ints(sizes.replace('<=', '')), 'S(1)' in layout, layout)
    for dtype, sizes, layout in _ARRAY.findall(text)
  )


def _found(match: re.Match[str] | None) -> re.Match[str]:
  assert match is not None, 'no program as the compiler writes it'
  return match


def _instruction(line: str) -> Instruction:
  name = _found(_NAME.match(line))
  start = name.end()
  stop = _closing(line, start) + 1 if line[start] == '(' else start
  stop = line.index(' ', stop)
  opcode = _found(_OPCODE.match(line, stop))
  last = _closing(line, opcode.end() - 1)
  return Instruction(
    name=name[2],
    arrays=arrays(line[start:stop]),
    opcode=opcode[1],
    inputs=line[opcode.end() : last],
    rest=line[last + 1 :],
    is_root=bool(name[1]),
  )


def _closing(line: str, start: int) -> int:
  """Index of the bracket that closes the one at `start`."""
  depth = 0
  for match in re.compile(r'[()]').finditer(line, start):
    depth += 1 if match[0] == '(' else -1
    if not depth:
      return match.start()
  raise ValueError(f'a bracket is not closed in {line[:100]!r}')


def _ints(text: str) -> tuple[int, ...]:
  return tuple(int(n) for n in text.split(',') if n)
