"""What a release was trained for, found and said in one line."""

import pathlib
import sys
from collections.abc import Sequence

from hiar_jax.weights import families, identity, lora_files
from hiar_jax.weights.families import Family
from hiar_jax.weights.releases import Path, Release, split_names


def find(
  name: Path | Sequence[Path],
  release: Release,
  given: Family | None = None,
  *,
  loras: Sequence[lora_files.Given] = (),
  also: str = '',
) -> tuple[Family, tuple[lora_files.Given, ...]]:
  """The family of a release's transformer; prints what is taken, and why.

  Args:
    name: as the release was asked for.
    release: what was found under it.
    given: as a person says; what the names tell is not asked then.
    loras: that are added to the weights. On Wan2.1's own transformer that of a
      student makes it this student.
    also: is printed at the end of the line.

  Returns:
    The family, and the LoRAs; where none are given that which the family's
    base was published with, if it lies beside it.

  Raises:
    ValueError: if nothing tells, or a name tells that it is none of these.
  """
  reason = 'as asked for'
  if given is None:
    names = [str(release.transformer)] if release.transformer else []
    asked = split_names(name)
    if len(asked) == 1:
      # A hub's name is a folder with another name by now.
      names.append(str(asked[0]).replace(':', '/'))
    is_base = release.transformer is not None and identity.is_base_model(
      release.transformer
    )
    found = families.recognise(names, is_base=is_base)
    if found is None or found[0].is_base:
      found = _of_loras(loras) or found
    if found is None:
      raise families.ask(name)
    given, told = found
    reason = f'by the name {told!r}'
  if given.lora and not loras and release.transformer is not None:
    beside = release.transformer.with_name(given.lora)
    if beside.is_file():
      loras = (beside,)
      reason += f'; {beside.name} beside it is merged'
  ending = f'; {also}' if also else ''
  print(f'note: {name}: {given}; {reason}{ending}', file=sys.stderr)
  if given.lora and not loras:
    print(
      f'note: {given.title} is its base with its {given.lora} (loras=, --lora) '
      'merged into it; without that it makes worse videos',
      file=sys.stderr,
    )
  return given, tuple(loras)


def _of_loras(
  loras: Sequence[lora_files.Given],
) -> tuple[Family, str] | None:
  """What the names of LoRA files tell of a student, the last one first."""
  for path, _ in reversed(lora_files.with_scales(loras)):
    # Its own name: style files lie in folders of any name.
    found = families.recognise([pathlib.Path(path).name])
    if found is not None and not found[0].is_base:
      return found
  return None
