"""Published causal weights by the method that they were trained for.

All of them are Wan2.1's transformer, with the same arrays under the same names,
so that nothing in the arrays tells how the network is to be run: in another
order, with another context or other steps it makes a worse video and says
nothing (in HiAR's paper, table 3, step-first without retraining costs .829 ->
.767 in quality). What tells is how files, folders and repositories are called,
and the class in a config.json. Where they do not, a person has to say.

Values are those of each release's own inference configuration:

  HiAR                github.com/Jacky-hate/HiAR, arXiv:2603.08703
  Self-Forcing        github.com/guandeh17/Self-Forcing, arXiv:2506.08009
  Causal-Forcing, ++  github.com/thu-ml/Causal-Forcing, arXiv:2602.02214,
                      arXiv:2605.15141
  CausVid             github.com/tianweiy/CausVid, arXiv:2412.07772; of 14B
                      that of github.com/ModelTC/LightX2V
  LongLive            github.com/NVlabs/LongLive, arXiv:2509.22622
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

_FOUR = (1000, 750, 500, 250)
BASES = {
  1536: 'Wan-AI/Wan2.1-T2V-1.3B',
  5120: 'Wan-AI/Wan2.1-T2V-14B',
}


@dataclasses.dataclass(frozen=True)
class Family:
  """How the weights of a release are to be run.

  Attributes:
    name: what `family=` and `--family` take.
    title: for people.
    order: of denoising, one of rollout.ORDERS.
    context: of the past, one of rollout.CONTEXTS.
    frames_per_block: latent frames of a block.
    window: latent frames that attention sees, own block and sink included.
    sink: first frames that stay visible for ever.
    steps: falling step indices of the fine schedule, see
      `noise_schedule.warped_levels`.
    shift: of that schedule; 1: the steps are levels times 1000 themselves.
    first_steps: those of a video's first block, where it has other ones.
    stepping: one of rollout.STEPPINGS.
    lacks: parts of a whole release that its files do not have.
    lora: the file that is to be merged into the weights, or ''.
    is_base: bidirectional, no student of a few steps.
  """

  name: str
  title: str
  order: str = 'block_first'
  context: str = 'clean'
  frames_per_block: int = 3
  window: int = 21
  sink: int = 0
  steps: tuple[int, ...] = _FOUR
  shift: float = 5.0
  first_steps: tuple[int, ...] = ()
  stepping: str = 'sde'
  lacks: tuple[str, ...] = ('vae', 'text_encoder', 'tokenizer')
  lora: str = ''
  is_base: bool = False

  def sections(self) -> dict[str, dict[str, Any]]:
    """Of a pipeline's config.json: 'schedule', 'rollout' and 'generate'."""
    schedule = {'shift': self.shift, 'indices': self.steps}
    rollout = {
      'frames_per_block': self.frames_per_block,
      'window': self.window,
      'sink': self.sink,
      'stepping': self.stepping,
      'context': self.context,
    }
    if self.first_steps:
      schedule['first_indices'] = self.first_steps
    generate = {'order': self.order, 'fps': 16.0}
    return {'schedule': schedule, 'rollout': rollout, 'generate': generate}

  def __str__(self) -> str:
    if self.is_base:
      return f'{self.title}, bidirectional'
    frames = 's' if self.frames_per_block > 1 else ''
    first = f' (first block {_spaced(self.first_steps)})'
    return (
      f'{self.title}: {self.order}, context {self.context!r}, blocks of '
      f'{self.frames_per_block} frame{frames}, window {self.window}, sink '
      f'{self.sink}, steps {_spaced(self.steps)}'
      f'{first if self.first_steps else ""} at shift {self.shift:g}, '
      f'{self.stepping}'
    )


FAMILIES = {
  family.name: family
  for family in (
    Family('hiar', 'HiAR', order='step_first', context='matched'),
    Family('self-forcing', 'Self-Forcing'),
    Family(
      'self-forcing-framewise', 'Self-Forcing, frame-wise', frames_per_block=1
    ),
    Family('causal-forcing', 'Causal-Forcing, chunk-wise'),
    Family(
      'causal-forcing-framewise',
      'Causal-Forcing, frame-wise',
      frames_per_block=1,
    ),
    Family(
      'causal-forcing-2step',
      'Causal-Forcing++, frame-wise, 2 steps',
      frames_per_block=1,
      steps=(1000, 500),
      first_steps=_FOUR,
    ),
    Family(
      'causal-forcing-1step',
      'Causal-Forcing++, frame-wise, 1 step',
      frames_per_block=1,
      steps=(1000,),
      first_steps=_FOUR,
    ),
    # Its steps are not warped: timesteps as they stand.
    Family('causvid', 'CausVid', steps=(1000, 757, 522), shift=1.0),
    Family('causvid-4step', 'CausVid, 4 warped steps', shift=8.0),
    Family(
      'causvid-14b',
      'CausVid, 14B',
      steps=(999, 934, 862, 756, 603, 410, 250, 140, 74),
      shift=1.0,
    ),
    Family('longlive', 'LongLive', window=12, sink=3, lora='lora.pt'),
    Family(
      'wan2.1',
      "Wan2.1's own transformer",
      order='step_first',
      context='matched',
      lacks=(),
      is_base=True,
    ),
  )
}

# Names without case and with '-' for every sign that parts words. A variant
# before what it is a variant of; with a star, the rest of the path tells which.
_PATTERNS = (
  (r'causal-?forcing.*1-?step|framewise-1-?step', 'causal-forcing-1step'),
  (r'causal-?forcing.*2-?step|framewise-2-?step', 'causal-forcing-2step'),
  (r'causal-?forcing', 'causal-forcing*'),
  (r'self-?forcing.*frame-?wise', 'self-forcing-framewise'),
  (r'self-?forcing', 'self-forcing'),
  (r'longlive', 'longlive'),
  (r'causvid|autoregressive-checkpoint', 'causvid*'),
  (r'hiar(?!-jax)', 'hiar'),
  (r'wan-?2-[12]-t2v', 'wan2.1'),
)
# Of these releases, but no network that makes videos block by block in a few
# steps: other methods, and what trainings start from.
_OTHERS = (
  (
    r'rolling-?forcing|longvideo',
    'of Rolling Forcing, which denoises the blocks of a window together at '
    'rising levels; this library has no such order',
  ),
  (
    r'ar-diffusion',
    'an autoregressive diffusion network of many steps with guidance, from '
    'which a student of few steps is distilled',
  ),
  (
    r'bidirectional-checkpoint|step-?distill|cfg-?distill|causvid-?bidirect',
    'a bidirectional student of few steps, which makes a whole clip at once '
    'and no blocks',
  ),
)
_VARIANTS = {
  'causal-forcing*': (
    (r'framewise|frame-wise', 'causal-forcing-framewise'),
    (r'chunkwise|chunk-wise', 'causal-forcing'),
  ),
  'causvid*': (
    (r'4-?step', 'causvid-4step'),
    (r'14b', 'causvid-14b'),
    (r'', 'causvid'),
  ),
}


def get(name: str) -> Family:
  """The family of a name.

  Raises:
    ValueError: naming those that there are.
  """
  if name not in FAMILIES:
    raise ValueError(f'family={name!r} is not one of {tuple(FAMILIES)}')
  return FAMILIES[name]


def recognise(
  names: Sequence[str], *, is_base: bool = False
) -> tuple[Family, str] | None:
  """The family of weights by what they are called.

  The nearest name counts: the file's, then its folder's, then the repository's.

  Args:
    names: paths and hub names, the most telling first.
    is_base: whether a config.json beside the weights is that of Wan2.1's own
      class. Students converted to diffusers have it as well, and a name that
      tells of one.

  Returns:
    The family, and the name that told; None: it is to be asked for.

  Raises:
    ValueError: saying what the weights are, if a name tells that they are none
      of these.
  """
  for name in names:
    whole = _plain(name)
    for part in _parts(name):
      plain = _plain(part)
      for pattern, what in _OTHERS:
        if re.search(rf'(?<![a-z]){pattern}', plain):
          raise ValueError(f'{name}: by the name {part!r} these are {what}')
      found = _matching(plain, whole)
      if found is not None:
        return found, part
  if is_base:
    return FAMILIES['wan2.1'], 'config.json'
  return None


def ask(name: Any) -> ValueError:
  """The error that asks which family some weights are of."""
  known = '; '.join(
    f'{family.name} ({family.title})' for family in FAMILIES.values()
  )
  return ValueError(
    f'{name}: what these weights were trained for is told neither by their '
    'names nor by a config.json, and in another order or other steps they make '
    f'a worse video; say family= (--family), one of {known}'
  )


def base_of(width: int) -> str | None:
  """The hub name that has the parts which a student of this width lacks."""
  return BASES.get(width)


def _matching(plain: str, whole: str) -> Family | None:
  for pattern, name in _PATTERNS:
    if not re.search(rf'(?<![a-z]){pattern}', plain):
      continue
    if name not in _VARIANTS:
      return FAMILIES[name]
    for more, variant in _VARIANTS[name]:
      if re.search(more, whole):
        return FAMILIES[variant]
    return None
  return None


def _parts(name: str) -> Iterator[str]:
  """What may tell, nearest first: file, two folders, and a hub's repository."""
  parts = [p for p in pathlib.PurePath(name).parts if p not in ('/', '.', '..')]
  yield from reversed(parts[-3:])
  yield from (p for p in reversed(parts[:-3]) if p.startswith('models--'))


def _plain(name: str) -> str:
  return re.sub(r'[^a-z0-9/]+', '-', name.lower())


def _spaced(steps: Sequence[int]) -> str:
  return ' '.join(map(str, steps))
