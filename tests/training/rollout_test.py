"""The training rollout against inference and against a serial loop.

Its exit pass is one forward over all blocks. Here the same blocks run one
after the other with a cache, in a window shorter than the rollout, with a sink
and after a given image of one frame.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax import noise_schedule, rollout
from hiar_jax.training import exit_pass
from hiar_jax.training.rollout import (
  cached_flow,
  record_rollout,
  training_rollout,
)
from tests import tiny

DENOISER = tiny.DENOISER
LEVELS = noise_schedule.warped_levels((1000, 667, 333), 5.0)
STEPS, BLOCKS, BATCH, SIZE = len(LEVELS) - 1, 4, 2, 2
SHAPE = (SIZE, 2, 4, 2)
# Blocks that carry gradient, by order and context.
GRAD_BLOCKS = {
  ('step_first', 'matched'): BLOCKS,
  ('step_first', 'input'): 3,
  ('step_first', 'shared'): 2,
  ('block_first', 'matched'): BLOCKS,
  ('block_first', 'clean'): 3,
}
NOISE = rollout.named_noise(jax.random.split(jax.random.key(3), BATCH), SHAPE)
RNG = np.random.default_rng(4)
STATES = RNG.normal(size=(BATCH, 3, 8)).astype(np.float32)
IMAGE = RNG.normal(size=(BATCH, 1, 2, 4, 2)).astype(np.float32)
COTANGENT = RNG.normal(size=(BATCH, BLOCKS * SIZE, 2, 4, 2)).astype(np.float32)


def sampler_of(params, context):
  """With the context of step-first orders; block-first has one of its own."""
  # 9 frames in all; 6 are seen, the first of them for ever.
  config = rollout.RolloutConfig(
    levels=LEVELS, frames_per_block=SIZE, window=6, sink=1, context=context
  )
  text = DENOISER.project_text(params, STATES)
  return rollout.Sampler(DENOISER, params, text, config)


@functools.cache
def params():
  return jax.tree.map(jnp.asarray, tiny.random_params(DENOISER, 0))


@functools.cache
def program(order, context):
  """exit step -> the rollout, and its gradient times COTANGENT.

  For 'block_first' one exit step per block.
  """

  def loss(params, exit_step):
    x0 = training_rollout(
      sampler_of(params, context),
      NOISE,
      BLOCKS,
      exit_step,
      order=order,
      past_gradient='detached',
      grad_blocks=GRAD_BLOCKS[order, context],
      initial=IMAGE,
      block_first_context=context if order == 'block_first' else 'clean',
    )
    return jnp.sum(x0 * COTANGENT), x0

  run = jax.jit(jax.grad(loss, has_aux=True))

  def value_and_gradient(exit_step):
    if order == 'block_first':
      exit_step = np.broadcast_to(exit_step, BLOCKS)
    grads, x0 = run(params(), exit_step)
    return x0, grads

  return value_and_gradient


def assert_close(actual, expected, tolerance):
  scale = max(np.abs(x).max() for x in jax.tree.leaves(expected))
  assert scale > 0
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, atol=tolerance * scale),
    actual,
    expected,
  )


@pytest.mark.parametrize(('order', 'context'), GRAD_BLOCKS)
def test_rollout_to_the_last_step_is_the_inference_rollout(order, context):
  inference = jax.jit(
    lambda params: getattr(rollout, order)(
      sampler_of(params, context), NOISE, BLOCKS, IMAGE
    )
  )
  expected = inference(params())
  x0, _ = program(order, context)(STEPS - 1)
  np.testing.assert_array_equal(expected[:, :1], IMAGE)
  assert_close(x0, expected[:, 1:], 1e-5)


def test_without_given_frames_steps_share_a_past_and_see_none_of_another():
  sampler = sampler_of(params(), 'matched')
  expected = jax.jit(lambda: rollout.step_first(sampler, NOISE, BLOCKS))()
  record = jax.jit(
    lambda: record_rollout(
      sampler, NOISE, BLOCKS, STEPS - 1, order='step_first'
    )
  )()
  assert_close(rollout.join_blocks(record.x0), expected, 1e-5)


# The serial loop: four small programs, called block by block by the host.


@jax.jit
def denoise_and_advance(x, past, step, block):
  sampler = sampler_of(params(), 'matched')
  flow, kv = sampler.denoise(x, past, step)
  return *sampler.advance(x, flow, NOISE, step, block), kv


@jax.jit
def commit(x, past, level):
  return sampler_of(params(), 'matched').commit_kv(x, past, level)


@jax.jit
def block_gradient(x, past, step, cotangent):
  """One D pass: its x0, and the gradient of that alone."""

  def loss(params):
    sampler = sampler_of(params, 'matched')
    flow, _ = sampler.denoise(x, past, step)
    x0 = noise_schedule.flow_to_x0(x, flow, sampler.levels[step])
    return jnp.sum(x0 * cotangent), x0

  grads, x0 = jax.grad(loss, has_aux=True)(params())
  return x0, grads


@jax.jit
def write(past, kv):
  return past.write(kv)


@functools.cache
def anchored():
  past = sampler_of(params(), 'matched').empty_past()
  return write(past, commit(IMAGE, past, 0.0))


def serial_step_first(exit_step, context='matched'):
  """Inputs and pasts of the exit step's D passes, sweep after sweep."""
  x = [NOISE(0, b) for b in range(BLOCKS)]
  for step in range(exit_step + 1):
    inputs, past = [], anchored()
    for b in range(BLOCKS):
      inputs.append((x[b], past, step))
      x[b], _, _ = denoise_and_advance(x[b], past, step, b)
      if context == 'input':
        past = write(past, commit(inputs[-1][0], past, LEVELS[step]))
      else:
        past = write(past, commit(x[b], past, LEVELS[step + 1]))
  return inputs


def serial_shared(exit_step):
  """One past per step, written with the K/V of the next step's D."""
  pasts, inputs = [anchored()] * STEPS, []
  for b in range(BLOCKS):
    x, kvs = NOISE(0, b), []
    for step in range(STEPS):
      if step == exit_step:
        inputs.append((x, pasts[step], step))
      x, _, kv = denoise_and_advance(x, pasts[step], step, b)
      kvs.append(kv)
    kvs.append(commit(x, pasts[-1], 0.0))
    pasts = list(map(write, pasts, kvs[1:]))
  return inputs


def serial_block_first(exit_step, context):
  """Each block to its own exit step; its context is x0, or its next level."""
  past, inputs = anchored(), []
  for b, last_step in enumerate(np.broadcast_to(exit_step, BLOCKS)):
    x = NOISE(0, b)
    for step in range(last_step + 1):
      before = x
      x, x0, _ = denoise_and_advance(x, past, step, b)
    inputs.append((before, past, last_step))
    after = (x, LEVELS[last_step + 1]) if context == 'matched' else (x0, 0.0)
    past = write(past, commit(after[0], past, after[1]))
  return inputs


def serial(inputs, grad_blocks):
  """x0 of all blocks, and the gradient summed over the last of them."""
  x0s, total = [], jax.tree.map(jnp.zeros_like, params())
  for b, (x, past, step) in enumerate(inputs):
    cotangent = COTANGENT[:, b * SIZE : (b + 1) * SIZE]
    x0, grads = block_gradient(x, past, step, cotangent)
    x0s.append(x0)
    if b >= BLOCKS - grad_blocks:
      total = jax.tree.map(jnp.add, total, grads)
  return jnp.concatenate(x0s, 1), total


SERIAL = {
  ('step_first', 'matched'): serial_step_first,
  ('step_first', 'input'): functools.partial(
    serial_step_first, context='input'
  ),
  ('step_first', 'shared'): serial_shared,
  **{
    ('block_first', context): functools.partial(
      serial_block_first, context=context
    )
    for context in ('matched', 'clean')
  },
}


# The past that a later block's gradient passes through (spec 9).


def through_past(step, cached):
  """Gradient of a serial loop whose past is sg(K_C) + (K_D - sg(K_D)).

  Args:
    step: of the D passes.
    cached: whether blocks are given at that step's level and leave their clean
      x0 (the forward KL's mode), not rolled out to it.
  """
  stop = jax.lax.stop_gradient

  @jax.jit
  def run(params):
    sampler = sampler_of(params, 'matched')
    frozen = sampler_of(stop(params), 'matched')
    past = frozen.empty_past()
    inputs = [COTANGENT[:, b * SIZE :][:, :SIZE] for b in range(BLOCKS)]
    if not cached:
      past = past.write(frozen.commit_kv(IMAGE, past, 0.0))
      inputs = [NOISE(0, b) for b in range(BLOCKS)]
    outputs = []
    for b, x in enumerate(inputs):
      flow, own = sampler.denoise(x, past, step)
      x_next, x0 = frozen.advance(x, flow, NOISE, step, b)
      outputs.append(flow if cached else x0)
      context, level = (x0, 0.0) if cached else (x_next, LEVELS[step + 1])
      kv = frozen.commit_kv(stop(context), stop(past), level)
      past = past.write(
        jax.tree.map(lambda c, d: stop(c) + (d - stop(d)), kv, own)
      )
    y = jnp.concatenate(outputs, 1)
    return jnp.sum(jnp.sin(y)), y

  return jax.grad(run, has_aux=True)(params())


def test_the_rollouts_gradient_may_pass_through_the_past():
  def loss(params):
    x0 = training_rollout(
      sampler_of(params, 'matched'),
      NOISE,
      BLOCKS,
      0,
      order='step_first',
      past_gradient='straight_through',
      initial=IMAGE,
    )
    return jnp.sum(jnp.sin(x0)), x0

  grads, x0 = jax.jit(jax.grad(loss, has_aux=True))(params())
  expected, expected_x0 = through_past(0, cached=False)
  assert_close(x0, expected_x0, 1e-5)
  assert_close(grads, expected, 1e-4)


def test_the_cached_mode_keeps_to_the_gradient_of_the_past():
  def run(past_gradient):
    def loss(params):
      sampler = sampler_of(params, 'matched')
      flow = cached_flow(sampler, COTANGENT, 1, past_gradient=past_gradient)
      return jnp.sum(jnp.sin(flow)), flow

    return jax.jit(jax.grad(loss, has_aux=True))(params())

  expected, expected_flow = through_past(1, cached=True)
  for past_gradient, close in (('straight_through', True), ('detached', False)):
    grads, flow = run(past_gradient)
    assert_close(flow, expected_flow, 1e-5)
    name = lambda tree: tree['layers']['self_attention']['k']['kernel']
    error = np.abs(name(grads) - name(expected)).max()
    error /= np.abs(name(expected)).max()
    assert (error < 1e-4) == close, error


@pytest.mark.parametrize(
  'order', ['step_first', pytest.param('block_first', marks=pytest.mark.slow)]
)
def test_one_program_makes_rollouts_of_several_lengths(order):
  """Their last blocks are those of a program of that length."""
  grad_blocks, arguments = 2, dict(order=order, initial=IMAGE)

  @jax.jit
  def of_any_length(params, before):
    def loss(params):
      sampler = sampler_of(params, 'matched')
      record = record_rollout(
        *(sampler, NOISE, grad_blocks, 1),
        **(arguments | dict(before=before, most_before=3)),
      )
      x0 = exit_pass.parallel(sampler, record, past_gradient='straight_through')
      return jnp.sum(jnp.sin(x0)), (x0, record.x0_before)

    return jax.grad(loss, has_aux=True)(params)

  for before in (1, 3):

    @jax.jit
    def of_one_length(params, before=before):
      def loss(params):
        x0 = training_rollout(
          *(sampler_of(params, 'matched'), NOISE, before + grad_blocks, 1),
          **(arguments | dict(grad_blocks=grad_blocks)),
          past_gradient='straight_through',
        )
        return jnp.sum(jnp.sin(x0[:, before * SIZE :])), x0

      return jax.grad(loss, has_aux=True)(params)

    grads, (x0, x0_before) = of_any_length(params(), before)
    expected, expected_x0 = of_one_length(params())
    x0 = jnp.concatenate([rollout.join_blocks(x0_before[:before]), x0], 1)
    assert_close(x0, expected_x0, 1e-5)
    assert_close(grads, expected, 1e-5)


CASES = [(*key, step) for key in SERIAL for step in range(STEPS)]


@pytest.mark.parametrize(
  ('order', 'context', 'exit_step'),
  [
    *CASES,
    ('block_first', 'matched', (1, 0, 2, 1)),
    ('block_first', 'clean', (1, 0, 2, 1)),
  ],
)
def test_parallel_exit_pass_is_the_serial_loop(order, context, exit_step):
  x0, grads = program(order, context)(exit_step)
  expected_x0, expected_grads = serial(
    SERIAL[order, context](exit_step), GRAD_BLOCKS[order, context]
  )
  assert_close(x0, expected_x0, 1e-5)
  assert_close(grads, expected_grads, 1e-4)


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    (dict(order='hybrid'), "order 'hybrid' is not one of"),
    (dict(past_gradient='all'), "past_gradient 'all' is not one of"),
    (
      dict(block_first_context='shared'),
      "block_first_context 'shared' is not one of",
    ),
    (dict(grad_blocks=0), r'grad_blocks=0 is not in 1\.\.4'),
    (dict(grad_blocks=5), r'grad_blocks=5 is not in 1\.\.4'),
  ],
)
def test_training_rollout_names_an_argument_that_does_not_fit(kwargs, message):
  arguments = dict(order='step_first', past_gradient='detached') | kwargs
  with pytest.raises(ValueError, match=message):
    training_rollout(
      sampler_of(params(), 'matched'), NOISE, BLOCKS, 0, **arguments
    )
