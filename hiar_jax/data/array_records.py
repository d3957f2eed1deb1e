"""Files of records that are read one at a time, by ArrayRecord."""

import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import grain
from array_record.python import array_record_module

from hiar_jax.runtime import files


def write(path: str | os.PathLike, records: Iterable[bytes]) -> None:
  """Writes a file in one move: it is whole or it is not there."""
  with files.whole_file(path) as partial:
    # One record a chunk, so that reading one does not decode its neighbours;
    # noise does not compress.
    writer = array_record_module.ArrayRecordWriter(
      str(partial), 'group_size:1,uncompressed'
    )
    for record in records:
      writer.write(record)
    writer.close()


def read(path: pathlib.Path) -> Iterator[bytes]:
  """All records of a file, in their order.

  Raises:
    ValueError: naming the file, if it is damaged.
  """
  try:
    reader = array_record_module.ArrayRecordReader(str(path))
  except RuntimeError as error:
    raise ValueError(f'{path.name} is damaged: {error}') from error
  try:
    for i in range(reader.num_records()):
      yield reader.read([i])[0]
    if not reader.ok():
      raise ValueError(f'{path.name} is damaged: it is torn')
  except RuntimeError as error:
    raise ValueError(f'{path.name} is damaged: {error}') from error
  finally:
    if reader.ok():
      reader.close()


def open_source(
  paths: Sequence[pathlib.Path],
) -> grain.sources.ArrayRecordDataSource:
  """Records of files by number, one file after the other.

  Raises:
    ValueError: if a file is damaged.
  """
  try:
    return grain.sources.ArrayRecordDataSource([str(path) for path in paths])
  except RuntimeError as error:
    raise ValueError(f'files are damaged: {error}') from error
