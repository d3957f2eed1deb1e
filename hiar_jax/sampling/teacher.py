"""Whole videos from the bidirectional network, under guidance.

The teacher denoises all frames at once, from a prompt and a negative prompt,
as Wan2.1 samples text-to-video. What it makes is what the student's videos are
compared with; `trajectories` keeps the path there as training data.

The public sampler truncates 1000 sigma to a whole number before the network
sees it; here the network is given the level that the sample has.
"""

# B batch, F frames, h w latent rows and columns, C channels, L text tokens,
# D text width

import dataclasses
import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax import noise_schedule
from hiar_jax.denoiser import Denoiser
from hiar_jax.sampling import solvers


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How the ODE is solved; the defaults are those of Wan2.1.

  Attributes:
    solver: one of solvers.SOLVERS.
    num_steps: network evaluations.
    shift: of the noise schedule; 8 to 12 suit the 1.3B network.
    guidance: w of negative + w (prompt - negative); 1 is no guidance, and
      then the negative prompt plays no part; 6 suits the 1.3B network.

  Raises:
    ValueError: naming the value that does not fit.
  """

  solver: str = 'unipc'
  num_steps: int = 50
  shift: float = 5.0
  guidance: float = 5.0

  def __post_init__(self):
    if self.solver not in solvers.SOLVERS:
      raise ValueError(
        f'solver={self.solver!r} is not one of {tuple(solvers.SOLVERS)}'
      )
    if self.num_steps < 1:
      raise ValueError(f'num_steps={self.num_steps} is not at least 1')
    if not self.shift > 0:
      raise ValueError(f'shift={self.shift} is not positive')
    if not np.isfinite(self.guidance):
      raise ValueError(f'guidance={self.guidance} is not a number')

  @property
  def levels(self) -> np.ndarray:
    """Falling levels, float64 [num_steps + 1]; the last one is 0."""
    if self.solver == 'unipc':
      return solvers.unipc_levels(self.num_steps, self.shift)
    return noise_schedule.sampling_sigmas(self.num_steps, self.shift)


def sample(
  denoiser: Denoiser,
  params: dict,
  config: SamplingConfig,
  keys_B: jax.Array,
  states_BLD: np.ndarray,
  negative_1LD: np.ndarray,
  *,
  num_frames: int,
  report: Callable[[int], None] = lambda steps: None,
) -> np.ndarray:
  """Samples a batch of videos, step by step under the host.

  One program is compiled for a batch size and a number of frames; steps,
  levels and guidance are its inputs.

  Args:
    denoiser: the teacher's network.
    params: its parameters.
    config: how to solve.
    keys_B: one key a video, e.g. of `seeds.sample_keys`; a video depends on
      its own key and prompt alone.
    states_BLD: text states of the prompts.
    negative_1LD: text states of what guidance leads away from, batch B or 1;
      those of the empty prompt are plain classifier-free guidance.
    num_frames: latent frames F.
    report: is told, after each step, that it is done: a 1.

  Returns:
    float32 [B, F, h, w, C].

  Raises:
    ValueError: if num_frames is not at least 1, or the batches do not agree.
  """
  if num_frames < 1:
    raise ValueError(f'num_frames={num_frames} is not at least 1')
  batch = len(keys_B)
  if len(states_BLD) != batch or len(negative_1LD) not in (1, batch):
    raise ValueError(
      f'{batch} keys, {len(states_BLD)} prompts and {len(negative_1LD)} '
      'negative prompts do not go together'
    )
  size = denoiser.config
  shape = (num_frames, size.latent_height, size.latent_width, size.channels)
  static = {'denoiser': denoiser, 'solver': config.solver}
  state = _start(keys_B, shape=shape, solver=config.solver)
  prompt = _project(params, states_BLD, denoiser=denoiser)
  table = solvers.SOLVERS[config.solver].table(config.levels)
  if config.guidance == 1:
    # Half the work, which would be multiplied by 0.
    step = functools.partial(_step, params, prompt, **static)
  else:
    negative = _project(params, negative_1LD, denoiser=denoiser)
    guidance = np.float32(config.guidance)
    step = functools.partial(
      _guided_step, params, prompt, negative, guidance, **static
    )
  for i in range(config.num_steps):
    state = step(state, jax.tree.map(operator.itemgetter(i), table))
    # Or the report would run ahead of the device.
    state.x.block_until_ready()
    report(1)
  return np.asarray(state.x)


@functools.partial(jax.jit, static_argnames=('shape', 'solver'))
def _start(keys_B, *, shape, solver):
  """Unit noise of each key, as the solver's first state."""
  noise = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))
  return solvers.SOLVERS[solver].init(noise(keys_B))


@functools.partial(jax.jit, static_argnames='denoiser')
def _project(params, states_BLD, *, denoiser):
  return denoiser.project_text(params, states_BLD)


@functools.partial(jax.jit, static_argnames=('denoiser', 'solver'))
def _step(params, prompt, state, row, *, denoiser, solver):
  def flow(x, sigma):
    return denoiser.flow(params, x, sigma, prompt)[0]

  return solvers.SOLVERS[solver].step(flow, state, row)


@functools.partial(jax.jit, static_argnames=('denoiser', 'solver'))
def _guided_step(
  params, prompt, negative, guidance, state, row, *, denoiser, solver
):
  def flow(x, sigma):
    return denoiser.guided_flow(params, x, sigma, prompt, negative, guidance)

  return solvers.SOLVERS[solver].step(flow, state, row)
