"""Settings of the training loop that change nothing of what is learnt.

They are the section `loop` of a config, and may differ between a run and its
continuation. Free of jax, so that config files can list the defaults.
"""

import dataclasses

BEST = ('min', 'max')


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """How the host loop keeps, guards and shows a run.

  Attributes:
    keep_last: newest checkpoints that stay.
    keep_every: those of iterations divisible by it stay as well; 0 for none.
    keep_best: metric whose best checkpoint stays as well, such as 'loss' or
      'step_first/ideal_db'; '' for none. Values are means since the last line
      of the metrics.
    best: whether the lowest ('min') or the highest ('max') is best.
    max_skipped: the run stops after so many updates of one network in a row
      that were not finite, and thus not applied.
    tensorboard: also writes `workdir/tensorboard`.
    wandb: also writes to Weights & Biases, as WANDB_MODE says.
    sample_every: iterations between sampled videos; 0 for none.
    sample_blocks: length of those videos.
    sample_prompts: of those videos; () takes what the config's `measures` know
      that training does not see, or else the first of the training's own.
  """

  keep_last: int = 3
  keep_every: int = 0
  keep_best: str = ''
  best: str = 'min'
  max_skipped: int = 5
  tensorboard: bool = False
  wandb: bool = False
  sample_every: int = 0
  sample_blocks: int = 7
  sample_prompts: tuple[str, ...] = ()

  def __post_init__(self):
    for name in ('keep_last', 'max_skipped', 'sample_blocks'):
      if getattr(self, name) < 1:
        raise ValueError(f'loop.{name}={getattr(self, name)} is not at least 1')
    for name in ('keep_every', 'sample_every'):
      if getattr(self, name) < 0:
        raise ValueError(f'loop.{name}={getattr(self, name)} is negative')
    if self.best not in BEST:
      raise ValueError(f'loop.best={self.best!r} is not one of {BEST}')
