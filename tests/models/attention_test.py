"""The back-ends of the attention seam give the same numbers."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from hiar_jax.denoiser import Denoiser
from hiar_jax.models import attention, splash
from hiar_jax.models.config import WanConfig
from tests import toy_network

QUERIES, KEYS, HEADS, WIDTH = 300, 700, 2, 8


@functools.cache
def arrays() -> tuple[np.ndarray, ...]:
  rng = np.random.default_rng(0)

  def normal(size):
    return rng.normal(size=(2, size, HEADS, WIDTH)).astype(np.float32)

  return normal(QUERIES), normal(KEYS), normal(KEYS)


def with_gradient(function):
  """The result, and the gradient of a number that all of it enters."""

  @jax.jit
  def run(q, k, v):
    out, pull = jax.vjp(function, q, k, v)
    return out, pull(jnp.sin(out))

  return run(*arrays())


def assert_same(ours, theirs):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs
  )


@pytest.mark.parametrize('length', [None, 333, KEYS])
def test_queries_in_chunks_change_no_value_and_no_gradient(length):
  ours, theirs = (
    with_gradient(
      functools.partial(attention.attend, length=length, backend=backend)
    )
    for backend in ('chunked', 'xla')
  )
  assert_same(ours, theirs)


def test_each_chunk_has_the_rows_of_its_own_mask():
  mask = np.random.default_rng(1).random((QUERIES, KEYS)) < 0.5
  ours, theirs, splash = (
    with_gradient(
      functools.partial(attention.attend, mask_TS=mask, backend=backend)
    )
    for backend in ('chunked', 'xla', 'splash')
  )
  assert_same(ours, theirs)
  assert_same(splash, theirs)


# Masks of frames of 3 tokens: blocks of 2 frames in a window, with a sink, a
# first frame of its own, and some rows alone; and frames that see anything.
MASKS = {
  'causal': attention.block_causal_mask(8, 2),
  'window, sink': attention.block_causal_mask(9, 2, window=5, sink=1, first=1),
  'own, then past': attention.own_then_past_mask(9, 2, window=4, first=1),
  'last rows': attention.own_then_past_mask(8, 2, window=6, sink=1, rows=4),
  'any': np.random.default_rng(2).random((6, 9)) < 0.5,
}


@pytest.mark.parametrize('length', [None, 7])
@pytest.mark.parametrize('name', MASKS)
def test_runs_of_frames_are_the_mask_of_tokens(name, length):
  mask, tokens = MASKS[name], 3
  rng = np.random.default_rng(3)

  def normal(frames, size):
    shape = (2, frames, size, HEADS, WIDTH)
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  frames, key_frames = mask.shape
  # Of each frame of queries a device may have a part.
  q = normal(frames, 2)
  k, v = (
    x.reshape(2, -1, HEADS, WIDTH)
    for x in normal(2 * key_frames, tokens)
    .reshape(2, 2, key_frames, tokens, HEADS, WIDTH)
    .swapaxes(0, 1)
  )
  if length is not None:  # Every row still sees something.
    mask = mask.copy()
    mask[:, 0] = True

  def runs(q, k, v):
    return attention.attend_visible(
      q,
      k,
      v,
      attention.visible_keys(mask),
      tokens_per_frame=tokens,
      length=None if length is None else jnp.int32(length),
    )

  def masked(q, k, v):
    seen = np.repeat(np.repeat(mask, 2, 0), tokens, 1)
    if length is not None:
      seen = seen & (np.arange(seen.shape[1]) < length)
    flat = q.reshape(2, -1, HEADS, WIDTH)
    return attention.attend(flat, k, v, mask_TS=jnp.asarray(seen)).reshape(
      q.shape
    )

  def run(function):
    @jax.jit
    def value_and_pull(q, k, v):
      out, pull = jax.vjp(function, q, k, v)
      return out, pull(jnp.sin(out))

    return value_and_pull(q, k, v)

  assert_same(run(runs), run(masked))


def test_a_frame_that_sees_nothing_is_refused():
  with pytest.raises(ValueError, match='frame 1 sees nothing'):
    attention.visible_keys(np.array([[True], [False]]))


@pytest.mark.parametrize('length', [333, KEYS])
def test_the_tpu_kernel_gives_the_same_values_and_gradients(length):
  ours = with_gradient(
    functools.partial(
      splash.attend_splash, length=jnp.int32(length), interpret=True
    )
  )
  theirs = with_gradient(functools.partial(attention.attend, length=length))
  assert_same(ours, theirs)


def test_the_tpu_kernel_may_be_mapped_over_stages_of_their_own_length():
  lengths = jnp.array([333, KEYS])

  def mapped(attend):
    return jax.jit(jax.vmap(attend, in_axes=(None, None, None, 0)))(
      *arrays(), lengths
    )

  ours = mapped(functools.partial(splash.attend_splash, interpret=True))
  theirs = mapped(lambda q, k, v, n: attention.attend(q, k, v, length=n))
  assert_same(ours, theirs)


@pytest.mark.parametrize('kind', ['all', 'cached', 'once'])
@pytest.mark.parametrize('num_queries', [4680, 32760, 768, 6])
def test_blocks_of_the_tpu_kernel_divide_what_it_is_given(num_queries, kind):
  sizes = splash.splash_blocks(num_queries, 32760, kind)
  padded = -(-num_queries // sizes['block_q']) * sizes['block_q']
  assert padded % sizes['block_q_dkv'] == padded % sizes['block_q_dq'] == 0
  assert sizes['block_kv'] % sizes['block_kv_compute'] == 0
  # The scores of a block of queries by one of keys, in float32: with 4.75 MiB a
  # program was refused.
  scores = 4 * sizes['block_q'] * sizes['block_kv_compute']
  assert kind == 'all' or scores <= 4.5 * 2**20
  if kind != 'all' and num_queries == 4680:
    assert padded <= (1.07 if kind == 'cached' else 1) * num_queries


@pytest.mark.parametrize('length', [None, 1, 700, 1500])
def test_the_tpu_kernel_without_gradients_leaves_out_blocks_beyond(length):
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(1, n, 2, 8)) for n in (40, 1500, 1500))
  block = splash.splash_blocks(40, 1500, 'once')['block_kv']
  assert 700 < block < 1500
  number = None if length is None else jnp.int32(length)
  theirs = attention.attend(q, k, v, length=number)
  # Not even multiplied by 0: that would be NaN.
  unused = np.arange(1500) >= -(-(length or 1500) // block) * block
  k, v = (np.where(unused[:, None, None], np.nan, x) for x in (k, v))
  ours = jax.jit(
    functools.partial(splash.attend_splash, forward_only=True, interpret=True)
  )(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), number)
  np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize('backend', ['chunked', 'splash', 'auto'])
def test_the_network_is_the_same_with_every_back_end(backend):
  params, text = toy_network.params(), toy_network.text(2)
  x = toy_network.latents(2, 6)
  config = dataclasses.replace(toy_network.CONFIG, attention=backend)
  ours, theirs = (
    toy_network.jit(denoiser.flow)(params, x, 0.5, text)
    for denoiser in (Denoiser(config), toy_network.DENOISER)
  )
  assert_same(ours, theirs)


@pytest.fixture
def has_cudnn(monkeypatch):
  """As if cuDNN were installed: jax can then lower for CUDA anywhere.

  jax asks the library itself for its version, and nothing public stands
  between; what is tested is the program that jax makes, not a stand-in's.
  """
  monkeypatch.setattr(
    fused_attention_stablehlo, 'check_cudnn_version', lambda: 91000
  )


def lowered(platform, backend, *, dtype=jnp.bfloat16, width=16, mapped=None):
  """The program of the attention of one sample, or of three stages."""
  shapes = [(1, 40, 2, width), (1, 72, 2, width), (1, 72, 2, width), ()]
  function = functools.partial(attention.attend, backend=backend)

  def run(q, k, v, length):
    return function(q, k, v, length=length)

  if mapped is not None:
    run = jax.vmap(run, in_axes=mapped)
    shapes = [
      shape if axis is None else (*shape[:axis], 3, *shape[axis:])
      for shape, axis in zip(shapes, mapped)
    ]
  *arrays, length = shapes
  arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in arrays]
  arguments.append(jax.ShapeDtypeStruct(length, jnp.int32))
  return (
    jax.jit(run)
    .trace(*arguments)
    .lower(lowering_platforms=(platform,))
    .as_text()
  )


@pytest.mark.parametrize('backend', ['auto', 'cudnn'])
def test_a_gpu_gets_the_kernel_of_cudnn_and_others_do_not(has_cudnn, backend):
  program = lowered('cuda', backend)
  assert '@__cudnn$fmhaSoftmax' in program
  # No scores beside the kernel.
  assert 'dot_general' not in program
  assert 'cudnn' not in lowered('cpu', backend)
  assert 'cudnn' not in lowered('cuda', 'splash')
  # What the kernel does not take.
  assert 'cudnn' not in lowered('cuda', backend, dtype=jnp.float32)
  assert 'cudnn' not in lowered('cuda', backend, width=12)


def test_without_cudnn_its_kernel_is_not_traced_and_that_is_logged(caplog):
  attention._log_choice.cache_clear()
  with caplog.at_level('INFO', logger='absl'):
    programs = [lowered('cuda', 'auto') for _ in range(2)]
  assert not any('cudnn' in program for program in programs)
  (line,) = [r.getMessage() for r in caplog.records if 'auto' in r.getMessage()]
  assert 'splash on tpu, else in chunks; not cuDNN: cuDNN' in line


def test_the_reason_against_the_kernel_of_cudnn_is_told(has_cudnn):
  def refusal(width, dtype=jnp.bfloat16):
    return attention.cudnn_refusal(*3 * [jnp.zeros((1, 2, 1, width), dtype)])

  assert refusal(128) == ''
  assert 'head dim' in refusal(136)
  assert 'float32' in refusal(8, jnp.float32)


@pytest.mark.parametrize('length', [None, 7])
def test_lengths_are_handed_to_cudnn_only_where_there_are_any(
  has_cudnn, length
):
  q = jax.ShapeDtypeStruct((1, 40, 2, 16), jnp.bfloat16)
  attend = functools.partial(attention.attend, length=length, backend='auto')
  program = jax.jit(attend).trace(q, q, q).lower(lowering_platforms=('cuda',))
  assert ('PADDING' in program.as_text()) == (length is not None)


@pytest.mark.parametrize(
  'mapped', [(0, None, None, None), (0, None, None, 0), (0, 1, 1, 0)]
)
def test_the_kernel_of_cudnn_may_be_mapped_over_stages(has_cudnn, mapped):
  program = lowered('cuda', 'auto', mapped=mapped)
  (call,) = (line for line in program.splitlines() if '@__cudnn' in line)
  # One call for the batch of all stages, each with its own two lengths.
  assert call.count('tensor<3xi32>') == 2
  assert 'tensor<3x40x2x16xbf16>' in call and 'tensor<3x72x2x16xbf16>' in call


def test_the_kernel_of_cudnn_has_a_gradient(has_cudnn):
  def loss(q, k, v):
    return attention.attend(q, k, v, backend='auto').astype('float32').sum()

  q = jax.ShapeDtypeStruct((1, 40, 2, 16), jnp.bfloat16)
  program = (
    jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    .trace(q, q, q)
    .lower(lowering_platforms=('cuda',))
    .as_text()
  )
  assert '@__cudnn$fmhaSoftmaxBackward' in program


def test_the_network_lowers_for_a_gpu(has_cudnn):
  config = dataclasses.replace(
    toy_network.CONFIG, attention='auto', dtype='bfloat16'
  )
  denoiser = Denoiser(config)

  @jax.jit
  def flow(params, x, states):
    return denoiser.flow(params, x, 0.5, denoiser.project_text(params, states))

  program = flow.trace(
    toy_network.params(),
    toy_network.latents(2, 6),
    toy_network.text_states(2),
  ).lower(lowering_platforms=('cuda',))
  # Own tokens, and the text.
  assert program.as_text().count('@__cudnn$fmhaSoftmax') == 2


def test_masked_attention_is_in_chunks_on_a_gpu_too(has_cudnn):
  mask = np.ones((40, 72), bool)
  q = jax.ShapeDtypeStruct((1, 40, 2, 16), jnp.bfloat16)
  k = jax.ShapeDtypeStruct((1, 72, 2, 16), jnp.bfloat16)
  attend = functools.partial(attention.attend, mask_TS=mask, backend='auto')
  program = jax.jit(attend).trace(q, k, k).lower(lowering_platforms=('cuda',))
  assert 'cudnn' not in program.as_text()


@pytest.mark.parametrize(
  ('capability', 'width', 'taken'),
  [
    *(('7.5', 8, False), ('8.0', 8, True), ('8.0', 256, False)),
    *(('9.0', 256, True), ('9.0', 264, False)),
  ],
)
def test_the_gpu_decides_on_the_flash_kernel(
  has_cudnn, monkeypatch, capability, width, taken
):
  arrays = 3 * [jnp.zeros((1, 1, 1, width), jnp.bfloat16)]
  device = types.SimpleNamespace(compute_capability=capability)
  backend = types.SimpleNamespace(platform_version='cuda 12090')
  for name in ('jax.extend.backend', 'jax._src.xla_bridge'):
    monkeypatch.setattr(f'{name}.get_backend', lambda: backend)
  # jax's own checks take the second path.
  for name in ('jax', 'jax._src.xla_bridge'):
    monkeypatch.setattr(f'{name}.local_devices', lambda **_: [device])
  assert (not attention.cudnn_refusal(*arrays)) == taken


def test_an_unknown_back_end_is_refused():
  with pytest.raises(ValueError, match="attention='flash' is not one of"):
    WanConfig.wan_1_3b(attention='flash')
