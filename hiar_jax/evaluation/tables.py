"""Results as lines of plain text."""

import math
from collections.abc import Mapping


def format_rows(
  columns: Mapping[str, tuple[str, str]],
  rows: Mapping[str, Mapping[str, float]],
) -> list[str]:
  """Lays out results: a row each, numbers side by side under their headings.

  Args:
    columns: heading to (name of a number, its format).
    rows: numbers by the label of what they are of.

  Returns:
    Lines, the headings first; NaN is shown as '-'.
  """
  width = max(map(len, ('', *rows)))
  lines = ['  '.join((' ' * width, *columns))]
  for label, numbers in rows.items():
    cells = [label.ljust(width)]
    for heading, (name, style) in columns.items():
      value = numbers[name]
      cell = '-' if math.isnan(value) else format(value, style)
      cells.append(cell.rjust(len(heading)))
    lines.append('  '.join(cells))
  return lines
