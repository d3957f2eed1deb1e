"""A stream makes the blocks of the offline rollout, one after the other."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from hiar_jax import noise_schedule, rollout
from hiar_jax.codecs import pixels
from hiar_jax.denoiser import Denoiser
from hiar_jax.models.config import WanConfig
from hiar_jax.sampling import modes, streaming
from tests import toy_network
from tests.plain_codec import PlainCodec

LEVELS = noise_schedule.warped_levels((1000, 750, 500, 250), 5.0)
DENOISER = Denoiser(
  WanConfig(
    dim=32,
    ffn_dim=64,
    num_heads=2,
    num_layers=1,
    latent_height=2,
    latent_width=2,
    channels=4,
    freq_dim=16,
    text_dim=8,
    text_len=4,
  )
)


@functools.cache
def params():
  return jax.tree.map(jnp.asarray, toy_network.draw_params(DENOISER, scale=0.2))


def encode(prompts):
  states = [np.random.default_rng(len(p)).normal(size=(4, 8)) for p in prompts]
  return np.stack(states).astype(np.float32)


@pytest.fixture(autouse=True)
def latents_instead_of_pixels(monkeypatch):
  monkeypatch.setattr(pixels, 'from_float', lambda video: video)


def stage_mesh(devices):
  return jax.make_mesh(
    (devices,),
    ('stage',),
    axis_types=(AxisType.Auto,),
    devices=jax.devices()[:devices],
  )


def rollout_config(mode, **changes):
  context = 'shared' if mode == 'shared' else 'matched'
  sizes = {'window': 6, 'sink': 1} | changes
  return rollout.RolloutConfig(levels=LEVELS, context=context, **sizes)


def make_stream(
  mode='batched', prompts=('a',), mesh=None, changes=(), **kwargs
):
  config = rollout_config(mode, **dict(changes))
  return streaming.Stream(
    streaming.Engine(DENOISER, config, mode, mesh),
    params(),
    PlainCodec(),
    encode,
    list(prompts),
    jax.random.split(jax.random.key(2), len(prompts)),
    **kwargs,
  )


def take(stream, num_blocks):
  return np.concatenate([next(stream) for _ in range(num_blocks)], 1)


def offline(mode, num_blocks, prompts=('a',), changes=()):
  config = rollout_config(mode, **dict(changes))
  text = DENOISER.project_text(params(), encode(prompts))
  keys = jax.random.split(jax.random.key(2), len(prompts))
  order = 'block_first' if mode == 'block_first' else 'step_first'

  @jax.jit
  def run(params):
    return getattr(rollout, order)(
      rollout.Sampler(DENOISER, params, text, config),
      rollout.named_noise(keys, (3, 2, 2, 4)),
      num_blocks,
    )

  return run(params())


@pytest.mark.parametrize('mode', streaming.MODES)
def test_stream_equals_the_offline_rollout(mode):
  prompts = ('a', 'bc')
  ours = take(make_stream(mode, prompts), 9)
  np.testing.assert_allclose(ours, offline(mode, 9, prompts), atol=1e-5)


@pytest.mark.parametrize('mode', ['batched', 'shared', 'block_first'])
def test_a_bounded_sink_is_the_rollouts_own_in_a_stream(mode):
  changes = (('positions', 'bounded'), ('window', 9), ('sink', 3))
  ours = take(make_stream(mode, changes=changes), 7)
  expected = offline(mode, 7, changes=changes)
  np.testing.assert_allclose(ours, expected, atol=1e-5)
  assert np.abs(ours - offline(mode, 7, changes=changes[1:])).max() > 1e-3


def test_a_first_block_of_a_stream_has_its_own_levels():
  changes = (('first_levels', (1.0, 0.5, 0.0)),)
  ours = take(make_stream('block_first', changes=changes), 4)
  expected = offline('block_first', 4, changes=changes)
  np.testing.assert_allclose(ours, expected, atol=1e-5)
  assert np.abs(ours - offline('block_first', 4))[:, :3].max() > 1e-2


@pytest.mark.parametrize('mode', ['batched', 'shared', 'block_first'])
def test_a_prompt_changes_the_video_from_its_block_on_and_not_before(mode):
  before = take(make_stream(mode), 8)
  stream = make_stream(mode)
  start = [next(stream) for _ in range(2)]
  block = stream.send('another one')
  rest = [next(stream) for _ in range(6)]
  after = np.concatenate(start + rest, 1)
  cut = 3 * block
  np.testing.assert_array_equal(after[:, :cut], before[:, :cut])
  assert np.abs(after[:, cut : cut + 3] - before[:, cut : cut + 3]).max() > 0.01


@functools.cache
def one_prompt_a_block(context, prompts):
  """The rollout in which every block has a prompt of its own."""
  config = rollout.RolloutConfig(
    levels=LEVELS, window=6, sink=1, context=context
  )
  noise = rollout.named_noise(
    jax.random.split(jax.random.key(2), 1), (3, 2, 2, 4)
  )
  texts = [DENOISER.project_text(params(), encode([p])) for p in prompts]
  sampler = rollout.Sampler(DENOISER, params(), texts[0], config)

  @jax.jit
  def all_steps(text, b, pasts):
    own = dataclasses.replace(sampler, text=text)
    return rollout.shared_block(own, noise, pasts, b)[:2]

  @jax.jit
  def one_step(text, b, past, j, x):
    own = dataclasses.replace(sampler, text=text)
    x, past = rollout.sweep(
      own, noise, x[None], b[None], past, first_step=j, num_steps=1
    )
    return x[0], past

  video = [noise(0, b) for b in range(len(prompts))]
  if context == 'shared':
    pasts = rollout.stacked_pasts(sampler, None)
    for b, text in enumerate(texts):
      video[b], pasts = all_steps(text, np.int32(b), pasts)
    return np.concatenate(video, 1)
  for j in range(config.num_steps):
    past = sampler.empty_past()
    for b, text in enumerate(texts):
      video[b], past = one_step(text, np.int32(b), past, j, video[b])
  return np.concatenate(video, 1)


@pytest.mark.parametrize(
  ('mode', 'devices'),
  [
    ('batched', None),
    ('serial', None),
    ('shared', None),
    ('batched', 2),
    ('shared', 3),
  ],
)
def test_every_block_keeps_its_own_prompt_through_all_its_steps(mode, devices):
  prompts = tuple('a' * (b + 1) for b in range(9))
  context = 'shared' if mode == 'shared' else 'matched'
  mesh = devices and stage_mesh(devices)
  stream = make_stream(mode, prompts[:1], mesh)
  video = []
  for _ in prompts:
    # As late as may be: stages have begun with the blocks before.
    for b in range(max(stream.next_block, 1), len(prompts)):
      stream.send(prompts[b], at=b)
    video.append(next(stream))
  np.testing.assert_allclose(
    np.concatenate(video, 1), one_prompt_a_block(context, prompts), atol=1e-5
  )


def test_a_prompt_can_be_told_ahead_but_not_of_a_started_block():
  ahead, live = make_stream(), make_stream()
  ahead.send('another one', at=3)
  first = [next(live)]
  assert live.send('another one', at=3) == 3
  live = np.concatenate([*first, take(live, 5)], 1)
  np.testing.assert_array_equal(take(ahead, 6), live)
  with pytest.raises(ValueError, match=r'block 3 has been started.* 8'):
    ahead.send('too late', at=3)


@pytest.mark.parametrize('mode', ['batched', 'shared', 'block_first'])
def test_frame_300000_behaves_like_frame_0(mode):
  near = take(make_stream(mode), 8)
  far = take(make_stream(mode, origin=300_000), 8)
  np.testing.assert_allclose(far, near, atol=1e-4)


@pytest.mark.parametrize(
  ('mode', 'program', 'donated', 'most'),
  [
    # The first block takes more turns than those after it.
    ('batched', 'run_turns', 'state', 2),
    ('shared', 'run_shared_block', 'pasts', 1),
  ],
)
def test_no_length_and_no_prompt_makes_another_program_of_a_stream(
  monkeypatch, mode, program, donated, most
):
  chex.clear_trace_counter()
  function = chex.assert_max_traces(
    getattr(streaming, program).__wrapped__, most
  )
  monkeypatch.setattr(
    streaming,
    program,
    jax.jit(function, static_argnames='engine', donate_argnames=donated),
  )
  stream = make_stream(mode, mesh=None)
  take(stream, 4)
  stream.send('another prompt')
  take(stream, 4)


@pytest.mark.parametrize(
  ('mode', 'context', 'message'),
  [
    ('fast', 'matched', "mode 'fast' is not one of"),
    ('shared', 'matched', 'does not go with context'),
    ('batched', 'shared', 'does not go with context'),
    ('block_first', 'shared', 'does not go with context'),
  ],
)
def test_an_engine_that_cannot_run_is_refused(mode, context, message):
  config = rollout.RolloutConfig(levels=LEVELS, context=context)
  with pytest.raises(ValueError, match=message):
    streaming.Engine(DENOISER, config, mode)


@dataclasses.dataclass
class Device:
  """What `choose_mode` asks of a device."""

  bytes_limit: int
  platform: str = 'gpu'
  device_kind: str = 'A100'

  def memory_stats(self):
    return {'bytes_limit': self.bytes_limit}


def test_auto_takes_the_stages_as_a_batch_where_they_fit(monkeypatch):
  config = rollout.RolloutConfig(levels=LEVELS, window=6)

  def mode_on(device):
    monkeypatch.setattr(jax, 'local_devices', lambda: [device])
    return modes.choose_mode(DENOISER, config, params(), 2)

  engine = streaming.Engine(DENOISER, config)
  need = modes.estimate_memory(engine, params(), 2).total
  roomy, why = mode_on(Device(2 * need))
  assert roomy == 'batched' and 'A100' in why
  assert mode_on(Device(need))[0] == 'serial'
  # A host keeps no account of its memory.
  stats = lambda: None
  cpu = Device(0, 'cpu', 'cpu')
  cpu.memory_stats = stats
  assert mode_on(cpu)[0] in streaming.MODES
  assert modes.device_memory(cpu) > 2**28
  shared = dataclasses.replace(config, context='shared')
  assert modes.choose_mode(DENOISER, shared, params(), 1)[0] == 'shared'


def test_auto_takes_stages_in_turn_where_a_pass_fills_a_chip(monkeypatch):
  config = rollout.RolloutConfig(levels=LEVELS, window=21)

  def mode(model, kind, platform='gpu'):
    device = Device(200 * 10**9, platform, kind)
    monkeypatch.setattr(jax, 'local_devices', lambda: [device])
    denoiser = Denoiser(model)
    params = jax.eval_shape(denoiser.init, jax.random.key(0))
    return modes.choose_mode(denoiser, config, params, 1)[0]

  full = WanConfig.wan_1_3b(attention='auto')
  assert mode(full, 'NVIDIA H100 80GB HBM3') == 'serial'
  assert mode(full, 'TPU v5p', 'tpu') == 'serial'
  assert mode(full, 'a GPU of another maker') == 'batched'
  # Here the launches of the kernels are what takes time.
  assert mode(DENOISER.config, 'NVIDIA H100 80GB HBM3') == 'batched'


# Bytes of a chip in GB, by `hiar-jax plan --config=hiar_1_3b`: of one H100
# (--mode), of the first of four with a stage each, and so on TPUs.
COMPILED = [
  ('h100:1x1x1', 'serial', 27.61),
  ('h100:1x1x1', 'shared', 27.61),
  ('h100:1x1x1', 'batched', 46.20),
  ('h100:1x1x4', 'batched', 9.49),
  ('v5e:2x2', 'batched', 9.52),
  ('v5p:2x2x1', 'batched', 9.77),
  ('v6e:2x2', 'batched', 9.72),
]


def estimate(model, mode, mesh=None, batch_size=1, **sizes):
  denoiser = Denoiser(model)
  params = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, 'bfloat16'),
    jax.eval_shape(denoiser.init, jax.random.key(0)),
  )
  context = 'shared' if mode == 'shared' else 'matched'
  config = rollout.RolloutConfig(
    levels=LEVELS, context=context, **({'window': 21} | sizes)
  )
  engine = streaming.Engine(denoiser, config, mode, mesh).written_in_place()
  params = jax.eval_shape(engine.denoiser.unstack_layers, params)
  return modes.estimate_memory(engine, params, batch_size).total


@pytest.mark.parametrize(('topology', 'mode', 'compiled'), COMPILED)
def test_the_estimate_is_what_the_compiler_takes(topology, mode, compiled):
  mesh = None if topology == 'h100:1x1x1' else stage_mesh(4)
  said = estimate(WanConfig.wan_1_3b(attention='auto'), mode, mesh)
  assert said / 1e9 == pytest.approx(compiled, rel=0.05)


# Of one H100, 1.3B with four layers and 14B with two: how the numbers grow.
FOUR = WanConfig.wan_1_3b(attention='auto', num_layers=4)
GROWING = [
  (FOUR, 'serial', 1, {}, 3.849),
  (FOUR, 'serial', 2, {}, 7.274),
  (FOUR, 'serial', 4, {'window': 9}, 6.876),
  (FOUR, 'serial', 1, {'window': 45}, 7.574),
  (FOUR, 'serial', 1, {'window': 12, 'sink': 3}, 2.541),
  (
    dataclasses.replace(FOUR, latent_height=90, latent_width=160),
    *('serial', 1, {}, 8.267),
  ),
  (WanConfig.wan_14b(attention='auto', num_layers=2), 'serial', 1, {}, 7.611),
  (FOUR, 'batched', 2, {}, 14.618),
  (FOUR, 'batched', 1, {'window': 9}, 3.475),
]


@pytest.mark.parametrize(
  ('model', 'mode', 'batch', 'sizes', 'compiled'), GROWING
)
def test_the_estimate_grows_as_the_compilers_figure(
  model, mode, batch, sizes, compiled
):
  said = estimate(model, mode, batch_size=batch, **sizes)
  assert said / 1e9 == pytest.approx(compiled, rel=0.05)


def test_weights_of_the_block_first_order_are_streamed_in_it():
  config = rollout.RolloutConfig(levels=LEVELS, window=6)
  choose = lambda order: modes.choose_mode(
    DENOISER, config, params(), 1, order=order
  )
  assert choose('block_first')[0] == 'block_first'
  with pytest.raises(ValueError, match="no stream has order 'hybrid'"):
    choose('hybrid')
  with pytest.raises(ValueError, match='has no stages: a mesh may divide'):
    streaming.Engine(DENOISER, config, 'block_first', stage_mesh(2))


@pytest.mark.parametrize('mode', ['batched', 'serial', 'shared', 'block_first'])
def test_the_caches_of_the_estimate_are_those_of_the_stream(mode):
  stream = make_stream(mode, mesh=None)
  past = jax.tree.leaves(stream._state)
  cached = sum(a.nbytes for a in past if a.ndim >= 5 and a.shape[-1] == 16)
  estimate = modes.estimate_memory(stream._engine, params(), 1)
  assert estimate.caches == cached


@pytest.mark.parametrize('mode', streaming.MODES)
@pytest.mark.parametrize('num_blocks', [1, 3])
def test_a_stream_of_so_many_blocks_ends_with_the_offline_ones(
  mode, num_blocks
):
  with make_stream(mode, num_blocks=num_blocks) as stream:
    blocks = list(stream)
    assert next(stream, None) is None
  assert len(blocks) == num_blocks
  chex.assert_trees_all_close(
    np.concatenate(blocks, 1), offline(mode, num_blocks), atol=1e-5
  )


def test_at_its_end_stages_do_what_the_last_block_needs_and_no_more():
  engine = make_stream('serial').engine
  turns = [turn for b in range(7) for turn in engine.turns(b)]
  wanted = np.concatenate([engine.wanted(b, 7) for b in range(7)])
  begun = np.array(turns) >= 0
  # Each block denoised by all stages, and all but the last committed.
  assert (wanted & begun).sum() == 4 * (7 + 6)
  assert begun.sum() == 58
  assert all(engine.wanted(b, 100).all() for b in range(7))


def test_no_prompt_comes_after_the_last_block():
  stream = make_stream('block_first', num_blocks=2)
  with pytest.raises(
    ValueError, match='block 2 comes after the last, which is'
  ):
    stream.send('b', at=2)
  with pytest.raises(ValueError, match='num_blocks=0 must be at least 1'):
    make_stream(num_blocks=0)
