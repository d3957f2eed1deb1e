"""Prompts: what videos are asked for, by number; and those of a file.

A file is UTF-8, one prompt a line, or with the suffix `.jsonl` one JSON object
a line that has the prompt as `prompt`. A byte order mark, line ends of Windows
and blank lines make no difference. The file is mapped and not loaded: in memory
are 16 bytes a prompt.
"""

import array
import hashlib
import mmap
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from hiar_jax.runtime import files, seams

_BYTE_ORDER_MARK = b'\xef\xbb\xbf'
_NO_LINES = ('.json', '.csv', '.tsv')
_JSON_LINES = ('.jsonl', '.ndjson')


class Prompts(Protocol):
  """A source of captions; the same number is the same caption everywhere."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> str: ...

  def identity(self) -> dict[str, Any]:
    """What these prompts are, by content and not by place; JSON."""


class FilePrompts:
  """The prompts of a file, in its order; see `Prompts`."""

  def __init__(
    self,
    path: str | os.PathLike,
    *,
    field: str = 'prompt',
    objects: bool | None = None,
  ):
    """Reads the file once, to check and to find its lines.

    Args:
      path: of the file.
      field: of the JSON objects, that has the prompt.
      objects: whether lines are of JSON; None: by the file's suffix.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it has no prompts, is not UTF-8 or a line has no prompt,
        naming the line.
    """
    self._path = pathlib.Path(path)
    suffix = self._path.suffix.lower()
    if objects is None:
      objects = suffix in _JSON_LINES
    if suffix in _NO_LINES:
      raise ValueError(
        f'{self._path} is no list of prompts: a text file has one a line, and '
        'a .jsonl file one JSON object a line'
      )
    self._field = field if objects else None
    self._starts, self._ends = array.array('q'), array.array('q')
    digest = hashlib.sha256()
    if not self._path.is_file():
      raise FileNotFoundError(f'no prompts at {self._path}: no such file')
    for number, start, line in _lines(self._path):
      text = self._text(line, number)
      if text is None:
        continue
      self._starts.append(start)
      self._ends.append(start + len(line))
      # With its length: a prompt of JSON may have a line end in it.
      told = text.encode()
      digest.update(b'%d\n%s' % (len(told), told))
    if not self._starts:
      raise ValueError(f'{self._path} has no prompts: all lines are blank')
    self._sha256 = digest.hexdigest()
    with self._path.open('rb') as file:
      self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

  def __len__(self) -> int:
    return len(self._starts)

  def __repr__(self) -> str:
    return f'FilePrompts({str(self._path)!r}, {len(self)})'

  def __getitem__(self, index: int) -> str:
    line = self._bytes[self._starts[index] : self._ends[index]]
    text = self._text(line, 0)
    assert text is not None
    return text

  def identity(self) -> dict[str, Any]:
    """A file that was added to is another one."""
    return {'source': 'file', 'num': len(self), 'sha256': self._sha256}

  def _text(self, line: bytes, number: int) -> str | None:
    """The prompt of a line; None if it is blank."""
    try:
      text = line.decode().strip()
    except UnicodeDecodeError as error:
      is_utf16 = number == 1 and line[:2] in (b'\xff\xfe', b'\xfe\xff')
      raise ValueError(
        f'{self._path} is not UTF-8: byte {error.start + 1} of line {number} '
        f'is 0x{line[error.start]:02x}'
        + ' (it begins as UTF-16 does; save it as UTF-8)'
        * is_utf16
      ) from None
    if '\r' in text:
      raise ValueError(
        f'line {number} of {self._path} has a carriage return inside: as the '
        'line ends of a file they are not read'
      )
    if not text or self._field is None:
      return text or None
    try:
      value = files.parse_json(text)
    except ValueError as error:
      raise ValueError(
        f'line {number} of {self._path} is not JSON: {error}'
      ) from None
    found = value.get(self._field) if isinstance(value, dict) else None
    if not isinstance(found, str) or not found.strip():
      raise ValueError(
        f'line {number} of {self._path} has no text {self._field!r}'
      )
    return found.strip()


def open_prompts(
  options: Mapping[str, Any], config: Mapping[str, Any]
) -> FilePrompts:
  """The prompts of a file; the seam of `training.inputs`.

  Args:
    options: `path`, and `field` as `FilePrompts` has it.
    config: is not looked at.
  """
  del config
  if not options.get('path'):
    raise ValueError('prompts.path is missing: the file of the prompts')
  return FilePrompts(**options)


def not_taught(source: str | None, prompt: str) -> list[str]:
  """What a prompt lacks for a model that was trained on a source's prompts.

  Args:
    source: of the section `prompts` of its config; None: unknown.
    prompt: that it is to follow.

  Returns:
    A sentence each, by the function `unknown_words` of the source's module;
    none if the source has no such function.
  """
  if source is None:
    return []
  finds = seams.optional_function('data', source, 'unknown_words')
  return [] if finds is None else finds(prompt)


def reworded(source: str | None, prompt: str) -> str:
  """A prompt in the words of a source's prompts; arguments as `not_taught`.

  By the function `reword` of the source's module; as it is if the source has
  no such function.
  """
  if source is None:
    return prompt
  rewords = seams.optional_function('data', source, 'reword')
  return prompt if rewords is None else rewords(prompt)


def examples(source: str | None) -> tuple[str, ...]:
  """Some prompts of a source; arguments as `not_taught`.

  By the function `examples` of the source's module; none if it has no such
  function.
  """
  if source is None:
    return ()
  tells = seams.optional_function('data', source, 'examples')
  return () if tells is None else tuple(tells())


def _lines(path: pathlib.Path) -> Iterator[tuple[int, int, bytes]]:
  """Number from 1, start in the file and bytes of every line."""
  start = 0
  with path.open('rb') as file:
    if file.read(len(_BYTE_ORDER_MARK)) == _BYTE_ORDER_MARK:
      start = len(_BYTE_ORDER_MARK)
    file.seek(start)
    for number, line in enumerate(file, 1):
      yield number, start, line
      start += len(line)
