"""How blocks are denoised: levels, blocks, what is seen of the past.

What a rollout, its cache and its samplers agree on; `rollout` has the verbs.
"""

# S denoising steps, f frames per block, h w latent rows and columns, C channels

import dataclasses

from hiar_jax.models import quantised
from hiar_jax.models.config import WanConfig

STEPPINGS = ('sde', 'ode')
CONTEXTS = ('matched', 'shared', 'clean', 'input')
POSITIONS = ('absolute', 'bounded')


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
  """How blocks are denoised.

  Attributes:
    levels: S + 1 falling sigmas, from `noise_schedule.warped_levels`; the last
      is 0.
    frames_per_block: latent frames of a block.
    window: latent frames that attention sees, own block and sink included.
    sink: first frames that stay visible for ever.
    stepping: 'sde' re-noises x0 with fresh noise (what the public weights were
      trained with), 'ode' makes the deterministic Euler step.
    context: level of the past in step-first orders. 'matched' (HiAR): t_{j+1};
      'clean' (ablation): x0 at level 0; 'input' (ablation): what D(b, j) itself
      saw, at t_j; 'shared': the K/V of D(b, j+1) serve as the context of step
      j.
    context_level: level that the network is told for clean context; no noise
      is added. 0 unless the weights were trained otherwise.
    positions: of the sink. 'absolute': where its frames were; 'bounded': right
      before the oldest other frame that is seen, however long the video is. The
      same until the window is full.
    first_levels: of a video's first block, in the block-first order alone; ():
      those of the others.
    past_dtype: 8 bits that the past is held in, one of quantised.KINDS; None:
      the dtype of the passes.

  Raises:
    ValueError: naming the value that does not fit.
  """

  levels: tuple[float, ...]
  frames_per_block: int = 3
  window: int = 21
  sink: int = 0
  stepping: str = 'sde'
  context: str = 'matched'
  context_level: float = 0.0
  positions: str = 'absolute'
  first_levels: tuple[float, ...] = ()
  past_dtype: str | None = None

  def __post_init__(self):
    for levels in (self.levels, self.first_levels or self.levels):
      if levels[-1] != 0 or len(levels) < 2:
        raise ValueError(f'levels={levels} do not end with 0 (clean)')
    if self.frames_per_block < 1:
      raise ValueError(f'frames_per_block={self.frames_per_block} is below 1')
    if self.window < 1 or self.window % self.frames_per_block:
      raise ValueError(
        f'window={self.window} is not a positive multiple of '
        f'frames_per_block={self.frames_per_block}'
      )
    if not 0 <= self.sink <= self.past_frames:
      raise ValueError(
        f'sink={self.sink} is not within 0..{self.past_frames}, the frames '
        f'that window={self.window} leaves beside one block'
      )
    if self.stepping not in STEPPINGS:
      raise ValueError(f'stepping={self.stepping!r} is not one of {STEPPINGS}')
    if self.context not in CONTEXTS:
      raise ValueError(f'context={self.context!r} is not one of {CONTEXTS}')
    if self.positions not in POSITIONS:
      raise ValueError(
        f'positions={self.positions!r} is not one of {POSITIONS}'
      )
    if self.past_dtype not in (None, *quantised.KINDS):
      raise ValueError(
        f'past_dtype={self.past_dtype!r} is not one of {quantised.KINDS}'
      )

  @property
  def num_steps(self) -> int:
    return len(self.levels) - 1

  def of_block(self, block: int) -> 'RolloutConfig':
    """That of a block made block-first: its levels are `levels`."""
    levels = self.levels if block else self.first_levels or self.levels
    return dataclasses.replace(self, levels=levels, first_levels=())

  @property
  def past_frames(self) -> int:
    """Frame slots of the cache."""
    return self.window - self.frames_per_block

  def block_shape(self, model: WanConfig) -> tuple[int, int, int, int]:
    """(f, h, w, C): a block's latents."""
    frame = (model.latent_height, model.latent_width, model.channels)
    return (self.frames_per_block, *frame)
