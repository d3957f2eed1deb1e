"""Releases that lie on a hub: their names, and fetching them."""

import os
import pathlib
import re

_TRUE = ('1', 'ON', 'YES', 'TRUE')
_NAME = re.compile(r'[\w.-]+/[\w.-]+')
# What is asked of a hub; the rest of a release is images and other networks.
_PATTERNS = [
  *('*.json', '*.safetensors', '*.model', '*.pt'),
  *('Wan2.1_VAE.pth', 'models_t5*.pth'),
]


def download(name: str) -> pathlib.Path:
  """The folder of a hub's release, fetched unless it was before.

  Args:
    name: 'owner/name'. With HF_HUB_OFFLINE=1 only what is there is used.

  Raises:
    ValueError: if it cannot be had, or huggingface_hub is not installed.
  """
  try:
    import huggingface_hub
  except ImportError:
    raise ValueError(
      f'{name!r} is no folder; to fetch it from a hub, '
      "pip install 'hiar_jax[convert]'"
    ) from None
  offline = os.environ.get('HF_HUB_OFFLINE', '').upper() in _TRUE
  try:
    folder = huggingface_hub.snapshot_download(
      name, allow_patterns=_PATTERNS, local_files_only=offline
    )
  except (ValueError, OSError) as error:
    reason = 'HF_HUB_OFFLINE is set' if offline else _first_line(error)
    raise ValueError(
      f'{name!r} is no folder here, and no release of that name could be '
      f'fetched ({reason})'
    ) from error
  return pathlib.Path(folder)


def is_name(name: str) -> bool:
  """Whether a text may be a release's 'owner/name'."""
  return bool(_NAME.fullmatch(name))


def _first_line(error: BaseException) -> str:
  return f'{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}'
