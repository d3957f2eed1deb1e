"""Compares ours with other people's classes and with the stored numbers.

  pip install -e '.[parity]'
  python tests/parity/peers.py --write docs/parity.md

Prints the table that `docs/parity.md` holds, and with --write makes the file.
Exits with 1 if a float32 result is off by more than is allowed. The networks
have random weights; --small makes them narrow.
"""

import argparse
import collections
import importlib.metadata
import pathlib
import sys
from collections.abc import Callable, Iterator

import jax

_INTRO = """# Parity

How far this library's numbers are from those of the classes that people use
with PyTorch, and from those of the public PyTorch code of HiAR. Made by

    python tests/parity/peers.py --write docs/parity.md

on a CPU with {versions}.

Nothing here needs downloaded weights: parity is a property of the arithmetic,
and random weights bring all of it into play.
"""

_PEERS = """
## Peers

Both sides have the same random weights, carried over by the tables that also
convert checkpoints. *abs* is the largest difference, *rel* the larger of
|a - b| / |b| in the 2-norm and in the maximum norm; both are taken against the
peer in float32. float32 must be within {allowed:.0e} rel. In bfloat16 the two
round at other places; *its bf16* is the rel by which the peer itself moves.

Structures are the released ones (heads, norms, text of 512 rows of 4096, levels
of the VAE, position tables), cut in depth, and in width where it says so: 14B
has 40 heads and an ffn of 13824, the VAE a base width of 96, umT5 24 layers of
64 heads.

| what | output | peer | f32 abs | f32 rel | bf16 abs | bf16 rel | its bf16 |
|---|---|---|---|---|---|---|---|
"""

_GOLDEN = """
## Stored numbers of the public code

Arrays in `tests/golden`, made by the public PyTorch HiAR in float32 at tiny
sizes; `python tests/parity/table.py` lists them one by one. Errors are absolute
for single passes and whole pipelines (of values of about 1), relative for
formulas and gradients.

| file | arrays | largest abs | allowed | largest rel | allowed |
|---|---|---|---|---|---|
"""

_NOTES = """
## Where the numbers are meant to differ

* The public samplers give the network 1000 sigma truncated to a whole number.
  Here it is given the level that the sample has, and so are the peers above.
* diffusers takes the timestep's sinusoids in float32, where an angle near 1000
  is off by up to 6e-5; here they are exact. That is a part of the differences
  of the flows above.
* diffusers starts UniPC at the level 1 - 1e-6 and Wan2.1 at 0.999 before the
  shift. `solvers.unipc_levels` is Wan2.1's, and the peer is given its levels.
* The tiny VAE's frames in [0, 1] come of numbers up to 34. The stored ones are
  2.1e-5 from the same arithmetic in float64, and 3.4e-5 from the same class
  decoding one latent at a time; ours are 3.3e-5 from float64.
"""

# num_heads, ffn_dim, text_dim, text_len; heads are of 128, as released. The 14B
# has half its width here: two of its layers would take 12 GiB to compare.
_FULL = {'1.3B': (12, 8960, 4096, 512), '14B': (20, 6912, 4096, 512)}
_SMALL = {'1.3B': (2, 512, 64, 12), '14B': (3, 640, 64, 12)}


def main(args: argparse.Namespace) -> int:
  # Before the first array; a float32 product is otherwise allowed to be less.
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_default_matmul_precision', 'highest')
  from tests.parity import peers_lib

  versions = ', '.join(
    f'{name} {importlib.metadata.version(name)}'
    for name in ('jax', 'torch', 'diffusers', 'transformers')
  )
  text, failed = _INTRO.format(versions=versions), 0

  def say(part: str) -> None:
    nonlocal text
    text += part
    print(part, end='', flush=True)

  say(_PEERS.format(allowed=peers_lib.FLOAT32))
  for comparison in comparisons(small=args.small):
    failed += not comparison.passes()
    say(_row(comparison))
  if not args.no_golden:
    say(_GOLDEN)
    for row, passes in _golden_rows():
      failed += not passes
      say(row)
  text += _NOTES
  if args.write:
    args.write.write_text(text, encoding='utf-8')
    print(f'wrote {args.write}')
  if failed:
    print(f'{failed} rows are off by more than is allowed', file=sys.stderr)
  return 1 if failed else 0


def comparisons(*, small: bool) -> Iterator:
  """Every comparison with a peer, one network in memory at a time."""
  from tests.parity import peers_networks, peers_solvers

  for name, (heads, ffn_dim, text_dim, text_len) in (
    _SMALL if small else _FULL
  ).items():
    yield from peers_networks.transformer_comparisons(
      f'DiT of {name}: 2 layers, {heads} heads of 128, ffn {ffn_dim}',
      num_heads=heads,
      ffn_dim=ffn_dim,
      text_dim=text_dim,
      text_len=text_len,
    )
  yield from peers_networks.vae_comparisons(base_dim=8 if small else 32)
  yield from peers_networks.umt5_comparisons(
    dim=128, num_heads=4, num_layers=2 if small else 8
  )
  yield from peers_solvers.solver_comparisons(
    num_steps=8 if small else 50, shift=5.0
  )
  yield from peers_networks.sampler_comparisons(
    num_heads=2, ffn_dim=512, num_steps=4 if small else 24
  )


def _row(comparison) -> str:
  cells = [comparison.part, comparison.output, comparison.peer]
  cells += [_number(error) for error in comparison.errors()]
  low = comparison.errors('ours_low')
  cells += ['', ''] if low is None else [_number(error) for error in low]
  theirs = comparison.errors('theirs_low')
  cells.append('' if theirs is None else _number(theirs[1]))
  return f'| {" | ".join(cells)} |\n'


def _golden_rows() -> Iterator[tuple[str, bool]]:
  """A row for each stored file, and whether all of it is within bounds."""
  from tests.parity import all_cases

  by_file = collections.defaultdict(list)
  for case in all_cases.CASES:
    by_file[case.file].append(case)
  for file, cases in sorted(by_file.items()):
    errors = {case: case.error() for case in cases}
    cells = [file, str(len(cases))]
    for relative in (False, True):
      of_kind = [case for case in cases if case.relative == relative]
      cells += _summary(of_kind, errors.get)
    passes = all(error <= case.tolerance for case, error in errors.items())
    yield f'| {" | ".join(cells)} |\n', passes


def _summary(cases: list, error_of: Callable) -> list[str]:
  """Largest error and the largest tolerance of some cases."""
  if not cases:
    return ['', '']
  return [
    _number(max(map(error_of, cases))),
    _number(max(case.tolerance for case in cases)),
  ]


def _number(error: float) -> str:
  return f'{error:.1e}'


if __name__ == '__main__':
  sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--write', type=pathlib.Path, help='the file to make')
  parser.add_argument(
    '--small', action='store_true', help='small networks: seconds'
  )
  parser.add_argument(
    '--no_golden', action='store_true', help='leave the stored numbers out'
  )
  sys.exit(main(parser.parse_args()))
