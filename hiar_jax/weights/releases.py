"""Weights as others publish them: where the parts of a release are.

A release has up to three networks and a tokenizer, laid out in one of these
ways, or as one file a network, which are told apart by their contents:

  Wan2.1                                       diffusers
  diffusion_pytorch_model*.safetensors         transformer/
  Wan2.1_VAE.pth                               vae/
  models_t5_umt5-xxl-enc-bf16.pth              text_encoder/
  google/umt5-xxl/                             tokenizer/

ComfyUI's folders are diffusion_models/, vae/ and text_encoders/.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Collection, Iterable, Sequence

from hiar_jax.weights import (
  foreign,
  hub,
  identity,
  layouts,
  safetensors_io,
  wrong_files,
)

Path = str | os.PathLike

# Where others keep a part.
FOLDERS = {
  'transformer': ('transformer', 'diffusion_models', 'unet'),
  'vae': ('vae',),
  'text_encoder': ('text_encoder', 'text_encoders', 'clip'),
}
# Files of Wan's own layout that are told by their names.
_NAMES = (('vae', 'Wan2.[0-9]_VAE*'), ('text_encoder', 'models_t5*'))
# Only image-to-video networks need it.
_CLIP = 'models_clip'
_UNFINISHED = ('.incomplete', '.part', '.crdownload', '.aria2', '.download')


@dataclasses.dataclass(frozen=True)
class Release:
  """Paths of the parts of a release; None: it does not have it.

  Attributes:
    transformer: a file of the network, see `foreign.StateDict`.
    vae: likewise.
    text_encoder: likewise.
    tokenizer: a folder.
  """

  transformer: pathlib.Path | None = None
  vae: pathlib.Path | None = None
  text_encoder: pathlib.Path | None = None
  tokenizer: pathlib.Path | None = None

  def over(self, base: 'Release') -> 'Release':
    """This release, with the parts that it lacks from another."""
    mine = {k: v for k, v in vars(self).items() if v is not None}
    return Release(**(vars(base) | mine))


def find(path: Path, *, as_base: bool = False) -> Release:
  """Finds the parts in a folder, or takes a file for what it holds.

  Args:
    path: a release, the folder of one part of it, or one file.
    as_base: for the parts that another release lacks: of two transformers none
      is taken, instead of refusing both.

  Raises:
    FileNotFoundError: if there is nothing at the path.
    ValueError: if it holds no weights, or it is unclear which.
  """
  path = pathlib.Path(path)
  if path.is_file():
    return Release(**{_kind_of(path): path})
  if not path.is_dir():
    raise FileNotFoundError(f'no file or folder {path}')
  if (path / layouts.STUDENT_FILE).exists() and not as_base:
    raise ValueError(
      f'{path} is in the format of this library already: load it as it is, '
      'without a base'
    )
  experts = _experts(path)
  if experts and not as_base:
    raise ValueError(
      f'{path} has two transformers as Wan2.2-A14B has, one for high noise and '
      f'one for low; this library runs one. Give {experts[0]} or {experts[1]}, '
      f'with base={path} for the other parts'
    )
  parts: dict[str, pathlib.Path] = {}
  for kind, folders in FOLDERS.items():
    if kind == 'transformer' and experts:
      continue
    for folder in (path / name for name in folders):
      if as_base and kind == 'transformer' and not _has_weights(folder):
        continue  # Its config.json alone was fetched.
      if folder.is_dir() and kind not in parts:
        parts[kind] = weights_file(folder)
  for kind, pattern in _NAMES:
    files = [f for f in sorted(path.glob(pattern)) if _is_weights(f)]
    if kind not in parts and files:
      parts[kind] = weights_file(path, files)
  rest = [
    f
    for f in path.iterdir()
    if _is_weights(f)
    and not f.name.startswith(_CLIP)
    and not any(f.match(pattern) for _, pattern in _NAMES)
  ]
  # Any network, if this is the folder of a part or of single files.
  for kind, file in _by_contents(path, rest).items():
    parts.setdefault(kind, file)
  for folder in (path / 'tokenizer', *path.glob('google/*'), path):
    if any((folder / name).is_file() for name in layouts.TOKENIZER_FILES):
      parts['tokenizer'] = folder
      break
  if not parts:
    raise ValueError(f'no weights in {path}{_hint(path)}')
  return Release(**parts)


def locate(
  name: Path | Sequence[Path],
  *,
  as_base: bool = False,
  has: Collection[str] = (),
) -> Release:
  """Finds the parts of a file, a folder, a hub's 'owner/name', or several.

  Args:
    name: or a list of them, or their names with commas between; each has other
      parts.
    as_base: see `find`.
    has: kinds of parts that no hub needs to be asked for.

  Raises:
    FileNotFoundError, ValueError: see `find` and `hub.download`; ValueError as
      well if two of a list are of one kind.
  """
  names = split_names(name)
  if len(names) == 1:
    return _locate_one(names[0], as_base, has)
  found = Release()
  for one in names:
    other = _locate_one(one, as_base, has)
    for kind, path in vars(other).items():
      mine = getattr(found, kind)
      if path is not None and mine is not None:
        raise ValueError(f'{mine} and {path} are both a {kind}: name one')
    found = found.over(other)
  return found


def split_names(name: Path | Sequence[Path]) -> list[Path]:
  """The names in a list, or in a text with commas that is no path itself."""
  if isinstance(name, os.PathLike):
    return [name]
  if not isinstance(name, str):
    if not name:
      raise ValueError('no weights are named')
    return list(name)
  if ',' in name and not pathlib.Path(name).exists():
    return [part.strip() for part in name.split(',') if part.strip()]
  return [name]


def _locate_one(name: Path, as_base: bool, has: Collection[str]) -> Release:
  path = pathlib.Path(name).expanduser()
  if not path.exists() and hub.is_name(str(name)):
    path = hub.download(str(name), as_base=as_base, has=has)
  return find(path, as_base=as_base)


def weights_file(
  folder: pathlib.Path, files: Iterable[pathlib.Path] | None = None
) -> pathlib.Path:
  """The one file, index or set of shards with weights in a folder."""
  if files is None:
    files = [f for f in folder.iterdir() if _is_weights(f)]
  sets = _sets(files)
  if not sets:
    raise FileNotFoundError(f'no weights in {folder}{_hint(folder)}')
  tensors = {k: f for k, f in sets.items() if not _is_pickle_name(f)}
  sets = tensors or sets
  if len(sets) > 1:
    raise ValueError(
      f'{folder} holds more than one set of weights, '
      f'{sorted(f.name for f in sets.values())}: name one'
    )
  (file,) = sets.values()
  return file


def holds_weights(folder: pathlib.Path) -> bool:
  """Whether a folder may be a release: it, or a part's folder, has weights."""
  names = [name for folders in FOLDERS.values() for name in folders]
  names += [name for pair in hub.EXPERTS for name in pair]
  folders = [folder, *(folder / name for name in names)]
  return any(
    _is_weights(file) or _hint_of(file)
    for f in folders
    if f.is_dir()
    for file in f.iterdir()
  )


def head_dim(base: Release) -> int | None:
  """Width of the heads of a base's transformer, of which its config is there.

  None if none is.
  """
  paths = [path for path in (base.vae, base.text_encoder) if path is not None]
  for folder in (f for path in paths for f in list(path.parents)[:2]):
    for part in ('.', 'transformer'):
      width = identity.config_head_dim(folder / part)
      if width is not None:
        return width
  return None


def _has_weights(folder: pathlib.Path) -> bool:
  return folder.is_dir() and any(_is_weights(f) for f in folder.iterdir())


def files_of(path: pathlib.Path) -> list[pathlib.Path]:
  """A file of weights, its other shards, index and config.json."""
  stem = re.split(r'-\d{5}-of-|\.', path.name)[0]
  named: set[str] = set()
  if path.name.endswith(safetensors_io.INDEX_SUFFIX):
    named |= {f.name for f in safetensors_io.indexed(path)}
  return [
    file
    for file in sorted(path.parent.iterdir())
    if file.name == 'config.json'
    or file.name in named
    or (file.name.startswith(stem) and _is_weights(file))
  ]


def _experts(path: pathlib.Path) -> tuple[pathlib.Path, ...]:
  for pair in hub.EXPERTS:
    if all((path / name).is_dir() for name in pair):
      return tuple(path / name for name in pair)
  index = path / 'model_index.json'
  if index.is_file() and (path / hub.EXPERTS[1][0]).is_dir():
    # One was fetched of the two that the pipeline has.
    other = safetensors_io.read_json(index).get(hub.EXPERTS[1][1])
    if isinstance(other, list) and any(other):
      return tuple(path / name for name in hub.EXPERTS[1])
  return ()


def _by_contents(
  folder: pathlib.Path, files: Iterable[pathlib.Path]
) -> dict[str, pathlib.Path]:
  """Kind -> file; a pickle gives way to safetensors of its kind."""
  found: dict[str, pathlib.Path] = {}
  sets = _sets(files)
  for file in sorted(sets.values(), key=_is_pickle_name):
    kind = _kind_of(file)
    other = found.setdefault(kind, file)
    if other != file and _is_pickle_name(other) == _is_pickle_name(file):
      raise ValueError(
        f'{folder} holds more than one set of weights of a {kind}, '
        f'{sorted([other.name, file.name])}: name one'
      )
  return found


def _sets(files: Iterable[pathlib.Path]) -> dict[str, pathlib.Path]:
  """Name without number and suffix -> its index, or any of its files.

  Of a set in both formats the safetensors. What an index names is its set's,
  whatever it is called: LightX2V has a file for each layer.
  """
  sets: dict[str, pathlib.Path] = {}
  files = list(files)
  for index in (
    f for f in files if f.name.endswith(safetensors_io.INDEX_SUFFIX)
  ):
    try:
      named = safetensors_io.read_json(index).get('weight_map', {}).values()
    except ValueError:
      continue  # Whoever reads it says what is wrong.
    files = [f for f in files if f.name not in set(named)]
  order = lambda f: (_is_pickle_name(f), not f.name.endswith('.json'), f.name)
  for file in sorted(files, key=order):
    name = re.sub(r'-\d{5}-of-\d{5}(?=\.)', '', file.name)
    name = name.removesuffix(safetensors_io.INDEX_SUFFIX)
    sets.setdefault(pathlib.PurePath(name).stem, file)
  return sets


def _kind_of(path: pathlib.Path) -> str:
  return identity.recognise(foreign.StateDict(path))[0]


def _is_pickle_name(path: pathlib.Path) -> bool:
  name = path.name.removesuffix(safetensors_io.INDEX_SUFFIX)
  return not name.endswith('.safetensors')


def _is_weights(path: pathlib.Path) -> bool:
  name = path.name.removesuffix(safetensors_io.INDEX_SUFFIX)
  suffixes: tuple[str, ...] = ('.safetensors', *foreign.PICKLES)
  if name != path.name:
    suffixes = ('.safetensors', '.bin')
  return name.endswith(suffixes) and not path.is_dir()


def _hint(folder: pathlib.Path) -> str:
  """What a folder without weights has instead."""
  for file in sorted(folder.iterdir()):
    hint = _hint_of(file)
    if hint:
      return f': {hint}'
  return ''


def _hint_of(file: pathlib.Path) -> str | None:
  if file.suffix == '.gguf' and file.is_file():
    return f'{file.name} is {wrong_files.describe_bytes(file)}'
  if file.suffix in _UNFINISHED:
    return f'{file.name} is a download that was not finished'
  if file.suffix == '.distcp':
    return (
      f'{file.name} is of a torch distributed checkpoint; make one file of it '
      "with 'python -m torch.distributed.checkpoint.format_utils dcp_to_torch'"
    )
  return None
