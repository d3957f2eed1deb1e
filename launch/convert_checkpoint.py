"""Turns published weights into a folder that hiar_jax.load reads, and back.

  # Wan2.1 or diffusers folder, or a hub's owner/name:
  hiar-jax convert --weights Wan2.1-T2V-1.3B --out wan
  # A checkpoint of HiAR, Self-Forcing or CausVid, with Wan2.1's VAE and text
  # encoder:
  hiar-jax convert --weights hiar.pt \
    --base Wan2.1-T2V-1.3B --out hiar
  # As orbax checkpoints, for pods whose hosts read their own shards:
  hiar-jax convert --weights Wan2.1-T2V-1.3B --out wan \
    --format orbax
  # With LoRA files merged into the transformer, the second by half:
  hiar-jax convert --weights Wan2.1-T2V-1.3B --out wan \
    --lora causal.safetensors --lora style.safetensors:0.5
  # Back, for other programs; the last as Self-Forcing and HiAR keep the average
  # of a training, under generator_ema:
  hiar-jax convert --weights hiar --to diffusers --out there
  hiar-jax convert --weights hiar --to self_forcing --out there

Arrays go from file to file one at a time. Torch is needed for pickles (.pt,
.pth) alone.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

from absl import flags

from hiar_jax import rollout
from hiar_jax.runtime import errors, metrics
from hiar_jax.weights import (
  conversion,
  families,
  lora_files,
  released_family,
  releases,
)

_WEIGHTS = flags.DEFINE_string(
  'weights', None, 'a folder, a file or owner/name of a hub', required=True
)
_OUT = flags.DEFINE_string('out', None, 'the folder to make', required=True)
_BASE = flags.DEFINE_string(
  'base', None, 'weights that have the parts which --weights lacks'
)
_TO = flags.DEFINE_enum(
  'to', 'hiar_jax', ['hiar_jax', *conversion.TARGETS], 'whose format to write'
)
_FORMAT = flags.DEFINE_enum(
  'format', 'safetensors', conversion.FORMATS, 'of the files of --to hiar_jax'
)
_DTYPE = flags.DEFINE_enum(
  'dtype', None, conversion.DTYPES, "of the stored weights; default: each's own"
)
_LORA = flags.DEFINE_multi_string(
  'lora',
  [],
  'PATH or PATH:SCALE of a LoRA file that is merged into the transformer; may '
  'be given several times',
)
_MEMBER = flags.DEFINE_string(
  'member',
  None,
  'which network of a training checkpoint; default: generator_ema if there, '
  'else generator',
)
_HEIGHT = flags.DEFINE_integer(
  'height', 480, 'of the videos to make, in pixels', lower_bound=16
)
_WIDTH = flags.DEFINE_integer(
  'width', 832, 'of the videos to make, in pixels', lower_bound=16
)
_FAMILY = flags.DEFINE_enum(
  'family',
  None,
  list(families.FAMILIES),
  'what the weights were trained for; default: what their names tell',
)
_ORDER = flags.DEFINE_enum(
  'order', None, rollout.ORDERS, "of denoising; default: the family's"
)
_HEAD_DIM = flags.DEFINE_integer(
  'head_dim', 128, "width of the transformer's heads where no config.json says"
)
_COMPUTE_DTYPE = flags.DEFINE_enum(
  'compute_dtype', 'bfloat16', ['bfloat16', 'float32'], 'to run networks in'
)
_SHARD_GB = flags.DEFINE_float(
  'shard_gb', 5.0, 'largest size of a file in GB', lower_bound=1e-6
)


class _Bar:
  """Shows each part's progress."""

  def __init__(self):
    self._part, self._bar = None, None

  def __call__(self, part: str, done: int, total: int) -> None:
    # Two parts may have one name: those of diffusers all do.
    if not done or (part, total) != self._part:
      self.close()
      self._bar = metrics.Progress(total, label=part, unit='array')
      self._bar.__enter__()
      self._part = (part, total)
    self._bar.update(done + 1)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.__exit__(None, None, None)


def main(argv):
  del argv
  out = pathlib.Path(_OUT.value)
  if out.exists() and not out.is_dir():
    raise ValueError(f'--out={out} is a file')
  if out.is_dir() and any(out.iterdir()):
    raise ValueError(f'--out={out} is not empty')
  if _FORMAT.value != 'safetensors' and _TO.value != 'hiar_jax':
    raise ValueError(
      f'--format={_FORMAT.value} goes with --to=hiar_jax; {_TO.value} reads '
      'safetensors'
    )
  bar = _Bar()
  loras = [lora_files.parse_flag(value) for value in _LORA.value]
  if _TO.value == 'hiar_jax':
    _to_ours(out, loras, bar)
  else:
    conversion.to_foreign(
      _WEIGHTS.value,
      out,
      naming=_TO.value,
      dtype=_DTYPE.value,
      shard_bytes=int(_SHARD_GB.value * 1e9),
      loras=loras,
      report=bar,
    )
  bar.close()
  for path, size in sorted(_written(out).items()):
    print(f'wrote {path} ({size / 1e6:.1f} MB)')


def _written(out: pathlib.Path) -> dict[pathlib.Path, int]:
  """Files and their bytes; an orbax checkpoint counts as one."""
  sizes: dict[pathlib.Path, int] = {}
  for file in out.rglob('*'):
    path = next((p for p in file.parents if p.suffix == '.orbax'), file)
    if file.is_file():
      sizes[path] = sizes.get(path, 0) + file.stat().st_size
  return sizes


def _to_ours(
  out: pathlib.Path, loras: Sequence[lora_files.Given], bar: _Bar
) -> None:
  release = releases.locate(_WEIGHTS.value)
  if _BASE.value is not None:
    has = [kind for kind, path in vars(release).items() if path is not None]
    base = releases.locate(_BASE.value, as_base=True, has=has)
    release = release.over(base)
  options = conversion.Options(
    dtype=_DTYPE.value,
    member=_MEMBER.value,
    head_dim=_HEAD_DIM.value,
    latent_size=(_latent('height', _HEIGHT), _latent('width', _WIDTH)),
    compute_dtype=_COMPUTE_DTYPE.value,
    format=_FORMAT.value,
    shard_bytes=int(_SHARD_GB.value * 1e9),
  )
  sections = None
  if release.transformer is not None:
    given = _FAMILY.value and families.get(_FAMILY.value)
    family, loras = released_family.find(
      *(_WEIGHTS.value, release, given or None), loras=loras
    )
    if _ORDER.value is not None:
      family = dataclasses.replace(family, order=_ORDER.value)
    sections = family.sections()
  conversion.to_ours(
    release,
    out,
    name=out.name,
    options=options,
    sections=sections,
    loras=loras,
    report=bar,
  )
  for kind, path in vars(release).items():
    if path is None:
      print(f'note: no {kind} in --weights or --base; the folder has none')


def _latent(name: str, flag: flags.FlagHolder) -> int:
  """Pixels to rows or columns of Wan2.1's latents, in whole patches."""
  if flag.value % 16:
    raise ValueError(f'--{name}={flag.value} is not a multiple of 16')
  return flag.value // 8


if __name__ == '__main__':
  errors.run_main(main)
