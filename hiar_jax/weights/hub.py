"""Releases that lie on a hub: their names, and fetching what is needed.

A hub's repository may hold many networks, each in several formats. Its list of
files is asked for first, and of it what one release needs is fetched.
"""

import fnmatch
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

_TRUE = ('1', 'ON', 'YES', 'TRUE')
_NAME = re.compile(r'[\w.-]+/[\w.-]+(?:[:/][\w. +@=-]+(?:/[\w. +@=-]+)*)?')
_WEIGHTS = ('.safetensors', '.bin', '.pt', '.pth', '.ckpt')
_INDEX = '.index.json'
# Folders of a release's parts, and Wan's tokenizer.
_FOLDERS = ('transformer', 'vae', 'text_encoder', 'tokenizer')
_TOKENIZER = (
  *('tokenizer*.json', 'spiece.model', 'tokenizer.model'),
  *('special_tokens_map.json', 'added_tokens.json'),
)
# Of the top folder; a VAE and a text encoder go with any transformer.
_PARTS = ('Wan2.[0-9]_VAE*', 'models_t5*')
# Two transformers, for high noise and for low.
EXPERTS = (
  ('high_noise_model', 'low_noise_model'),
  ('transformer', 'transformer_2'),
)
# LightX2V's files, one a layer, which an index beside them names.
_LAYER = re.compile(r'block_\d+|non_block')
# Another precision of the same network: 'model.fp16.safetensors'.
_VARIANT = re.compile(r'\.(fp16|bf16|fp32|fp8\w*|ema|non_ema)(?=[.-])')


def download(
  name: str, *, as_base: bool = False, has: Collection[str] = ()
) -> pathlib.Path:
  """The folder or file of a hub's release, fetched unless it was before.

  Args:
    name: 'owner/name', or 'owner/name/...' or 'owner/name:...' for a folder or
      file in it. With HF_HUB_OFFLINE=1 only what is there is used.
    as_base: of two transformers none is needed.
    has: kinds of parts that are there already, as `releases.Release` names
      them: weights of theirs are not fetched.

  Raises:
    ValueError: if it cannot be had, it is unclear which of its networks is
      meant, the disk is too small, or huggingface_hub is not installed.
  """
  try:
    import huggingface_hub
  except ImportError:
    raise ValueError(
      f'{name!r} is no folder; to fetch it from a hub, '
      "pip install 'hiar_jax[convert]'"
    ) from None
  # 'owner/name:path' and 'owner/name/path' are the same.
  owner, repo, *inside = name.replace(':', '/', 1).split('/')
  repo, inner = f'{owner}/{repo}', '/'.join(inside)
  if os.environ.get('HF_HUB_OFFLINE', '').upper() in _TRUE:
    return _offline(huggingface_hub, repo, name) / inner
  try:
    info = huggingface_hub.HfApi().model_info(repo, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
  except Exception as error:
    if not _is_of_hub(error):
      raise
    raise _unavailable(name, _first_line(error)) from error
  files = choose(sizes, repo, inner, as_base=as_base, has=has)
  _check_space(huggingface_hub, name, sum(sizes[file] for file in files))
  total = sum(sizes[file] for file in files) / 1e9
  print(
    f'fetching {len(files)} of {len(sizes)} files of {repo}, {total:.1f} GB '
    '(those that are not here yet)',
    file=sys.stderr,
  )
  try:
    folder = huggingface_hub.snapshot_download(
      repo, revision=info.sha, allow_patterns=[_literal(f) for f in files]
    )
  except Exception as error:
    if not _is_of_hub(error):
      raise
    raise _unavailable(name, _first_line(error)) from error
  return pathlib.Path(folder) / inner


def choose(
  sizes: Mapping[str, int],
  repo: str,
  inner: str = '',
  *,
  as_base: bool = False,
  has: Collection[str] = (),
) -> list[str]:
  """The files of one release in a repository.

  Args:
    sizes: bytes of its files by their paths.
    repo: 'owner/name', for messages.
    inner: folder or file in it.
    as_base: of two transformers none is needed.
    has: see `download`.

  Raises:
    ValueError: if there is none, or it is unclear which.
  """
  if inner in sizes:
    folder = inner.rpartition('/')[0]
    beside = [f for f in sizes if f.rpartition('/')[0] == folder]
    stem = _stem(inner)
    return sorted(
      f
      for f in beside
      if _stem(f) == stem or f.rpartition('/')[2] == 'config.json'
    )
  root = f'{inner}/' if inner else ''
  inside = {f[len(root) :]: n for f, n in sizes.items() if f.startswith(root)}
  if not inside:
    raise ValueError(f'{repo} has no file or folder {inner!r}')
  experts = next(
    (p for p in EXPERTS if all(_under(inside, folder) for folder in p)), ()
  )
  if experts and not as_base:
    raise ValueError(
      f'{repo} has two transformers as Wan2.2-A14B has, one for high noise and '
      f'one for low; this library runs one. Give {repo}/{root}{experts[0]} or '
      f'{repo}/{root}{experts[1]}, with base={repo} for the other parts'
    )
  chosen = []
  for folder in _FOLDERS:
    if folder not in experts:
      files = _under(inside, folder)
      chosen += [f'{folder}/{f}' for f in _part(files, folder)]
  google = [f for f in inside if re.match(r'google/[^/]+/[^/]+$', f)]
  chosen += [f for f in google if _is_tokenizer(f.rpartition('/')[2])]
  top = [f for f in inside if '/' not in f]
  parts = [f for f in top if any(fnmatch.fnmatch(f, p) for p in _PARTS)]
  chosen += [f for f in parts if _is_weights(f)]
  rest = _one_format(
    [
      f
      for f in top
      if _is_weights(f) and f not in parts and not f.startswith('models_clip')
    ]
  )
  if 'transformer' in has and any(map(_is_weights, chosen)):
    rest = []
  sets = {_stem(f) for f in rest}
  if any(f.endswith(_INDEX) for f in rest):
    sets = {stem for stem in sets if not _LAYER.fullmatch(stem)}
  if len(sets) > 1:
    raise _several(repo, root, rest, inside)
  chosen += rest
  chosen += [f for f in top if f == 'config.json' or _is_tokenizer(f)]
  chosen = [
    f for f in chosen if not (_is_weights(f) and _kind(f) in has)
  ] or chosen
  if not any(_is_weights(f) for f in chosen):
    raise _several(repo, root, [f for f in inside if _is_weights(f)], inside)
  return sorted(root + f for f in set(chosen))


def is_name(name: str) -> bool:
  """Whether a text may be a release's 'owner/name', or of a file in it."""
  if not _NAME.fullmatch(name) or name.startswith('.'):
    return False
  # A folder here with a mistake in the rest of its path is asked of no hub.
  first, *others = name.split('/')
  return len(others) == 1 or not pathlib.Path(first).exists()


def _offline(huggingface_hub: Any, repo: str, name: str) -> pathlib.Path:
  """The folder of what was fetched before, which may be a part of a release.

  Whether it is enough is asked of the folder: a release needs fewer files than
  its repository has.
  """
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        repo, allow_patterns=['*.json'], local_files_only=True
      )
    )
  except (ValueError, OSError) as error:
    # Told by newer versions, where some file of the repository is not there.
    folder = getattr(error, 'snapshot_path', None)
    if folder is None:
      raise _unavailable(
        name, f'HF_HUB_OFFLINE is set; {_first_line(error)}'
      ) from error
    return pathlib.Path(folder)


def _is_of_hub(error: Exception) -> bool:
  """Whether an error is about the hub, the network or the disk.

  Whose errors those of the network are differs between versions of
  huggingface_hub: of requests, which are OSErrors, of httpx or of httpx2.
  """
  names = {kind.__name__ for kind in type(error).__mro__}
  return isinstance(error, ValueError | OSError) or 'HTTPError' in names


def _unavailable(name: str, reason: str) -> ValueError:
  return ValueError(
    f'{name!r} is no folder here, and no release of that name could be fetched '
    f'({reason})'
  )


def _several(
  repo: str, root: str, files: Sequence[str], sizes: Mapping[str, int]
) -> ValueError:
  """That one of these files is to be named, with their sizes."""
  if not files:
    return ValueError(f'{repo}/{root} has no weights: {sorted(sizes)[:8]}')
  groups: dict[str, int] = {}
  for file in files:
    group = re.sub(r'-\d{5}-of-\d{5}', '', file)
    groups[group] = groups.get(group, 0) + sizes[file]
  shown = [f'{repo}/{root}{f} ({n / 1e9:.1f} GB)' for f, n in groups.items()]
  more = f' and {len(shown) - 12} more' if len(shown) > 12 else ''
  return ValueError(
    f'{repo} holds several networks ({sum(groups.values()) / 1e9:.0f} GB); '
    f'name one: {", ".join(sorted(shown)[:12])}{more}'
  )


def _check_space(huggingface_hub: Any, name: str, needed: int) -> None:
  folder = pathlib.Path(huggingface_hub.constants.HF_HUB_CACHE)
  while not folder.exists():
    folder = folder.parent
  free = shutil.disk_usage(folder).free
  if needed > free:
    raise ValueError(
      f'{name} needs {needed / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} '
      'GB free; HF_HUB_CACHE names another folder'
    )


def _kind(file: str) -> str:
  """The kind of part that a file of weights is of."""
  folder, _, name = file.rpartition('/')
  if folder:
    return folder
  vae, text_encoder = _PARTS
  if fnmatch.fnmatch(name, vae):
    return 'vae'
  return 'text_encoder' if fnmatch.fnmatch(name, text_encoder) else ''


def _under(files: Iterable[str], folder: str) -> list[str]:
  """Names of the files right in a folder."""
  return [
    f[len(folder) + 1 :]
    for f in files
    if f.startswith(f'{folder}/') and '/' not in f[len(folder) + 1 :]
  ]


def _part(files: list[str], folder: str) -> list[str]:
  """Of a part's folder what is read."""
  if folder == 'tokenizer':
    return [f for f in files if _is_tokenizer(f)]
  weights = _one_format([f for f in files if _is_weights(f)])
  return [*weights, *(f for f in files if f == 'config.json')]


def _one_format(files: list[str]) -> list[str]:
  """Safetensors rather than pickles, the plain name rather than a variant."""
  tensors = [f for f in files if '.safetensors' in f]
  stems = {_stem(f) for f in tensors}
  files = tensors + [
    f for f in files if '.safetensors' not in f and _stem(f) not in stems
  ]
  plain = {_stem(f) for f in files if not _VARIANT.search(f)}
  return [
    f
    for f in files
    if not (_VARIANT.search(f) and _stem(_VARIANT.sub('', f)) in plain)
  ]


def _stem(file: str) -> str:
  """A file's name without number and suffix: one for all of a set."""
  name = file.rpartition('/')[2].removesuffix(_INDEX)
  name = re.sub(r'-\d{5}-of-\d{5}(?=\.)', '', name)
  return name.rpartition('.')[0] if '.' in name else name


def _is_weights(file: str) -> bool:
  return file.removesuffix(_INDEX).endswith(_WEIGHTS)


def _is_tokenizer(name: str) -> bool:
  return any(fnmatch.fnmatch(name, pattern) for pattern in _TOKENIZER)


def _literal(file: str) -> str:
  """As a pattern that matches this name alone."""
  return re.sub(r'([*?[])', r'[\1]', file)


def _first_line(error: BaseException) -> str:
  lines = str(error).strip().splitlines() or ['']
  return f'{type(error).__name__}: {lines[0][:200]}'
