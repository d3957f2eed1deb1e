"""What a release was trained for, found and said in one line."""

import sys
from collections.abc import Sequence

from hiar_jax.weights import families, identity
from hiar_jax.weights.families import Family
from hiar_jax.weights.releases import Path, Release, split_names


def find(
  name: Path | Sequence[Path],
  release: Release,
  given: Family | None = None,
  *,
  has_lora: bool = False,
) -> Family:
  """The family of a release's transformer; prints what is taken, and why.

  Args:
    name: as the release was asked for.
    release: what was found under it.
    given: as a person says; what the names tell is not asked then.
    has_lora: whether a LoRA is added to the weights.

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
    if found is None:
      raise families.ask(name)
    given, told = found
    reason = f'by the name {told!r}'
  print(f'note: {name}: {given}; {reason}', file=sys.stderr)
  if given.lora and not has_lora:
    print(
      f'note: {given.title} is its base with its {given.lora} (loras=, --lora) '
      'merged into it; without that it makes worse videos',
      file=sys.stderr,
    )
  return given
