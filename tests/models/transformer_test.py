"""One network, three uses: each agrees with the others."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.denoiser import Denoiser
from hiar_jax.models import attention
from hiar_jax.models.config import WanConfig
from hiar_jax.models.kv_cache import KV, init_cache
from tests import toy_network

DENOISER = toy_network.DENOISER
BLOCK = 3  # Frames.

flow = toy_network.jit(DENOISER.flow)


def blocks_of(x: jax.Array) -> list[np.ndarray]:
  return np.split(np.asarray(x), x.shape[1] // BLOCK, axis=1)


@pytest.mark.parametrize(('window', 'sink'), [(12, 0), (6, 0), (6, 1), (6, 3)])
def test_cached_blocks_equal_one_block_causal_pass(window, sink):
  params, text = toy_network.params(), toy_network.text(2)
  x = toy_network.latents(2, 12)
  sigma = np.repeat([[0.9, 0.2, 0.0, 0.6]], BLOCK, 1)
  mask = attention.block_causal_mask(12, BLOCK, window=window, sink=sink)
  masked = functools.partial(DENOISER.flow, frame_mask=mask)
  whole, _ = toy_network.jit(masked)(params, x, sigma, text)
  cache = init_cache(toy_network.CONFIG, 2, window - BLOCK, sink)
  write = toy_network.jit(lambda cache, kv: cache.write(kv))
  parts = []
  for block, level in zip(blocks_of(x), (0.9, 0.2, 0.0, 0.6), strict=True):
    part, kv = flow(params, block, level, text, past=cache)
    parts.append(part)
    cache = write(cache, kv)
  np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-5)


def test_the_window_and_the_sink_reach_the_flow():
  params, text = toy_network.params(), toy_network.text(2)
  x = toy_network.latents(2, 12)
  flows = [
    flow(params, x, np.full((1, 12), 0.5), text, frame_mask=mask)[0]
    for mask in (
      attention.block_causal_mask(12, BLOCK, window=window, sink=sink)
      for window, sink in ((12, 0), (6, 0), (6, 1), (6, 3))
    )
  ]
  for i, one in enumerate(flows):
    for other in flows[:i]:
      assert np.abs(np.asarray(one) - other)[:, -BLOCK:].max() > 1e-3


def test_a_future_block_has_exactly_zero_gradient():
  params, text = toy_network.params(), toy_network.text(1)
  mask = attention.block_causal_mask(12, BLOCK)

  def second_block(x):
    out, _ = DENOISER.flow(params, x, 0.5, text, frame_mask=mask)
    return jnp.sum(out[:, BLOCK : 2 * BLOCK])

  gradient = toy_network.jit(jax.grad(second_block))(toy_network.latents(1, 12))
  size = np.abs(gradient).max((0, 2, 3, 4))
  assert (size[: 2 * BLOCK] > 0).all()
  assert (size[2 * BLOCK :] == 0).all()


def test_frames_of_a_pass_may_have_levels_of_their_own():
  params, text = toy_network.params(), toy_network.text(2)
  x = toy_network.latents(2, 12)
  all_frames = np.ones((12, 12), bool)
  same, _ = flow(params, x, np.full((1, 12), 0.5), text, frame_mask=all_frames)
  levels = np.where(np.arange(12) == 7, 0.9, 0.5)[None]
  other, _ = flow(params, x, levels, text, frame_mask=all_frames)
  change = np.abs(np.asarray(other) - same).max((0, 2, 3, 4))
  assert change.argmax() == 7


def count_products(jaxpr) -> int:
  """Matrix products in a jaxpr and those inside its equations."""
  is_jaxpr = lambda value: hasattr(value, 'eqns') or hasattr(value, 'jaxpr')
  count = 0
  for equation in jaxpr.eqns:
    count += equation.primitive.name == 'dot_general'
    for value in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
      if is_jaxpr(value):
        count += count_products(getattr(value, 'jaxpr', value))
  return count


def test_remat_changes_no_value_but_what_is_computed_twice():
  params, text = toy_network.params(), toy_network.text(1)
  x = toy_network.latents(1, 3)
  gradients, products = {}, {}
  for remat in ('none', 'dots', 'full'):
    denoiser = Denoiser(dataclasses.replace(toy_network.CONFIG, remat=remat))

    def loss(params, denoiser=denoiser):
      return jnp.sum(jnp.square(denoiser.flow(params, x, 0.5, text)[0]))

    gradient = jax.grad(loss)
    products[remat] = count_products(jax.make_jaxpr(gradient)(params).jaxpr)
    gradients[remat] = toy_network.jit(gradient)(params)
  assert products['none'] < products['dots'] < products['full']
  for remat in ('dots', 'full'):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
      gradients[remat],
      gradients['none'],
    )


def test_unrolled_layers_change_no_value():
  params, x = toy_network.params(), toy_network.latents(2, 3)
  unrolled = Denoiser(dataclasses.replace(toy_network.CONFIG, unroll=2))
  same, _ = toy_network.jit(unrolled.flow)(params, x, 0.5, toy_network.text(2))
  expected, _ = flow(params, x, 0.5, toy_network.text(2))
  np.testing.assert_allclose(same, expected, atol=1e-5)


def test_unstacked_layers_change_no_value_and_are_not_copied():
  config = dataclasses.replace(toy_network.CONFIG, dim=64, ffn_dim=128)
  unrolled = Denoiser(dataclasses.replace(config, unroll=2))
  params = toy_network.draw_params(unrolled)
  apart = unrolled.unstack_layers(params)
  x, text = (
    toy_network.latents(2, 3),
    unrolled.project_text(apart, toy_network.text_states(2)),
  )

  def compiled(params):
    return jax.jit(unrolled.flow).lower(params, x, 0.5, text).compile()

  programs = [compiled(params), compiled(apart)]
  stacked, (flow_apart, kv_apart) = (
    program(p, x, 0.5, text)
    for program, p in zip(programs, (params, apart), strict=True)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    stacked,
    (flow_apart, kv_apart),
  )
  with_copies, without = (
    program.memory_analysis().temp_size_in_bytes for program in programs
  )
  weights = sum(a.nbytes for a in jax.tree.leaves(params['layers']))
  assert with_copies - without > 0.8 * weights


def test_scanned_layers_stay_stacked():
  params = toy_network.params()
  assert DENOISER.unstack_layers(params) is params


def test_frame_100_000_behaves_like_frame_10():
  params, text = toy_network.params(), toy_network.text(2)
  x = toy_network.latents(2, 6)

  @toy_network.jit
  def second_block(origin):
    past = init_cache(toy_network.CONFIG, 2, BLOCK, origin=origin)
    _, kv = DENOISER.flow(params, x[:, :BLOCK], 0.3, text, past=past)
    return DENOISER.flow(params, x[:, BLOCK:], 0.7, text, past=past.write(kv))[
      0
    ]

  near, far = second_block(10), second_block(100_000)
  np.testing.assert_allclose(far, near, atol=1e-4)


def test_straight_through_changes_gradients_and_no_value():
  params, text = toy_network.params(), toy_network.text(1)
  rng = np.random.default_rng(3)
  shape = (2, 1, 6 * toy_network.CONFIG.tokens_per_frame, 2, 8)
  past = KV(*jnp.asarray(rng.normal(size=(2, *shape)), jnp.float32))
  earlier = np.repeat(np.repeat([[0, 0], [1, 0]], BLOCK, 0), BLOCK, 1)
  mask = np.concatenate([np.kron(np.eye(2), np.ones((3, 3))), earlier], 1) > 0

  def run(same_frames):
    def loss(x):
      out, _ = DENOISER.flow(
        params,
        x,
        0.5,
        text,
        past=past,
        frame_mask=mask,
        same_frames=same_frames,
      )
      return jnp.sum(out[:, BLOCK:]), out

    return toy_network.jit(jax.grad(loss, has_aux=True))(
      toy_network.latents(1, 6)
    )

  (detached, values), (carried, same) = run(None), run((0, 6))
  np.testing.assert_allclose(same, values, atol=1e-6)
  # Of the second block's flow, to the first block's input.
  assert (np.asarray(detached)[:, :BLOCK] == 0).all()
  assert np.abs(carried)[:, :BLOCK].max() > 1e-3


def test_text_projected_once_equals_projected_in_the_call():
  params, x = toy_network.params(), toy_network.latents(2, 3)
  states = toy_network.text_states(2)

  @toy_network.jit
  def at_once(params, states):
    text = DENOISER.project_text(params, states)
    return DENOISER.flow(params, x, 0.5, text)[0]

  kept, _ = flow(params, x, 0.5, toy_network.text(2))
  np.testing.assert_allclose(at_once(params, states), kept, atol=1e-5)
  other = at_once(params, states[::-1])
  assert np.abs(np.asarray(other) - kept).max() > 1e-3


def test_bfloat16_stays_near_float32():
  params, x = toy_network.params(), toy_network.latents(2, 3)
  half = Denoiser(dataclasses.replace(toy_network.CONFIG, dtype='bfloat16'))

  @toy_network.jit
  def half_flow(params, states):
    text = half.project_text(params, states)
    return half.flow(params, x, 0.5, text)

  out, kv = half_flow(params, toy_network.text_states(2))
  exact, _ = flow(params, x, 0.5, toy_network.text(2))
  assert out.dtype == jnp.float32
  assert kv.k.dtype == kv.v.dtype == jnp.bfloat16
  error = np.linalg.norm(out - exact) / np.linalg.norm(exact)
  assert 0 < error < 5e-2


def test_guidance_moves_away_from_the_null_prompt():
  params, x = toy_network.params(), toy_network.latents(2, 3)
  cond, null = toy_network.text(2), toy_network.text(1)
  guided = toy_network.jit(DENOISER.guided_flow)
  with_cond, _ = flow(params, x, 0.5, cond)
  plain, without, strong = (
    np.asarray(guided(params, x, 0.5, cond, null, scale))
    for scale in (1.0, 0.0, 4.0)
  )
  np.testing.assert_allclose(plain, with_cond, atol=1e-5)
  np.testing.assert_allclose(strong, plain + 3 * (plain - without), atol=1e-4)


def test_masks_of_single_frames_are_as_written_out():
  causal = attention.block_causal_mask(5, 2, first=1)
  np.testing.assert_array_equal(
    causal.astype(int),
    [
      [1, 0, 0, 0, 0],
      [1, 1, 1, 0, 0],
      [1, 1, 1, 0, 0],
      [1, 1, 1, 1, 1],
      [1, 1, 1, 1, 1],
    ],
  )
  forced = attention.teacher_forcing_mask(2, 1)
  np.testing.assert_array_equal(
    forced.astype(int),
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]],
  )


def test_latents_of_another_size_are_refused_with_both_sizes():
  with pytest.raises(ValueError, match=r'\(1, 3, 2, 6, 2\) .* \(2, 4, 2\)'):
    DENOISER.flow({}, jnp.zeros((1, 3, 2, 6, 2)), 0.5, None)


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    ({'num_heads': 3}, 'dim=16 over num_heads=3'),
    ({'latent_width': 5}, 'latent_width=5 is not a multiple of patch 2'),
    ({'freq_dim': 7}, 'freq_dim=7 is not even'),
    ({'dtype': 'float16'}, "dtype='float16' is not one of"),
    ({'remat': 'some'}, "remat='some' is not one of"),
    ({'unroll': 3}, r'unroll=3 is not in 1..2'),
  ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(sizes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(toy_network.CONFIG, **sizes)


@pytest.mark.parametrize(
  ('config', 'billions'),
  [(WanConfig.wan_1_3b(), 1.42), (WanConfig.wan_14b(), 14.29)],
)
def test_full_sizes_have_the_released_number_of_weights(config, billions):
  shapes = jax.eval_shape(Denoiser(config).init, jax.random.key(0))
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert count / 1e9 == pytest.approx(billions, abs=5e-3)
