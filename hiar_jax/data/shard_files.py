"""A set of numbered files that a killed run goes on with.

A folder holds `manifest.json`, which says what the set is and where it came
from, beside files that get their names only when they are whole. Any number of
processes share the files among them and never speak with each other.
`latents`, `text_states` and `trajectory_files` keep their sets this way.
"""

import dataclasses
import json
import os
import pathlib
from typing import ClassVar, Self

from hiar_jax.runtime import files, provenance

_FILE = 'manifest.json'


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a set holds; each kind of set adds where its elements came from.

  Attributes:
    num: number of elements.
    shard_size: of them in a file; the last file may have fewer.

  Raises:
    ValueError: naming the number that is not at least 1.
  """

  num: int
  shard_size: int

  elements: ClassVar[str]  # For people.
  program: ClassVar[str]  # That makes them.
  file_name: ClassVar[str]  # With a place for the number.

  def __post_init__(self):
    for name in ('num', 'shard_size'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} is not at least 1')

  @property
  def num_files(self) -> int:
    return -(-self.num // self.shard_size)

  def indices(self, shard: int) -> range:
    """The elements of a file."""
    start = shard * self.shard_size
    return range(start, min(start + self.shard_size, self.num))

  @classmethod
  def path(cls, directory: str | os.PathLike, shard: int) -> pathlib.Path:
    """Of a file of the set."""
    return pathlib.Path(directory) / cls.file_name.format(shard)

  @classmethod
  def read(cls, directory: str | os.PathLike) -> Self:
    """Reads the manifest of a folder.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is damaged or of another kind of set.
    """
    path = pathlib.Path(directory) / _FILE
    try:
      fields = files.parse_json(path.read_bytes())
    except FileNotFoundError:
      raise FileNotFoundError(
        f'no {cls.elements} in {directory}; {cls.program} makes them'
      ) from None
    except ValueError as error:
      raise ValueError(f'{path} is damaged: {error}') from error
    known = dataclasses.fields(cls)
    names = [field.name for field in known]
    # Fields with a default came later than the first sets.
    needed = {f.name for f in known if f.default is dataclasses.MISSING}
    if (
      not isinstance(fields, dict)
      or not needed <= fields.keys()
      or not fields.keys() <= set(names)
    ):
      raise ValueError(f'{path} is not a manifest with the fields {names}')
    return cls(**fields)

  def settle(self, directory: str | os.PathLike) -> None:
    """Writes the manifest, or checks that the folder's own is the same.

    A set of whole files may grow: what it has stays as it is.

    Raises:
      ValueError: naming the fields that differ.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / _FILE
    if path.exists():
      stored = self.read(directory)
      grows = self.num > stored.num and stored.num % stored.shard_size == 0
      self._check_same(directory, stored, ignore=('num',) if grows else ())
      if not grows:
        return
    fields = provenance.jsonable(self)
    with files.whole_file(path) as partial:
      partial.write_text(json.dumps(fields, indent=1) + '\n')

  def missing(
    self,
    directory: str | os.PathLike,
    *,
    shard_index: int = 0,
    num_shards: int = 1,
  ) -> list[int]:
    """The files that process `shard_index` of `num_shards` has yet to write.

    Raises:
      ValueError: if shard_index is not in [0, num_shards).
    """
    if not 0 <= shard_index < num_shards:
      raise ValueError(
        f'shard_index={shard_index} must be in [0, num_shards={num_shards})'
      )
    return [
      shard
      for shard in range(shard_index, self.num_files, num_shards)
      if not self.path(directory, shard).exists()
    ]

  def check_complete(self, directory: str | os.PathLike) -> None:
    """Raises if a folder does not hold all files of this very set.

    Raises:
      FileNotFoundError: if there is no set, or files are missing.
      ValueError: if it is another one, naming the fields that differ.
    """
    self._check_same(directory, self.read(directory))
    if missing := self.missing(directory):
      raise FileNotFoundError(
        f'{len(missing)} of {self.num_files} files of {self.elements} are '
        f'missing in {directory}, the first is '
        f'{self.path(directory, missing[0]).name}'
      )

  def _check_same(self, directory, stored, ignore=()):
    changed = provenance.config_differences(
      dataclasses.asdict(stored), dataclasses.asdict(self), ignore=ignore
    )
    if changed:
      raise ValueError(
        f'{directory} has other {self.elements}: {"; ".join(changed)}'
      )
