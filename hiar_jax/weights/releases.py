"""Weights as others publish them: where the parts of a release are.

A release has up to three networks and a tokenizer, laid out in one of two ways:

  Wan2.1                                       diffusers
  diffusion_pytorch_model*.safetensors         transformer/
  Wan2.1_VAE.pth                               vae/
  models_t5_umt5-xxl-enc-bf16.pth              text_encoder/
  google/umt5-xxl/                             tokenizer/
"""

import dataclasses
import os
import pathlib
import re

from hiar_jax.weights import foreign, hub, identity, safetensors_io

_TOKENIZER_FILES = ('tokenizer.json', 'spiece.model', 'tokenizer.model')


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


def find(path: str | os.PathLike) -> Release:
  """Finds the parts in a folder, or takes a file for what it holds.

  Args:
    path: a release, the folder of one part of it, or one file.

  Raises:
    FileNotFoundError: if there is nothing at the path.
    ValueError: if it holds no weights, or it is unclear which.
  """
  path = pathlib.Path(path)
  if path.is_file():
    return Release(**{_kind_of(path): path})
  if not path.is_dir():
    raise FileNotFoundError(f'no file or folder {path}')
  parts: dict[str, pathlib.Path] = {}
  for kind in identity.KINDS:
    if (path / kind).is_dir():
      parts[kind] = weights_file(path / kind)
  for kind, pattern in (
    ('vae', 'Wan2.1_VAE*'),
    ('text_encoder', 'models_t5*'),
  ):
    files = [f for f in sorted(path.glob(pattern)) if _is_weights(f)]
    if kind not in parts and files:
      parts[kind] = weights_file(path, files)
  # Its own file may be that of any network, if this is a part's folder.
  rest = [
    f
    for f in path.iterdir()
    if _is_weights(f)
    and f not in parts.values()
    and not f.name.startswith(('Wan2.1_VAE', 'models_'))
  ]
  if rest and 'transformer' not in parts:
    file = weights_file(path, rest)
    parts.setdefault(_kind_of(file), file)
  for folder in (path / 'tokenizer', *path.glob('google/*'), path):
    if any((folder / name).is_file() for name in _TOKENIZER_FILES):
      parts['tokenizer'] = folder
      break
  if not parts.keys() & set(identity.KINDS):
    raise ValueError(f'no weights in {path}')
  return Release(**parts)


def locate(name: str | os.PathLike) -> Release:
  """Finds the parts of a file, a folder or a hub's 'owner/name'.

  Raises:
    FileNotFoundError, ValueError: see `find` and `hub.download`.
  """
  path = pathlib.Path(name)
  if not path.exists() and hub.is_name(str(name)):
    path = hub.download(str(name))
  return find(path)


def weights_file(
  folder: pathlib.Path, files: list[pathlib.Path] | None = None
) -> pathlib.Path:
  """The one file, index or set of shards with weights in a folder."""
  if files is None:
    files = [f for f in folder.iterdir() if _is_weights(f)]
  files = sorted(files)
  if not files:
    raise FileNotFoundError(f'no weights in {folder}')
  for index in (f for f in files if f.name.endswith('.index.json')):
    return index
  tensors = [f for f in files if f.suffix == '.safetensors']
  return _only(folder, tensors or files)


def holds_weights(folder: pathlib.Path) -> bool:
  """Whether a folder may be a release: it, or a part's folder, has weights."""
  folders = [folder, *(folder / kind for kind in identity.KINDS)]
  return any(
    _is_weights(file) for f in folders if f.is_dir() for file in f.iterdir()
  )


def _kind_of(path: pathlib.Path) -> str:
  state = foreign.StateDict(path)
  return identity.identify(state.shapes, path)[0]


def _is_weights(path: pathlib.Path) -> bool:
  return path.suffix in ('.safetensors', *foreign.PICKLES) or (
    path.name.endswith(f'.safetensors{safetensors_io.INDEX_SUFFIX}')
  )


def files_of(path: pathlib.Path) -> list[pathlib.Path]:
  """A file of weights, its other shards, index and config.json."""
  stem = re.split(r'-\d{5}-of-|\.', path.name)[0]
  return [
    file
    for file in sorted(path.parent.iterdir())
    if file.name == 'config.json'
    or (file.name.startswith(stem) and _is_weights(file))
  ]


def _only(folder: pathlib.Path, files: list[pathlib.Path]) -> pathlib.Path:
  """The one file there is; of shards, any."""
  sets = {re.sub(r'-\d{5}-of-\d{5}(?=\.)', '', f.name): f for f in files}
  if len(sets) > 1:
    raise ValueError(
      f'{folder} holds more than one set of weights, {sorted(sets)}: name one'
    )
  return files[0]
