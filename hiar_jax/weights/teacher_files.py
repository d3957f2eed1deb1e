"""Where a config's teacher lies: in its training run, or in the package."""

import pathlib
from collections.abc import Mapping
from typing import Any

from hiar_jax.weights import layouts


def find(
  config: Mapping[str, Any],
  weights: str | pathlib.Path | None = None,
  codec: str | pathlib.Path | None = None,
) -> tuple[pathlib.Path, pathlib.Path]:
  """Weights and codec of a config's teacher, for `loading.from_config`.

  Args:
    config: of the training.
    weights: of the teacher; None: `teacher_weights`, or else those that come
      with the package.
    codec: of its latents; None: the config's, or the one beside a teacher of
      the package.

  Raises:
    FileNotFoundError: if there is no teacher.
  """
  trained = pathlib.Path(weights or config['teacher_weights'])
  if weights or trained.exists():
    return trained, pathlib.Path(codec or config['codec']['path'])
  folder = layouts.ASSETS / config['name']
  if not (folder / layouts.TEACHER_FILE).exists():
    raise FileNotFoundError(
      f'no teacher at {trained}, and none of {config["name"]!r} comes with the '
      'package; give --weights'
    )
  codec = codec or folder / layouts.codec_file(config)
  return folder / layouts.TEACHER_FILE, pathlib.Path(codec)
