"""What a compiled program holds at its peak, array by array.

A TPU's compiler tells how much that is and not of what. But its programs are in
the order in which they run, so the life of every array can be read from them:
from the instruction that makes it to the last one that takes it. What an
instruction writes in place, and what goes round a loop, is one array. Which of
them the compiler puts into the same place is not told, so the sum is an
estimate. Of six steps of training (docs/gpu.md, docs/tpu.md) it was 13.98,
19.88, 15.08, 14.23 (GPUs), 12.52 and 13.10 GB (TPUs) where the compilers said
12.81, 18.76, 14.03, 13.41, 12.15 and 12.53.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable

from hiar_jax.planning import hlo

# Of the same arrays as their operands.
_ALIASES = frozenset(
  ('bitcast', 'opt-barrier', 'optimization-barrier', 'while', 'domain')
)


@dataclasses.dataclass(frozen=True)
class Held:
  """An array that is alive.

  Attributes:
    num_bytes: with what its layout pads.
    what: its type and sizes, such as 'bf16[30,1560]'.
    source: where in the source's call tree it is made.
  """

  num_bytes: int
  what: str
  source: str


@dataclasses.dataclass
class _Life:
  """Of an array of a computation: the instructions that it lives through."""

  held: Held
  first: int
  last: int


# Of each array that an instruction gives, the lives that it may be of.
_Value = list[list[_Life]]


def at_peak(program: hlo.Program) -> list[Held]:
  """What is alive beside the arguments when it is most, the largest first."""

  @functools.cache
  def inside(name: str) -> tuple[Held, ...]:
    computation = program.computations[name]
    lives, returned = _lives(program, computation)
    # What a loop gives to its next turn lies where it came from, and what
    # replaces an argument where that was.
    placed = {
      id(life)
      for i, value in enumerate(returned)
      if name != program.entry or i in program.reused
      for life in value
    }
    lives = [life for life in lives if id(life) not in placed]
    most: tuple[Held, ...] = ()
    size = -1
    for i, one in enumerate(computation.instructions):
      called = _called(one)
      if not called and not any(life.first == i for life in lives):
        continue
      within = max((inside(name) for name in called), key=_total, default=())
      now = [life.held for life in lives if life.first <= i <= life.last]
      if (total := _total(now) + _total(within)) > size:
        most, size = (*now, *within), total
    return most

  return sorted(inside(program.entry), key=lambda held: -held.num_bytes)


def largest(program: hlo.Program, count: int = 6) -> str:
  """The largest of `at_peak`, those of the same sizes together."""
  kinds: dict[str, list[int]] = {}
  for held in at_peak(program):
    kinds.setdefault(held.what, []).append(held.num_bytes)
  ranked = sorted(kinds.items(), key=lambda kind: -sum(kind[1]))
  return '; '.join(
    f'{sum(sizes) / 1e9:.2f} GB: {len(sizes)} x {what}'
    for what, sizes in ranked[:count]
  )


def _total(held: Iterable[Held]) -> int:
  return sum(one.num_bytes for one in held)


def _called(one: hlo.Instruction) -> tuple[str, ...]:
  """Computations whose arrays live while an instruction runs."""
  if one.opcode == 'while':
    return (one.body,)
  if one.opcode == 'conditional':
    return one.branches
  return one.called if one.opcode in ('call', 'async-start') else ()


def _lives(
  program: hlo.Program, computation: hlo.Computation
) -> tuple[list[_Life], _Value]:
  """Lives of what a computation makes, and what it returns."""
  lives: list[_Life] = []
  values: dict[str, _Value] = {}
  for i, one in enumerate(computation.instructions):
    taken = [values[name] for name in one.operands if name in values]
    for life in _flat(taken):
      life.last = i
    values[one.name] = _value(program, one, taken, i, lives)
  returned = values[computation.root.name]
  for life in _flat([returned]):
    life.last = len(computation.instructions)
  return lives, returned


def _value(
  program: hlo.Program,
  one: hlo.Instruction,
  taken: list[_Value],
  now: int,
  lives: list[_Life],
) -> _Value:
  """What an instruction gives; a new life for what it makes."""
  if one.opcode == 'parameter':
    return [[] for _ in one.arrays]
  if one.opcode == 'tuple':
    return [_flat([value]) for value in taken]
  if one.opcode == 'get-tuple-element':
    index = re.search(r'index=(\d+)', one.rest)
    assert index is not None, 'a part of a tuple without its index'
    whole = taken[0]
    # Of a tuple of tuples all is taken for alive.
    nested = int(index[1]) >= len(whole)
    return [_flat([whole])] if nested else [whole[int(index[1])]]
  if one.opcode in _ALIASES:
    return taken[0]
  if one.opcode.endswith('-done'):
    return [_flat(taken[:1])]
  written = _in_place(program, one)
  if written is not None and len(one.arrays) == 1:
    return [_flat(taken[written : written + 1])]
  made = [
    _Life(
      Held(
        0 if array.on_chip else array.held_bytes,
        f'{array.dtype}[{",".join(map(str, array.shape))}]',
        one.op_name,
      ),
      *(now, now),
    )
    for array in one.arrays
  ]
  lives += made
  return [[life] for life in made]


def _in_place(program: hlo.Program, one: hlo.Instruction) -> int | None:
  """The operand that an instruction changes a part of, if it does no more."""
  if one.opcode == 'dynamic-update-slice':
    return 0
  if one.opcode != 'fusion' or not one.called:
    return None
  inner = program.computations[one.called[0]]
  changed = inner.root
  while changed.opcode in ('bitcast', 'copy', 'convert'):
    changed = inner.named[changed.operands[0]]
  if changed.opcode != 'dynamic-update-slice':
    return None
  source = inner.named[changed.operands[0]]
  while source.opcode in ('bitcast', 'copy'):
    source = inner.named[source.operands[0]]
  return int(source.inputs) if source.opcode == 'parameter' else None


def _flat(values: list[_Value]) -> list[_Life]:
  return [life for value in values for array in value for life in array]
