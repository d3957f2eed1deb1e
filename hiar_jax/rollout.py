"""Making a video block by block: denoise, advance, commit, and their orders.

The grid of (block b, step j) is swept by three verbs:

  D(b, j)  `denoise`  the network sees block b at level t_j and the past;
  advance             its x0 is taken to level t_{j+1} (fresh noise or Euler);
  C(b, j)  `commit`   the network sees block b at the context's level, and its
                      K/V are written to the past that D(b+1, j) reads.

One loop, `sweep`, runs some steps of every block and commits each block once:
block-first is one sweep of all steps, step-first (HiAR, arXiv:2603.08703) is
one sweep per step, the hybrids are in between. `shared_context` (our own, see
its docstring) has one past per step.

Noise has a name, (level, block), so two orders draw the same numbers and the
video does not depend on the order or placement of the work.
"""

# B batch, F frames, f frames per block, N network layers, S denoising steps,
# b block, j step, h w latent rows and columns, C channels

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hiar_jax import noise_schedule
from hiar_jax.denoiser import Denoiser
from hiar_jax.models import kv_cache
from hiar_jax.models.kv_cache import KV, KVCache, Picked
from hiar_jax.models.rollout_config import CONTEXTS as CONTEXTS
from hiar_jax.models.rollout_config import POSITIONS as POSITIONS
from hiar_jax.models.rollout_config import STEPPINGS as STEPPINGS
from hiar_jax.models.rollout_config import RolloutConfig
from hiar_jax.models.transformer import TextKV
from hiar_jax.models.window import Window, init_window

ORDERS = ('step_first', 'block_first', 'hybrid')

Past = KVCache | Picked | Window

# (level j, block b) -> standard normal [B, f, h, w, C]; level 0 is the initial
# noise, level j >= 1 the noise that takes x0 to t_j. Both may be traced.
Noise = Callable[[jax.Array | int, jax.Array | int], jax.Array]


def named_noise(
  keys_B: jax.Array, block_shape: tuple[int, int, int, int]
) -> Noise:
  """Noise that depends on (sample key, level, block) and nothing else.

  Args:
    keys_B: one typed PRNG key per sample.
    block_shape: (f, h, w, C).
  """

  def noise(level, block):
    def one(key):
      key = jax.random.fold_in(jax.random.fold_in(key, level), block)
      return jax.random.normal(key, block_shape)

    return jax.vmap(one)(keys_B)

  return noise


@dataclasses.dataclass(frozen=True)
class Sampler:
  """The three verbs of one network, prompt and config.

  Attributes:
    denoiser: network.
    params: its parameters.
    text: projected prompts, [N, B, ...].
    config: how blocks are denoised.
    origin: position of the first frame; no value but those of RoPE depends on
      it, and its differences do not.
    in_place: the past is a `Window`, which passes write; else a `KVCache`.
  """

  denoiser: Denoiser
  params: dict
  text: TextKV
  config: RolloutConfig
  origin: int = 0
  in_place: bool = False

  @property
  def batch(self) -> int:
    return self.text.k.shape[1]

  @property
  def levels(self) -> jax.Array:
    return jnp.asarray(self.config.levels, jnp.float32)

  def empty_past(self, given: int = 0) -> Any:
    """Before the first frame; so many are given before the first block."""
    if self.in_place:
      return init_window(
        *(self.denoiser.config, self.batch, self.config.window),
        self.config.frames_per_block,
        sink=self.config.sink,
        origin=self.origin,
        given=given,
      )
    return kv_cache.init_cache(
      self.denoiser.config,
      self.batch,
      self.config.past_frames,
      self.config.sink,
      self.origin,
      bounded=self.config.positions == 'bounded',
      kind=self.config.past_dtype,
    )

  def denoise(
    self, x: jax.Array, past: Past, step: Any
  ) -> tuple[jax.Array, Any]:
    """D: flow of a block at level t_step, and what the past keeps of it."""
    return self.denoiser.flow(
      self.params, x, self.levels[step], self.text, past=past
    )

  def advance(
    self, x: jax.Array, flow: jax.Array, noise: Noise, step: Any, block: Any
  ) -> tuple[jax.Array, jax.Array]:
    """Takes a block from level t_step to t_{step+1}.

    Returns:
      (x at the next level, x0 estimate); equal after the last step.
    """
    sigma, sigma_next = self.levels[step], self.levels[step + 1]
    x0 = noise_schedule.flow_to_x0(x, flow, sigma)
    if self.config.stepping == 'ode':
      x_next = noise_schedule.euler_step(x, flow, sigma, sigma_next)
    else:
      eps = noise(step + 1, block)
      x_next = noise_schedule.add_noise(x0, eps, sigma_next)
    return x_next, x0

  def commit_kv(
    self, x: jax.Array, past: Past, level: Any, wanted: Any = True
  ) -> Any:
    """C: K/V of a block told to be at `level`, for the past to write.

    Not `wanted` (traced): zeros.
    """
    if wanted is not True:
      return jax.lax.cond(
        wanted,
        lambda: jax.tree.map(jnp.asarray, self.commit_kv(x, past, level)),
        lambda: self.no_kv(x, past),
      )
    # Level 0 is replaced by the level that clean context is told to have.
    level = jnp.where(level == 0, self.config.context_level, level)
    _, kv = self.denoiser.flow(self.params, x, level, self.text, past=past)
    return kv

  def no_kv(self, x: jax.Array, past: Past) -> KV:
    """Zeros where a pass over a block would give its K/V."""
    own: Any = past
    if isinstance(past, Picked):
      own = jax.eval_shape(past.cut_out)
    shape = list(own.k.shape)
    shape[-3] = x.shape[1] * own.tokens_per_frame
    dtype = self.denoiser.config.dtype
    return KV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

  def anchor(self, past: Any, frames: jax.Array) -> Any:
    """The past after given clean latents, committed block by block.

    Args:
      past: what came before.
      frames: [B, F, h, w, C]; a first block shorter than the others (a single
        image) comes first.
    """
    size = self.config.frames_per_block
    num_frames = frames.shape[1]
    starts = range(num_frames % size, num_frames, size)
    bounds = [*([0] if num_frames % size else []), *starts, num_frames]
    for start, end in zip(bounds, bounds[1:], strict=False):
      kv = self.commit_kv(frames[:, start:end], past, jnp.zeros(()))
      past = past.write(kv)
    return past


def initial_blocks(noise: Noise, blocks: jax.Array) -> jax.Array:
  """Pure noise of the named blocks, [b, B, f, h, w, C]."""
  return jax.vmap(functools.partial(noise, 0))(blocks)


def join_blocks(x_bBfhwC: jax.Array) -> jax.Array:
  """[b, B, f, ...] to [B, b * f, ...]."""
  x = jnp.moveaxis(x_bBfhwC, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])


def sweep(
  sampler: Sampler,
  noise: Noise,
  x_bBfhwC: jax.Array,
  blocks: jax.Array,
  past: KVCache,
  *,
  first_step: jax.Array | int,
  num_steps: int,
  commit_last: jax.Array | bool = True,
) -> tuple[jax.Array, KVCache]:
  """Runs `num_steps` steps of every block in causal order, one commit each.

  Args:
    sampler: the verbs.
    noise: by name.
    x_bBfhwC: blocks at level t_first_step.
    blocks: their names, int32 [b].
    past: committed K/V of what came before.
    first_step: may be traced.
    num_steps: static.
    commit_last: whether the last block is committed as well; none of these
      blocks reads it. May be traced.

  Returns:
    Blocks at level t_{first_step + num_steps}, and the past after those that
    were committed.
  """

  def one_block(past, xs):
    x, block = xs

    def one_step(x, step):
      flow, _ = sampler.denoise(x, past, step)
      return sampler.advance(x, flow, noise, step, block)

    steps = first_step + jnp.arange(num_steps)
    x_next, x0s = jax.lax.scan(one_step, x, steps)
    after = first_step + num_steps
    # Of several steps in a sweep the input is not the context's, whatever the
    # config says: their order has one of its own.
    seen = x if num_steps == 1 else None
    context, level = context_of(sampler, x_next, x0s[-1], after, seen)
    wanted = commit_last
    if wanted is not True:
      wanted |= block != blocks[-1]
    kv = sampler.commit_kv(context, past, level, wanted)
    return past.write(kv, wanted), x_next

  past, x_bBfhwC = jax.lax.scan(one_block, past, (x_bBfhwC, blocks))
  return x_bBfhwC, past


def context_of(
  sampler: Sampler,
  x_next: jax.Array,
  x0: jax.Array,
  step_next: Any,
  x: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """What C sees, and its level, after a sweep that ends at t_{step_next}.

  Args:
    sampler: the verbs.
    x_next: the block at that level.
    x0: the estimate that it was made of.
    step_next: may be traced.
    x: what the sweep's only step saw; None: it had several.
  """
  if sampler.config.context == 'clean':
    return x0, jnp.zeros(())
  if sampler.config.context == 'input' and x is not None:
    return x, sampler.levels[step_next - 1]
  return x_next, sampler.levels[step_next]


def block_first(
  sampler: Sampler,
  noise: Noise,
  num_blocks: int,
  initial: jax.Array | None = None,
) -> jax.Array:
  """Each block through all steps, context clean: Self-Forcing's order.

  S + 1 passes a block, S for the last. Self-Forcing (arXiv:2506.08009).

  Args:
    sampler: the verbs.
    noise: by name; blocks are counted from 0, given frames excluded.
    num_blocks: blocks to make.
    initial: clean latents that come first (extension, image-to-video).

  Returns:
    [B, F, h, w, C], given frames included.
  """
  past = _anchored(sampler, initial)
  blocks, made = jnp.arange(num_blocks), []
  if sampler.config.first_levels:
    first = dataclasses.replace(sampler, config=sampler.config.of_block(0))
    x, past = _block_first_from(
      first, noise, blocks[:1], past, commit_last=num_blocks > 1
    )
    blocks, made = blocks[1:], [x]
    sampler = dataclasses.replace(sampler, config=sampler.config.of_block(1))
  if len(blocks):
    x, _ = _block_first_from(sampler, noise, blocks, past, commit_last=False)
    made.append(x)
  return _with_initial(initial, join_blocks(jnp.concatenate(made)))


def _block_first_from(sampler, noise, blocks, past, *, commit_last):
  x, steps = initial_blocks(noise, blocks), sampler.config.num_steps
  return sweep(
    *(sampler, noise, x, blocks, past),
    **dict(first_step=0, num_steps=steps, commit_last=commit_last),
  )


def step_first(
  sampler: Sampler,
  noise: Noise,
  num_blocks: int,
  initial: jax.Array | None = None,
) -> jax.Array:
  """All blocks through each step: hierarchical denoising (HiAR, section 2).

  2S passes a block (S for the last), one cache that is reset for every step.
  Arguments and result as in `block_first`.
  """
  if sampler.config.context == 'shared':
    return shared_context(sampler, noise, num_blocks, initial)
  blocks = jnp.arange(num_blocks)
  x = initial_blocks(noise, blocks)
  past = _anchored(sampler, initial)
  x = _step_first_from(sampler, noise, x, blocks, past, 0)
  return _with_initial(initial, join_blocks(x))


def _step_first_from(sampler, noise, x, blocks, anchored, first_step):
  """One sweep for each of the steps from `first_step` on.

  Anchors are clean in every step's cache, so their K/V are the same in all.
  """
  if not len(blocks) or first_step == sampler.config.num_steps:
    return x

  def one_step(x, step):
    x, _ = sweep(
      *(sampler, noise, x, blocks, anchored),
      **dict(first_step=step, num_steps=1, commit_last=False),
    )
    return x, None

  steps = jnp.arange(first_step, sampler.config.num_steps)
  return jax.lax.scan(one_step, x, steps)[0]


def hybrid(
  sampler: Sampler,
  noise: Noise,
  num_blocks: int,
  initial: jax.Array | None = None,
  *,
  anchor_blocks: int = 0,
  block_first_steps: int = 0,
) -> jax.Array:
  """Block-first for the first blocks, or for the first steps; then step-first.

  Args:
    sampler: the verbs; context of any kind but 'shared'.
    noise: by name.
    num_blocks: blocks to make.
    initial: clean latents that come first.
    anchor_blocks: these first blocks are finished block-first and then stand,
      clean, in the cache of every step.
    block_first_steps: every block runs these first steps before the next one
      starts (context at the level they reach); the rest is step-first.

  Raises:
    ValueError: if both or neither are asked for, or they leave nothing.
  """
  num_steps = sampler.config.num_steps
  if bool(anchor_blocks) == bool(block_first_steps):
    raise ValueError(
      'the hybrid order needs one of anchor_blocks and block_first_steps, '
      f'not {anchor_blocks} and {block_first_steps}'
    )
  if not 0 <= anchor_blocks <= num_blocks:
    raise ValueError(f'anchor_blocks={anchor_blocks} not in 0..{num_blocks}')
  if not 0 <= (steps := block_first_steps) <= num_steps:
    raise ValueError(f'block_first_steps={steps} not in 0..{num_steps}')
  if sampler.config.context == 'shared':
    raise ValueError("the hybrid order has no context 'shared'")
  past = _anchored(sampler, initial)
  blocks = jnp.arange(anchor_blocks, num_blocks)
  x = initial_blocks(noise, blocks)
  if anchor_blocks:
    # Their commits are those of anchors: x0 at level 0.
    anchors, past = _block_first_from(
      sampler, noise, jnp.arange(anchor_blocks), past, commit_last=True
    )
    x = _step_first_from(sampler, noise, x, blocks, past, 0)
    x = jnp.concatenate([anchors, x])
  else:
    x, _ = sweep(
      *(sampler, noise, x, blocks, past),
      first_step=0,
      num_steps=steps,
      commit_last=False,
    )
    x = _step_first_from(sampler, noise, x, blocks, past, steps)
  return _with_initial(initial, join_blocks(x))


def shared_context(
  sampler: Sampler,
  noise: Noise,
  num_blocks: int,
  initial: jax.Array | None = None,
) -> jax.Array:
  """Hierarchical denoising in S + 1 passes a block instead of 2S.

  x_{j+1} of a block passes the network twice at level t_{j+1}: in C(b, j) and
  in D(b, j+1). Here the K/V of D(b, j+1) are the committed context of step j,
  and only step S - 1 has a commit of its own, at level 0. One past per step;
  arguments and result as in `block_first`.
  """
  pasts = stacked_pasts(sampler, initial)
  blocks = jnp.arange(num_blocks)

  def one_block(pasts, block):
    x, pasts, _ = shared_block(
      sampler, noise, pasts, block, commit=block < num_blocks - 1
    )
    return pasts, x

  _, x = jax.lax.scan(one_block, pasts, blocks)
  return _with_initial(initial, join_blocks(x))


def stacked_pasts(sampler: Sampler, initial: jax.Array | None) -> Any:
  """One anchored past per step, stacked on a leading axis S."""
  anchored = _anchored(sampler, initial)
  size = sampler.config.num_steps
  return jax.tree.map(
    lambda a: jnp.broadcast_to(a[None], (size, *a.shape)), anchored
  )


def shared_block(
  sampler: Sampler,
  noise: Noise,
  pasts: KVCache,
  block: Any,
  commit: jax.Array | bool = True,
) -> tuple[jax.Array, KVCache, tuple[jax.Array, jax.Array, KV]]:
  """One block of `shared_context`; without `commit` it leaves no context.

  Returns:
    The finished block; the pasts with its context; and, stacked over steps:
    inputs of the D passes, their x0, and the K/V committed for each step.
  """

  def one_step(x, step):
    past = Picked(pasts, step)
    flow, kv = sampler.denoise(x, past, step)
    x_next, x0 = sampler.advance(x, flow, noise, step, block)
    return x_next, (x, x0, kv)

  # One program for all steps: unrolled, it is S times as long and each of its
  # instructions runs once a block, which is slower for small networks.
  x, (inputs, x0s, kvs) = jax.lax.scan(
    one_step, noise(0, block), jnp.arange(sampler.config.num_steps)
  )
  last = Picked(pasts, jnp.int32(sampler.config.num_steps - 1))
  clean = sampler.commit_kv(x, last, jnp.zeros(()), commit)
  context = jax.tree.map(
    lambda kv, c: jnp.concatenate([kv[1:], c[None]]), kvs, clean
  )
  # Every pass has read before the first write, or the pasts would be copied.
  pasts, context = jax.lax.optimization_barrier((pasts, context))
  live = None
  if commit is not True:
    live = jnp.broadcast_to(commit, pasts.frames.shape)
  pasts = pasts.write_each(context, live)
  return x, pasts, (inputs, x0s, context)


def _anchored(sampler: Sampler, initial: jax.Array | None) -> Any:
  if initial is None:
    return sampler.empty_past()
  return sampler.anchor(sampler.empty_past(initial.shape[1]), initial)


def _with_initial(initial, x):
  return x if initial is None else jnp.concatenate([initial, x], 1)
