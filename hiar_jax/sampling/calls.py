"""A rollout cut into one jitted program a block, called by the host.

The orders are those of `rollout`, and so are the numbers; but the length of a
video changes no program, and a progress bar can tell the truth.
"""

# B batch, F frames, f frames per block, b block, h w latent rows and columns,
# C channels, L text tokens, D width

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hiar_jax import noise_schedule, rollout
from hiar_jax.denoiser import Denoiser
from hiar_jax.sampling import memory, meshes, seeds


@dataclasses.dataclass(frozen=True)
class Request:
  """What to make, prompts aside.

  Attributes:
    num_blocks: blocks to make, given frames not counted.
    num_videos: of each prompt.
    seed: names the noise, in [0, 2**96), see `seeds`; or one for each video,
      prompt by prompt.
    order: one of rollout.ORDERS.
    anchor_blocks: 'hybrid' only, see `rollout.hybrid`.
    block_first_steps: 'hybrid' only, see `rollout.hybrid`.

  Raises:
    ValueError: naming the value that does not fit.
  """

  num_blocks: int
  num_videos: int = 1
  seed: int | Sequence[int] = 0
  order: str = 'step_first'
  anchor_blocks: int = 0
  block_first_steps: int = 0

  def __post_init__(self):
    for name in ('num_blocks', 'num_videos'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} is not at least 1')
    object.__setattr__(self, 'seed', seeds.parse(self.seed))
    if self.order not in rollout.ORDERS:
      raise ValueError(f'order={self.order!r} is not one of {rollout.ORDERS}')
    hybrid = bool(self.anchor_blocks) + bool(self.block_first_steps)
    if self.order == 'hybrid' and not hybrid:
      raise ValueError(
        "order 'hybrid' takes either anchor_blocks, such as 1: so many first "
        'blocks are finished first; or block_first_steps, such as 1: so many '
        'first steps go block by block'
      )
    if hybrid != (self.order == 'hybrid'):
      raise ValueError(
        "order 'hybrid', and no other, takes one of anchor_blocks and "
        f'block_first_steps; they are {self.anchor_blocks} and '
        f'{self.block_first_steps} with order {self.order!r}'
      )
    if not 0 <= self.anchor_blocks <= self.num_blocks:
      raise ValueError(
        f'anchor_blocks={self.anchor_blocks} is not in 0..{self.num_blocks}, '
        'the number of blocks'
      )


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
  """What the blocks come from, where that is not pure noise.

  Attributes:
    latents: clean, [1, F, h, w, C] in whole blocks; noise takes them to the
      level of the step, as if the steps before it had made them.
    step: the first that is run, from 1 on.
  """

  latents: np.ndarray
  step: int


def num_passes(
  request: Request, config: rollout.RolloutConfig, start: Start | None = None
) -> int:
  """Network passes that `sample` makes for one batch.

  Raises:
    ValueError: if the request, the config and the start do not go together.
  """
  return sum(sweep.passes for sweep in _plan(request, config, start))


def sample(
  denoiser: Denoiser,
  params: dict,
  config: rollout.RolloutConfig,
  request: Request,
  keys_B: jax.Array,
  states_BLD: np.ndarray,
  initial: np.ndarray | None,
  report: Callable[[int], None],
  start: Start | None = None,
  mesh: Mesh | None = None,
) -> np.ndarray:
  """Samples one batch.

  Args:
    denoiser: network.
    params: its parameters.
    config: how blocks are denoised.
    request: what to make.
    keys_B: from `seeds.keys`.
    states_BLD: text states.
    initial: latents [1 or B, F, h, w, C] that come first.
    report: is told, after each block, how many network passes it took.
    start: what the blocks come from; None: pure noise.
    mesh: divides every pass, see `meshes`; it has one stage.

  Returns:
    float32 [B, F, h, w, C], the given frames included.

  Raises:
    ValueError: if the request and the config do not go together.
  """
  sweeps = _plan(request, config, start)
  shared = _is_shared(request, config)
  static = {'denoiser': denoiser, 'config': config.of_block(1)}
  begin = _begin_shared if shared else _begin
  params = meshes.put_params(denoiser, params, mesh)
  text, anchored = begin(params, states_BLD, initial, **static)
  if mesh is not None:
    anchored = jax.device_put(anchored, meshes.places(anchored, mesh))
  x: list[Any] = []
  for block in range(request.num_blocks):
    if start is None:
      x.append(_first_noise(keys_B, np.int32(block), **static))
      continue
    first = block * config.frames_per_block
    clean = start.latents[:, first : first + config.frames_per_block]
    step = np.int32(start.step)
    x.append(_noised(clean, keys_B, step, np.int32(block), **static))
  under_way: collections.deque[tuple[jax.Array, int]] = collections.deque()

  def finish(all_but):
    while len(under_way) > all_but:
      done, passes = under_way.popleft()
      done.block_until_ready()
      report(passes)

  for sweep in sweeps:
    static['config'] = config.of_block(0 if sweep.is_first else 1)
    # The working past is donated, block after block; the anchored one stays.
    past = _copy(anchored)
    for block in sweep.blocks:
      commit = sweep.commits(block)
      if shared:
        x[block], past = _shared_block(
          *(params, text, past, keys_B, np.int32(block), np.bool_(commit)),
          **static,
        )
      else:
        x[block], past = _sweep_block(
          *(params, text, past, x[block], keys_B),
          *(np.int32(sweep.first_step), np.int32(block), np.bool_(commit)),
          num_steps=sweep.num_steps,
          **static,
        )
      under_way.append((x[block], sweep.num_steps + commit))
      # One ahead: the device does not wait for the host, nor the report for
      # the end.
      finish(all_but=1)
    # The next sweep donates the blocks.
    finish(all_but=0)
    if sweep.anchors:
      anchored = past
  given = [] if initial is None else [_for_each(initial, len(keys_B))]
  # Joined by NumPy: a device would compile a program for every length.
  return np.concatenate([*given, *map(np.asarray, x)], 1)


def check_memory(
  denoiser: Denoiser,
  config: rollout.RolloutConfig,
  params: dict,
  request: Request,
  batch_size: int,
) -> None:
  """Raises ValueError if `sample` does not fit; see `memory.check_fits`."""
  need = estimate_memory(denoiser, config, params, request, batch_size)
  device = jax.local_devices()[0]
  memory.check_fits(need, denoiser.config, config, device)


def estimate_memory(
  denoiser: Denoiser,
  config: rollout.RolloutConfig,
  params: dict,
  request: Request,
  batch_size: int,
) -> memory.Memory:
  """What `sample` holds at a time.

  Of pasts that is the one with the given frames and the one that is worked on,
  which a pass copies.
  """
  model = denoiser.config
  past = memory.past_bytes(model, config, batch_size)
  if _is_shared(request, config):
    past *= config.num_steps  # One a step.
  block = math.prod(config.block_shape(model))
  return memory.Memory(
    weights=memory.weights_bytes(params, model),
    caches=2 * past,
    temporaries=memory.pass_temporaries(model, config, batch_size) + past,
    latents=4 * batch_size * request.num_blocks * block,
  )


@dataclasses.dataclass(frozen=True)
class _Sweep:
  """One `rollout.sweep`, or all of `rollout.shared_context`, as a plan.

  Attributes:
    blocks: their names.
    first_step: of the sweep.
    num_steps: of the sweep.
    anchors: the blocks come out clean and stand in the past of later sweeps.
    is_first: by the levels of a video's first block, where it has others.
  """

  blocks: range
  first_step: int
  num_steps: int
  anchors: bool = False
  is_first: bool = False

  def commits(self, block: int) -> bool:
    """Whether anyone reads what a block leaves."""
    return self.anchors or block != self.blocks[-1]

  @property
  def passes(self) -> int:
    """Network passes: the steps of each block, and the commits."""
    return sum(self.num_steps + self.commits(block) for block in self.blocks)


def _is_shared(request: Request, config: rollout.RolloutConfig) -> bool:
  return request.order == 'step_first' and config.context == 'shared'


def _plan(
  request: Request, config: rollout.RolloutConfig, start: Start | None = None
) -> list[_Sweep]:
  """The sweeps of an order; the rollout's functions say what they mean."""
  num_steps, blocks = config.num_steps, range(request.num_blocks)
  if start is not None:
    return _plan_from(start.step, request, config)
  if config.first_levels and request.order != 'block_first':
    raise ValueError(
      "levels of a first block's own go with order 'block_first', not with "
      f'{request.order!r}; steps=... gives all blocks the same'
    )
  if config.first_levels:
    first = config.of_block(0).num_steps
    return [
      _Sweep(blocks[:1], 0, first, anchors=True, is_first=True),
      _Sweep(blocks[1:], 0, num_steps),
    ]
  if request.order == 'block_first' or _is_shared(request, config):
    return [_Sweep(blocks, 0, num_steps)]
  if config.context == 'shared':
    raise ValueError(f"order {request.order!r} has no context 'shared'")
  first = request.block_first_steps
  if not 0 <= first <= num_steps:
    raise ValueError(
      f'block_first_steps={first} is not in 0..{num_steps}, the number of steps'
    )
  sweeps = []
  if request.anchor_blocks:
    anchors = blocks[: request.anchor_blocks]
    sweeps.append(_Sweep(anchors, 0, num_steps, anchors=True))
    blocks = blocks[request.anchor_blocks :]
  if first:
    sweeps.append(_Sweep(blocks, 0, first))
  sweeps += [_Sweep(blocks, step, 1) for step in range(first, num_steps)]
  return sweeps


def _plan_from(
  step: int, request: Request, config: rollout.RolloutConfig
) -> list[_Sweep]:
  """The sweeps from a later step on."""
  num_steps, blocks = config.num_steps, range(request.num_blocks)
  if request.order == 'hybrid' or _is_shared(request, config):
    raise ValueError(
      "a clip is made over in the orders 'block_first' and 'step_first', not "
      f'in {request.order!r} with context {config.context!r}'
    )
  if config.first_levels:
    raise ValueError(
      'a clip is made over with the same levels for all blocks: say steps=...'
    )
  if not 1 <= step < num_steps:
    raise ValueError(f'the first step {step} is not in 1..{num_steps - 1}')
  if request.order == 'block_first':
    return [_Sweep(blocks, step, num_steps - step)]
  return [_Sweep(blocks, later, 1) for later in range(step, num_steps)]


def _noise(keys_B: Any, denoiser: Any, config: Any) -> rollout.Noise:
  return rollout.named_noise(keys_B, config.block_shape(denoiser.config))


@functools.partial(jax.jit, static_argnames=('denoiser', 'config'))
def _first_noise(keys_B, block, *, denoiser, config):
  return _noise(keys_B, denoiser, config)(0, block)


def _for_each(initial, size):
  """One sample's given latents for all, or each its own."""
  shape = (size, *initial.shape[1:])
  return initial if initial.shape == shape else initial.repeat(size, 0)


@functools.partial(jax.jit, static_argnames=('denoiser', 'config'))
def _noised(clean, keys_B, step, block, *, denoiser, config):
  """Clean latents at the level of a step, [B, f, h, w, C]."""
  eps = _noise(keys_B, denoiser, config)(step, block)
  clean = jnp.broadcast_to(clean, eps.shape)
  level = jnp.asarray(config.levels, jnp.float32)[step]
  return noise_schedule.add_noise(clean, eps, level)


@functools.partial(jax.jit, static_argnames=('denoiser', 'config'))
def _begin(params, states_BLD, initial, *, denoiser, config):
  """The projected prompts, and the past with the given frames."""
  text = denoiser.project_text(params, states_BLD)
  sampler = rollout.Sampler(denoiser, params, text, config)
  past = sampler.empty_past()
  if initial is not None:
    initial = _for_each(initial, len(states_BLD))
    past = sampler.anchor(past, initial)
  return text, past


@functools.partial(jax.jit, static_argnames=('denoiser', 'config'))
def _begin_shared(params, states_BLD, initial, *, denoiser, config):
  """As `_begin`, with one past a step."""
  text = denoiser.project_text(params, states_BLD)
  sampler = rollout.Sampler(denoiser, params, text, config)
  if initial is not None:
    initial = _for_each(initial, len(states_BLD))
  return text, rollout.stacked_pasts(sampler, initial)


@functools.partial(
  jax.jit,
  static_argnames=('num_steps', 'denoiser', 'config'),
  donate_argnames=('past', 'x'),
)
def _sweep_block(
  params,
  text,
  past,
  x,
  keys_B,
  step,
  block,
  commit,
  *,
  num_steps,
  denoiser,
  config,
):
  x, past = rollout.sweep(
    rollout.Sampler(denoiser, params, text, config),
    _noise(keys_B, denoiser, config),
    x[None],
    block[None],
    past,
    first_step=step,
    num_steps=num_steps,
    commit_last=commit,
  )
  return x[0], past


@functools.partial(
  jax.jit,
  static_argnames=('denoiser', 'config'),
  donate_argnames='past',
)
def _shared_block(
  params, text, past, keys_B, block, commit, *, denoiser, config
):
  sampler = rollout.Sampler(denoiser, params, text, config)
  noise = _noise(keys_B, denoiser, config)
  x, past, _ = rollout.shared_block(sampler, noise, past, block, commit)
  return x, past


@jax.jit
def _copy(tree):
  return jax.tree.map(jnp.copy, tree)
