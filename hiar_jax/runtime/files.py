"""Files that are whole or not there, and JSON that anyone may have written.

A whole file is written under another name, then moved. Neither the standard
library nor a dependency has it: pathlib's `replace` is the move alone, and
packages that do more (atomicwrites) are no longer kept.
"""

import contextlib
import glob
import json
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Gives a name to write to; the file gets its own when the block has ended.

  After an error whatever had the name before is untouched. Another process may
  write the same file meanwhile: one of the two stays.
  """
  path = pathlib.Path(path)
  # By host as well: in containers on one shared disk all have the same number.
  host = socket.gethostname()
  partial = path.with_name(f'{path.name}.{host}-{os.getpid()}.part')
  try:
    yield partial
    with partial.open('rb') as file:
      os.fsync(file.fileno())
    partial.replace(path)
    # Those of killed processes.
    for leftover in path.parent.glob(f'{glob.escape(path.name)}.*.part'):
      leftover.unlink(missing_ok=True)
  except FileNotFoundError:
    # The other process was first, and took this one for a leftover.
    if not path.exists():
      raise
  finally:
    partial.unlink(missing_ok=True)


def parse_json(text: str | bytes) -> Any:
  """What JSON says.

  Raises:
    ValueError: also where it is nested deeper than Python can follow.
  """
  try:
    return json.loads(text)
  except RecursionError:
    raise ValueError('it is nested too deeply') from None
