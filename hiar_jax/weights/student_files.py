"""Where a config's student lies: where one says, or in the package."""

import pathlib
from collections.abc import Mapping
from typing import Any

from hiar_jax.weights import layouts


def find(
  config: Mapping[str, Any],
  weights: str | pathlib.Path | None = None,
  codec: str | pathlib.Path | None = None,
) -> tuple[pathlib.Path, pathlib.Path]:
  """Weights and codec of a config's student, for `loading.from_config`.

  Args:
    config: of the training.
    weights: of the student, or a folder that holds them; None: those that come
      with the package.
    codec: of its latents; None: the one beside the weights, or else that at the
      config's `codec.path`.

  Raises:
    ValueError: if none of that name come with the package.
  """
  if weights is None:
    path = layouts.ASSETS / config['name'] / layouts.STUDENT_FILE
    if not path.exists():
      known = sorted(
        p.parent.name for p in layouts.ASSETS.glob(f'*/{layouts.STUDENT_FILE}')
      )
      raise ValueError(
        f'no weights of {config["name"]!r} come with the package, only of '
        f'{known}; give --weights'
      )
  else:
    path = pathlib.Path(weights)
    if path.is_dir():
      path /= layouts.STUDENT_FILE
  if codec is not None:
    return path, pathlib.Path(codec)
  beside = path.with_name(layouts.codec_file(config))
  if not beside.exists() and 'codec' in config:
    return path, pathlib.Path(config['codec']['path'])
  return path, beside
