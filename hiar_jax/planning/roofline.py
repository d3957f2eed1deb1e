"""The shortest time that a compiled program could take, by what it does.

Every instruction of the scheduled program is taken to run at the chip's peak
rate or at the full rate of its memory, whichever is slower, one after the
other. No chip reaches either, so this is a bound ("at best") and never a
measurement; what it is good for is to tell what a program spends its time on,
and to compare two of them.

FLOPs are those of matrix products and convolutions as they stand in the
program, attention kernels over all their keys, loops counted as often as they
run. Bytes are what goes between chip and memory: operands and results of every
instruction, of a slice only the slice.
"""

import dataclasses
import functools
import re

from hiar_jax.planning import hlo, traffic
from hiar_jax.planning.chips import Chip

SELF_ATTENTION = 'self-attention'
CROSS_ATTENTION = 'cross-attention'
LINEAR = 'linear'
CONVOLUTIONS = 'convolutions'
COPIES = 'copies'
ELEMENTWISE = 'norms and modulation'  # All that goes number by number.
COLLECTIVES = 'collectives'
CLASSES = (
  *(SELF_ATTENTION, CROSS_ATTENTION, LINEAR, CONVOLUTIONS),
  *(COPIES, ELEMENTWISE, COLLECTIVES),
)

# A GPU multiplies float32 as TF32, at half the rate of bfloat16.
_FLOAT32_RATE = 0.5

# Instructions behind which no kernel runs.
# fmt: off
_FREE = frozenset((
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all',
  'iota', 'partition-id', 'replica-id', 'opt-barrier', 'domain',
  'add-dependency', 'copy-done', 'slice-done', 'all-gather-done',
  'all-reduce-done', 'collective-permute-done', 'async-done', 'async-update',
))
_MOVES = frozenset((
  'copy', 'copy-start', 'transpose', 'slice', 'slice-start', 'dynamic-slice',
  'dynamic-update-slice', 'concatenate', 'pad', 'broadcast', 'reshape',
  'reverse', 'gather', 'scatter', 'select', 'convert', 'bitcast-convert',
))
_INDEX_ARITHMETIC = frozenset((
  'add', 'subtract', 'compare', 'and', 'or', 'not', 'clamp', 'minimum',
  'maximum',
))
# fmt: on


@dataclasses.dataclass(frozen=True)
class Work:
  """What a class of instructions does in one call.

  Attributes:
    flops: of products.
    num_bytes: between chip and memory.
    seconds: at best.
    float32_flops: those of `flops` that multiply float32.
  """

  flops: float = 0.0
  num_bytes: float = 0.0
  seconds: float = 0.0
  float32_flops: float = 0.0

  def __add__(self, other: 'Work') -> 'Work':
    pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other))
    return Work(*(a + b for a, b in pairs))

  def __mul__(self, times: float) -> 'Work':
    return Work(*(times * a for a in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class Roofline:
  """A program's work by class; see the module."""

  classes: dict[str, Work]

  @property
  def total(self) -> Work:
    return sum(self.classes.values(), Work())

  def __add__(self, other: 'Roofline') -> 'Roofline':
    kinds = self.classes | other.classes
    none = Work()
    return Roofline(
      {
        kind: self.classes.get(kind, none) + other.classes.get(kind, none)
        for kind in kinds
      }
    )

  def __mul__(self, times: float) -> 'Roofline':
    return Roofline({k: work * times for k, work in self.classes.items()})

  def rows(self) -> list[tuple[str, str]]:
    """Rows of a table: the sum, and each class that takes a thousandth."""
    total = self.total
    rows = [('at best (roofline, not measured)', _cell(total))]
    rows += [
      (f'- {name}', _cell(self.classes[name]))
      for name in CLASSES
      if name in self.classes
      and self.classes[name].seconds >= 1e-3 * total.seconds
    ]
    return rows


def _cell(work: Work) -> str:
  parts = [
    _short(1e3 * work.seconds, 'ms', 's'),
    _short(work.num_bytes / 1e9, 'GB', 'TB'),
  ]
  if work.flops:
    parts.insert(1, _short(work.flops / 1e12, 'TFLOP', 'PFLOP'))
  if work.float32_flops > 0.01 * work.flops:
    wide = _short(work.float32_flops / 1e12, 'TFLOP', 'PFLOP')
    parts.append(f'{wide} of it in float32')
  return ', '.join(parts)


def _short(number: float, unit: str, thousand: str) -> str:
  """'820 ms', '8.59 s': of a thousand and more the larger unit."""
  if float(f'{number:.3g}') >= 1000:
    number, unit = number / 1000, thousand
  return f'{number:.3g} {unit}'


def roofline(text: str, chip: Chip, *, unknown_trips: float = 1) -> Roofline:
  """Work of a compiled program.

  Args:
    text: the scheduled HLO program.
    chip: that it was compiled for.
    unknown_trips: of loops whose count the compiler does not know. Of the
      branches of a condition the longest counts.
  """
  program = hlo.parse(text)

  @functools.cache
  def inside(name: str) -> dict[str, Work]:
    found: dict[str, Work] = {}

    def add(works: dict[str, Work], times: float = 1) -> None:
      for kind, work in works.items():
        found[kind] = found.get(kind, Work()) + work * times

    computation = program.computations[name]
    for one in computation.instructions:
      if one.opcode == 'while':
        trips = hlo.trips(program, one)
        add(inside(one.body), unknown_trips if trips is None else trips)
      elif one.opcode == 'conditional':
        add(max(map(inside, one.branches), key=_seconds))
      elif one.opcode in ('call', 'async-start') and one.called:
        add(inside(one.called[0]))
      elif one.opcode not in _FREE:
        kind, work = _work(program, computation, one, chip)
        add({kind: work})
    return found

  return Roofline(dict(inside(program.entry)))


def _seconds(works: dict[str, Work]) -> float:
  return sum(work.seconds for work in works.values())


def _work(
  program: hlo.Program,
  computation: hlo.Computation,
  one: hlo.Instruction,
  chip: Chip,
) -> tuple[str, Work]:
  """Class and work of an instruction that is a kernel."""
  if traffic.is_collective(one.opcode):
    sent = traffic.sent(one.opcode, one.arrays, one.rest)
    return COLLECTIVES, Work(num_bytes=sent, seconds=sent / chip.link)
  if traffic.starts(one):
    started = Work()
    for name in one.called:
      inner = program.computations[name]
      for each in inner.instructions:
        if traffic.is_collective(each.opcode):
          started += _work(program, inner, each, chip)[1]
    return COLLECTIVES, started
  if traffic.goes_on(one):
    return COLLECTIVES, Work()
  flops, narrow, kind = _products(program, computation, one)
  num_bytes = _bytes(program, computation, one)
  rate = chip.peak * (_FLOAT32_RATE if chip.gpu and not narrow else 1)
  work = Work(
    flops=flops,
    num_bytes=num_bytes,
    seconds=max(flops / rate, num_bytes / chip.bandwidth),
    float32_flops=0.0 if narrow else flops,
  )
  if not kind:
    kind = COPIES if _only_moves(program, one) else ELEMENTWISE
  return kind, work


def _operands(
  computation: hlo.Computation, one: hlo.Instruction
) -> list[hlo.Array]:
  """The arrays that an instruction takes; of a tuple all of its arrays."""
  return [
    array
    for name in one.operands
    if name in computation.named
    for array in computation.named[name].arrays
  ]


# --- FLOPs.


def _products(
  program: hlo.Program, computation: hlo.Computation, one: hlo.Instruction
) -> tuple[float, bool, str]:
  """FLOPs, whether their numbers have 16 bits or fewer, and the class.

  No class: no products.
  """
  if one.opcode == 'dot':
    taken = _operands(computation, one)
    contracted = one.sizes('lhs_contracting_dims')
    flops = 2.0 * one.arrays[0].size
    for axis in contracted:
      flops *= taken[0].shape[axis]
    return float(flops), _is_narrow(taken), _scores_kind(one) or LINEAR
  if one.opcode == 'convolution':
    return _convolution(one, _operands(computation, one))
  if one.opcode == 'custom-call':
    return _kernel(computation, one)
  if one.opcode != 'fusion':
    return 0.0, True, ''
  total, narrow = 0.0, True
  kinds: dict[str, float] = {}
  for name in one.called:
    inner = program.computations.get(name)
    if inner is None:
      continue
    for each in inner.instructions:
      flops, is_narrow, kind = _products(program, inner, each)
      if flops:
        total += flops
        narrow = narrow and is_narrow
        kinds[kind] = kinds.get(kind, 0.0) + flops
  return total, narrow, max(kinds, key=kinds.__getitem__) if kinds else ''


def _convolution(
  one: hlo.Instruction, taken: list[hlo.Array]
) -> tuple[float, bool, str]:
  """A convolution, or a matrix product written as one, as TPUs have them."""
  labels = re.search(r'dim_labels=\w+_(\w+)->(\w+)', one.rest)
  assert labels is not None, 'a convolution without dim_labels'
  kernel, result = taken[1], one.arrays[0]
  features = kernel.shape[labels[1].index('o')]
  flops = 2.0 * result.size * kernel.size / features
  window = re.search(r'size=([\dx]+)', one.rest)
  spatial = set(window[1].split('x')) if window else set()
  # A product of two batches has windows as large as its batches.
  if attention := _scores_kind(one):
    kind = attention
  elif spatial <= {'1'} or 'dot_general' in one.op_name:
    kind = LINEAR
  else:
    kind = CONVOLUTIONS
  return flops, _is_narrow(taken), kind


def _kernel(
  computation: hlo.Computation, one: hlo.Instruction
) -> tuple[float, bool, str]:
  """A call of a library or of a kernel of our own."""
  taken = _operands(computation, one)
  if one.target.startswith('__cudnn$conv'):
    return _convolution(one, taken)
  if one.target.startswith('__cudnn$fmha'):
    q, k = taken[:2]
    # Five products instead of two.
    factor = 2.5 if 'Backward' in one.target else 1.0
    flops = factor * 4 * q.size * k.shape[1]
    return flops, _is_narrow([q]), _attention_kind(one) or SELF_ATTENTION
  if one.target.startswith('__cublas$'):
    dims = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', one.rest)
    flops = 2.0 * one.arrays[0].size
    for axis in re.findall(r'\d+', dims[1]) if dims else ():
      flops *= taken[0].shape[int(axis)]
    return flops, _is_narrow(taken[:2]), LINEAR
  if one.target == 'tpu_custom_call' and 'splash' in one.name + one.op_name:
    arrays = [a for a in taken if len(a.shape) >= 3 and a.dtype[-2:] == '16']
    q, k = arrays[:2]
    # dq takes three products, dkv four.
    factor = 1.5 if '_dq' in one.name else 2.0 if '_dkv' in one.name else 1.0
    flops = factor * 4 * q.size * k.shape[-2]
    return flops, True, _attention_kind(one) or SELF_ATTENTION
  return 0.0, True, ''


def _attention_kind(one: hlo.Instruction) -> str:
  if 'cross_attention' in one.op_name:
    return CROSS_ATTENTION
  # The name of the layer, of the VAE's as well.
  return SELF_ATTENTION if 'attention' in one.op_name else ''


def _scores_kind(one: hlo.Instruction) -> str:
  """The attention that a product belongs to, if it is not a linear layer's."""
  linear = re.search(r'/([qkvo]|qkv|proj)/(dot|conv)_general', one.op_name)
  return '' if linear else _attention_kind(one)


def _is_narrow(taken: list[hlo.Array]) -> bool:
  return all(a.dtype not in ('f32', 'f64') for a in taken[:2])


# --- Bytes.


def _bytes(
  program: hlo.Program, computation: hlo.Computation, one: hlo.Instruction
) -> float:
  if one.target == 'AllocateBuffer':
    return 0.0
  taken = _operands(computation, one)
  results = list(one.arrays)
  if one.opcode in ('copy-start', 'slice-start'):
    results = results[:1]  # Beside it the source and a flag.
  inner = None
  if one.opcode == 'fusion' and one.called:
    inner = program.computations.get(one.called[0])
  if inner is None:
    if one.opcode in ('dynamic-slice', 'slice', 'gather', 'slice-start'):
      taken = [results[0], *taken[1:]]
    elif one.opcode == 'dynamic-update-slice':
      taken, results = taken[1:], [taken[1]]
    return sum(a.num_bytes for a in (*taken, *results) if not a.on_chip)
  reads = (
    _read_of(program, inner, each.name, taken[int(each.inputs)].num_bytes)
    for each in inner.instructions
    if each.opcode == 'parameter' and not taken[int(each.inputs)].on_chip
  )
  writes = (
    size
    for size, array in zip(_written(program, inner), results, strict=False)
    if not array.on_chip
  )
  return sum(reads) + sum(writes)


def _read_of(
  program: hlo.Program, inner: hlo.Computation, name: str, whole: int
) -> int:
  """What a fusion reads of an operand: where it takes slices, the slices."""
  total = 0
  for user in inner.users.get(name, ()):
    if user.opcode in ('bitcast', 'reshape', 'convert', 'copy'):
      total += _read_of(program, inner, user.name, whole)
    elif user.opcode in ('dynamic-slice', 'slice', 'gather'):
      # As an index it is small either way.
      total += user.arrays[0].num_bytes if user.operands[0] == name else 0
    elif user.opcode == 'dynamic-update-slice' and user.operands[0] == name:
      pass  # Written in place.
    elif user.opcode == 'fusion':
      nested = program.computations[user.called[0]]
      total += sum(
        _read_of(program, nested, each.name, whole)
        for each in nested.instructions
        if each.opcode == 'parameter'
        and user.operands[int(each.inputs)] == name
      )
    else:
      return whole
  return min(total, whole)


def _written(program: hlo.Program, inner: hlo.Computation) -> list[float]:
  """Bytes of each result of a fusion: where it updates a slice, the slice."""
  root = inner.root
  names = root.operands if root.opcode == 'tuple' else (root.name,)
  sizes: list[float] = []
  for each in map(inner.named.__getitem__, names):
    source = each
    while source.opcode in ('bitcast', 'reshape', 'convert', 'copy'):
      source = inner.named[source.operands[0]]
    if source.opcode == 'dynamic-update-slice':
      sizes.append(inner.named[source.operands[1]].arrays[0].num_bytes)
    elif each.opcode == 'fusion':
      sizes.append(sum(_written(program, program.computations[each.called[0]])))
    else:
      sizes.append(sum(a.num_bytes for a in each.arrays))
  return sizes


def _only_moves(program: hlo.Program, one: hlo.Instruction) -> bool:
  """Whether an instruction puts numbers elsewhere and changes none.

  A bias that is added on the way does not count, nor does what computes where
  to put them; products, powers and sums over an axis do.
  """
  if one.opcode != 'fusion':
    return one.opcode in _MOVES
  opcodes = _opcodes(program, one)
  return bool(opcodes & _MOVES) and opcodes <= (
    _MOVES | _FREE | _INDEX_ARITHMETIC
  )


def _opcodes(program: hlo.Program, one: hlo.Instruction) -> set[str]:
  """Of all that a fusion does, fusions in it included."""
  found = set()
  for name in one.called:
    for each in program.computations[name].instructions:
      nested = each.opcode == 'fusion'
      found |= _opcodes(program, each) if nested else {each.opcode}
  return found
