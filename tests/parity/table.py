"""Prints how far ours is from every stored array of the public code.

  python tests/parity/table.py [FILE ...]

FILE: stems of tests/golden, default all. Exits with 1 if an error is above its
tolerance or an array is not compared.
"""

import pathlib
import sys

import jax


def main(names: list[str]) -> int:
  # Before the first array; a float32 product is otherwise allowed to be less.
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_default_matmul_precision', 'highest')
  from tests.parity import all_cases, golden_lib

  over = 0
  print(f'{"file":17} {"array":55} {"error":>8} {"allowed":>8}')
  for case in all_cases.CASES:
    if names and case.file not in names:
      continue
    error = case.error()
    # Written so that NaN is not ok.
    ok = error <= case.tolerance
    over += not ok
    print(
      f'{case.file:17} {case.array.removeprefix("out/"):55} {error:8.1e} '
      f'{case.tolerance:8.0e} {"rel" if case.relative else "abs"} '
      f'{"ok" if ok else "OVER"}',
      flush=True,
    )
  missing = [
    f'{file}: {array}'
    for file in names or golden_lib.files()
    for array in all_cases.uncompared(file)
  ]
  for line in missing:
    print(f'not compared: {line}')
  return 1 if over or missing else 0


if __name__ == '__main__':
  sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
  sys.exit(main(sys.argv[1:]))
