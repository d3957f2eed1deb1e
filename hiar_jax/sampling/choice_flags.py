"""The flags of what a caller chooses, for every program that makes videos.

--family self-forcing --window 12 --sink 3 --steps 1000,500 --height 720 ...
"""

from typing import Any

from absl import flags

from hiar_jax import rollout
from hiar_jax.models import quantised
from hiar_jax.sampling import choices, loading, meshes
from hiar_jax.weights import families, held


class HeldFlags:
  """Those of what weights and past are held in. Made once a program."""

  def __init__(self):
    self._weights_dtype = flags.DEFINE_enum(
      'weights_dtype',
      None,
      held.DTYPES,
      "that weights are held in; default: their config's",
    )
    self._products_dtype = flags.DEFINE_enum(
      'products_dtype',
      None,
      quantised.KINDS,
      'of matrix products with weights in the same 8 bits; default: the dtype '
      'of the passes',
    )
    self._past_dtype = flags.DEFINE_enum(
      'past_dtype',
      None,
      quantised.KINDS,
      'that keys and values of the past are held in; default: the dtype of the '
      'passes',
    )

  @property
  def weights(self) -> dict[str, Any]:
    """Arguments of `held.Held`, `loading.load` and `from_config`.

    Raises:
      ValueError: if the flags do not go together.
    """
    made = {
      'weights_dtype': self._weights_dtype.value,
      'products_dtype': self._products_dtype.value,
    }
    held.Held(**made)
    return made

  @property
  def past(self) -> dict[str, Any]:
    """What was chosen of the past, as arguments of `choices.Choices`."""
    past_dtype = self._past_dtype.value
    return {} if past_dtype is None else {'past_dtype': past_dtype}


class ChoiceFlags:
  """Those of `choices.Choices`, and of `loading.load` what names the weights.

  Made once a program, before its flags are parsed.
  """

  def __init__(self):
    self._base = flags.DEFINE_string(
      'base',
      None,
      'with --pipeline: weights that have the parts which it lacks, such as '
      'Wan-AI/Wan2.1-T2V-1.3B',
    )
    self._family = flags.DEFINE_enum(
      'family',
      None,
      list(families.FAMILIES),
      'with --pipeline: what the weights were trained for; default: what their '
      'names tell',
    )
    self._vae = flags.DEFINE_string(
      'vae',
      None,
      'with --pipeline: another VAE, such as a tiny one (taew2_1.safetensors), '
      "which is fast and close to it; a file, a folder or a hub's name",
    )
    self._mesh = flags.DEFINE_string(
      'mesh',
      None,
      'devices, such as stage=4,tensor=2,context=1,decode=1: stages of the '
      'pipeline, parts of heads and weights, parts of the tokens, and those '
      'that decode beside them; default: one device',
    )
    self._held = HeldFlags()
    trained = "default: the weights'"
    self._steps = flags.DEFINE_list(
      'steps',
      None,
      'of denoising: how many, or their falling indices such as 1000,500; '
      + trained,
    )
    self._chosen = {
      'order': flags.DEFINE_enum(
        'order', None, rollout.ORDERS, f'of denoising; {trained}'
      ),
      'context': flags.DEFINE_enum(
        'context', None, rollout.CONTEXTS, f'of step-first; {trained}'
      ),
      'positions': flags.DEFINE_enum(
        'positions',
        None,
        rollout.POSITIONS,
        f'of the sink; bounded: never further than the window; {trained}',
      ),
      'shift': flags.DEFINE_float(
        'shift', None, f'of the schedule of the steps; {trained}'
      ),
    }
    for name, text in (
      ('window', 'latent frames that attention sees, sink included'),
      ('sink', 'first latent frames that stay visible for ever'),
      ('frames_per_block', 'latent frames of a block'),
      ('height', 'of the frames in px'),
      ('width', 'of the frames in px'),
      ('tiles', "bands of rows that Wan's VAE decodes in turn, in less memory"),
    ):
      self._chosen[name] = flags.DEFINE_integer(
        name, None, f'{text}; {trained}', lower_bound=0
      )

  @property
  def made(self) -> dict[str, Any]:
    """What was chosen, as arguments of `choices.Choices`.

    Raises:
      ValueError: naming the flag that does not fit.
    """
    made: dict[str, Any] = {
      name: flag.value
      for name, flag in self._chosen.items()
      if flag.value is not None
    }
    if self._steps.value:
      made['steps'] = _steps(self._steps.value)
    made |= self._held.past
    choices.Choices(**made)
    return made

  @property
  def mesh(self) -> str | None:
    """--mesh, for `loading.load` and `from_config`.

    Raises:
      ValueError: if it is none, or there are too few devices.
    """
    if self._mesh.value is not None:
      meshes.make(meshes.parse(self._mesh.value))
    return self._mesh.value

  @property
  def held(self) -> dict[str, Any]:
    """See `HeldFlags.weights`."""
    return self._held.weights

  def load(self, name: str, **options: Any) -> Any:
    """`loading.load` of --pipeline, run as chosen."""
    return loading.load(
      name,
      base=self._base.value,
      family=self._family.value,
      vae=self._vae.value,
      mesh=self.mesh,
      **self.held,
      **options,
      **self.made,
    )

  def apply(self, pipeline: Any) -> Any:
    """A pipeline that --config names, run as chosen.

    Raises:
      ValueError: if a flag goes with --pipeline alone, or does not fit.
    """
    for flag in (self._base, self._family, self._vae):
      if flag.value is not None:
        raise ValueError(f'--{flag.name} goes with --pipeline')
    return choices.apply(pipeline, **self.made)


def _steps(values: list[str]) -> int | tuple[int, ...]:
  if not all(value.strip().isdecimal() for value in values):
    raise ValueError(f'--steps={",".join(values)} are no whole numbers')
  steps = tuple(map(int, values))
  # One index alone would be that of pure noise: a number of steps it is not.
  return steps[0] if len(steps) == 1 and steps[0] < 1000 else steps
