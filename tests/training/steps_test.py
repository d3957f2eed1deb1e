"""Steps of the distillation: what each one moves, sees and measures.

A network of two layers on latents of 2x4, two tokens a frame.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hiar_jax import noise_schedule, rollout
from hiar_jax.codecs import vae as vae_codec
from hiar_jax.models import vae
from hiar_jax.training import distill_config, losses
from hiar_jax.training import state as training_state
from hiar_jax.training import steps as training_steps
from tests import tiny

DENOISER = tiny.DENOISER
ROLLOUT = rollout.RolloutConfig(
  levels=noise_schedule.warped_levels((1000, 750, 500, 250), 5.0),
  frames_per_block=2,
  window=4,
)
OPTIMISER = training_state.make_optimiser(
  training_state.OptimiserConfig(learning_rate=1e-3), 100
)
BATCH, BLOCKS = 2, 3
VAE = vae.VAEConfig(
  base_dim=4,
  z_dim=2,
  dim_mult=(1, 1, 1),
  num_res_blocks=1,
  temporal_downsample=(True, True),
  mean=(0.0,) * 2,
  std=(1.0,) * 2,
)
FRAMES = BLOCKS * ROLLOUT.frames_per_block


def equal(a, b):
  return all(
    jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))
  )


@functools.cache
def batch():
  rng = np.random.default_rng(7)
  points = ROLLOUT.num_steps + 1
  text, trajectory_text = rng.normal(size=(2, BATCH, 3, 8)).astype(np.float32)
  return {
    'text': text,
    'trajectory': rng.normal(size=(BATCH, points, FRAMES, 2, 4, 2)).astype(
      np.float32
    ),
    'trajectory_text': trajectory_text,
  }


def distillation(**kwargs):
  numbers = dict(
    guidance=1.0,
    loss_blocks=2,
    cut_start='as_made',
    forward_kl_weight=0.5,
    ema_start=2,
    ema_decay=0.9,
  )
  return training_steps.Distillation(
    student=DENOISER,
    critic=DENOISER,
    teacher=DENOISER,
    student_optimiser=OPTIMISER,
    critic_optimiser=OPTIMISER,
    rollout=ROLLOUT,
    config=distill_config.DistillConfig(**(numbers | kwargs)),
  )


# Of a rollout of BLOCKS, one more than the losses see.
LENGTHS = distillation().lengths(BLOCKS, BLOCKS)
STATIC = ('num_blocks', 'most_before')


@functools.cache
def networks():
  """Parameters of student, critic, teacher."""
  return [tiny.random_params(DENOISER, seed) for seed in range(3)]


def distill_state(critic, *, iteration=0):
  student = networks()[0]
  return training_state.DistillState(
    iteration=jnp.asarray(iteration, jnp.int32),
    student=training_state.init_net(student, OPTIMISER),
    critic=training_state.init_net(critic, OPTIMISER),
    ema=jax.tree.map(jnp.ones_like, student),
  )


def frozen(seed=9):
  states = np.random.default_rng(seed).normal(size=(1, 3, 8))
  return training_steps.Frozen(
    teacher=networks()[2], negative_text=states.astype(np.float32)
  )


@functools.cache
def generator():
  # With context 'clean': the other contexts are in training_rollout_test.
  steps = dataclasses.replace(
    distillation(), rollout=dataclasses.replace(ROLLOUT, context='clean')
  )
  return jax.jit(steps.generator_step, static_argnames=STATIC)


def generate(state, key=0, inputs=None):
  inputs = batch() if inputs is None else inputs
  return generator()(state, frozen(), inputs, jax.random.key(key), **LENGTHS)


def test_generator_step_moves_the_student_and_its_average_alone():
  state = distill_state(networks()[1])
  after, metrics = generate(state)
  assert equal(after.critic, state.critic)
  assert after.iteration == state.iteration
  assert not equal(after.student.params, state.student.params)
  assert all(np.isfinite(value) for value in metrics.values())
  # Before ema_start the average is the student itself.
  jax.tree.map(
    lambda e, p: np.testing.assert_allclose(e, p, atol=1e-6),
    after.ema,
    after.student.params,
  )


def test_the_average_starts_to_lag_at_ema_start():
  for iteration, decay in ((1, 0.0), (2, 0.9)):
    state = distill_state(networks()[1], iteration=iteration)
    after, _ = generate(state)
    jax.tree.map(
      lambda e, p, decay=decay: np.testing.assert_allclose(
        e, decay + (1 - decay) * p, atol=1e-6
      ),
      after.ema,
      after.student.params,
    )


def test_critic_step_moves_the_critic_alone():
  step = jax.jit(distillation().critic_step, static_argnames=STATIC)
  state = distill_state(networks()[1])
  text = {'text': batch()['text']}
  after, metrics = step(state, frozen(), text, jax.random.key(0), **LENGTHS)
  assert equal(after.student, state.student)
  assert equal(after.ema, state.ema)
  assert not equal(after.critic.params, state.critic.params)
  assert after.iteration == state.iteration + 1
  # On one rollout it learns.
  for _ in range(10):
    after, later = step(after, frozen(), text, jax.random.key(0), **LENGTHS)
  assert later['critic'] < metrics['critic']
  assert not later['critic_skipped']
  # From a text that is not finite it learns nothing.
  text = {'text': jnp.full_like(text['text'], jnp.inf)}
  last, metrics = step(after, frozen(), text, jax.random.key(0), **LENGTHS)
  assert metrics['critic_skipped'] and not np.isfinite(metrics['critic'])
  assert equal(last.critic, after.critic)
  assert last.iteration == after.iteration + 1


@pytest.mark.parametrize('name', ['text', 'trajectory'])
def test_a_generator_step_that_is_not_finite_changes_nothing(name):
  state = distill_state(networks()[1])
  value = jnp.asarray(batch()[name])
  value = value.at[(0,) * value.ndim].set(jnp.nan)
  after, metrics = generate(state, inputs=batch() | {name: value})
  assert metrics['student_skipped']
  assert equal(after, state)
  after, metrics = generate(state)
  assert not metrics['student_skipped'] and not equal(after, state)


def test_a_critic_that_is_the_teacher_leaves_no_gradient():
  _, own = generate(distill_state(networks()[2]))
  _, other = generate(distill_state(networks()[1]))
  assert own['dmd_gradient'] < 1e-5 < 1e-2 < other['dmd_gradient']
  assert own['reverse_kl'] < 1e-9
  # What is left is the forward KL, which knows no critic.
  assert own['forward_kl'] == other['forward_kl'] > 0
  assert own['student_grad_norm'] > 1e-2


@pytest.mark.parametrize('of_critic', [1.0, 2.5])
def test_scores_are_led_away_from_the_negative_text(of_critic):
  steps = distillation(guidance=3.0, critic_guidance=of_critic)
  draws = {
    'sigma': np.full(BATCH, 0.7, np.float32),
    'eps': batch()['trajectory'][:, 1, :4],
  }
  x0 = batch()['trajectory'][:, 0, :4]

  @jax.jit
  def value(frozen):
    state = distill_state(networks()[1])
    return steps._direction(state, frozen, batch(), x0, draws)

  @jax.jit
  def by_hand(states):
    x = noise_schedule.add_noise(x0, draws['eps'], 0.7)

    def guided(network, scale):
      cond, uncond = (
        DENOISER.x0(params, x, 0.7, DENOISER.project_text(params, text))
        for params in [networks()[network]]
        for text in (batch()['text'], states.repeat(BATCH, 0))
      )
      return uncond + scale * (cond - uncond)

    return losses.reverse_kl_direction(x0, guided(1, of_critic), guided(2, 3.0))

  values = []
  for states in (frozen().negative_text, np.zeros((1, 3, 8), np.float32)):
    values.append(value(frozen().replace(negative_text=states)))
    np.testing.assert_allclose(values[-1], by_hand(states), atol=1e-4)
  assert np.abs(values[0] - values[1]).max() > 1e-2


def test_exit_steps_are_uniform_and_one_for_all_samples():
  state = distill_state(networks()[1])
  draws = [generate(state, key)[1]['exit_step'] for key in range(120)]
  assert {draw.shape for draw in draws} == {()}
  counts = np.bincount(draws, minlength=ROLLOUT.num_steps)
  # 30 are expected of each; 15 is three standard deviations below.
  assert len(counts) == ROLLOUT.num_steps and counts.min() > 15, counts


@pytest.mark.parametrize(
  'part', ['critic', pytest.param('student', marks=pytest.mark.slow)]
)
def test_every_microbatch_leaves_at_a_step_of_its_own(part, monkeypatch):
  sgd, key, two = optax.sgd(1.0), jax.random.key(0), dict(num_blocks=2)
  net = training_state.init_net(networks()[0], sgd)
  state = dataclasses.replace(
    distill_state(networks()[1]), student=net, critic=net
  )

  def moved(data, **kwargs):
    """Parameters that are moved by their gradient."""
    steps = dataclasses.replace(
      distillation(**kwargs), student_optimiser=sgd, critic_optimiser=sgd
    )

    step = steps.critic_step if part == 'critic' else steps.generator_step
    run = jax.jit(lambda data: step(state, frozen(), data, key, **two)[0])
    return getattr(run(data), part).params

  data = batch() | {'trajectory': batch()['trajectory'][:, :, :4]}
  draws = distillation(microbatches=2)._draws(key, BATCH, 2)
  assert draws['exit_step'][0] != draws['exit_step'][1]
  found, halves = moved(data, microbatches=2), []
  for i in range(2):
    half = jax.tree.map(lambda x, i=i: x[i::2], draws)
    monkeypatch.setattr(
      training_steps.Distillation, '_draws', lambda *_, half=half: half
    )
    halves.append(moved(jax.tree.map(lambda x, i=i: x[i::2], data)))
  jax.tree.map(
    lambda a, b, c: np.testing.assert_allclose(a, (b + c) / 2, atol=1e-5),
    *(found, *halves),
  )


def traced(steps, batch, **kwargs):
  """Traces a generator step without compiling it: its metrics' shapes."""
  _, metrics = jax.eval_shape(
    functools.partial(steps.generator_step, **kwargs),
    distill_state(networks()[1]),
    frozen(),
    batch,
    jax.random.key(0),
  )
  return metrics


def test_without_forward_kl_a_batch_needs_no_trajectory():
  steps = distillation(forward_kl_weight=0.0, order='block_first')
  metrics = traced(steps, {'text': batch()['text']}, num_blocks=2)
  assert 'reverse_kl' in metrics and 'forward_kl' not in metrics
  with pytest.raises(KeyError, match='trajectory'):
    traced(distillation(), {'text': batch()['text']}, num_blocks=2)


def test_losses_see_the_last_blocks_of_a_longer_rollout(monkeypatch):
  seen = []
  original = losses.reverse_kl_along

  def watched(x0, direction):
    seen.append((x0.shape[1], direction.shape[1]))
    return original(x0, direction)

  monkeypatch.setattr(losses, 'reverse_kl_along', watched)

  def frames_of(num_blocks):
    """Frames of x0 and of its direction that carry loss."""
    seen.clear()
    lengths = distillation().lengths(num_blocks, 5)
    traced(distillation(), batch(), **lengths)
    return set(seen)

  assert frames_of(2) == {(4, 4)}
  # The first block of a cut has no past to be judged with.
  assert frames_of(3) == {(2, 2)}


@pytest.mark.slow
def test_the_cut_of_a_longer_rollout_begins_as_a_video():
  codec = vae_codec.VAECodec(vae.init(VAE, jax.random.key(3)), VAE)
  steps = distillation(cut_start='reencoded')
  sampler = rollout.Sampler(
    DENOISER,
    networks()[0],
    DENOISER.project_text(networks()[0], batch()['text']),
    ROLLOUT,
  )

  @functools.partial(jax.jit, static_argnames=STATIC)
  def run(codec, num_blocks, before, most_before):
    draws = steps._draws(jax.random.key(0), BATCH, num_blocks)
    draws['exit_step'] = jnp.ones(BATCH, jnp.int32)
    record = steps._rollout(sampler, draws, num_blocks, before, most_before)
    known = frozen().replace(codec=codec)
    return (
      record.x0_before,
      rollout.join_blocks(record.x0),
      steps._cut(known, record),
    )

  for num_blocks in (3, 5):
    before, x0, cut = run(codec, **steps.lengths(num_blocks, 5))
    made = [rollout.join_blocks(before[: num_blocks - 2]), x0[:, :1]]
    pixels = codec.decode(jnp.concatenate(made, 1))
    np.testing.assert_allclose(
      cut[:, :1], codec.encode(pixels[:, -1:]), atol=1e-4
    )
    assert np.abs(cut[:, :1] - x0[:, :1]).max() > 1e-2
    np.testing.assert_array_equal(cut[:, 1:], x0[:, 1:])
  assert run._cache_size() == 1


def test_a_cut_that_must_be_recoded_needs_a_codec():
  steps = distillation(cut_start='reencoded')
  assert steps.needs_codec(3) and not steps.needs_codec(2)
  with pytest.raises(ValueError, match="cut_start='reencoded' need a codec"):
    traced(steps, batch(), **LENGTHS)


def forward_kl(**kwargs):
  """params -> the forward KL of step 1, which is soon compiled on its own."""
  steps = distillation(**kwargs)
  return lambda params, step=1: steps._forward_kl(params, batch(), step)


def test_forward_kl_differs_by_who_sees_whom():
  values = {}
  for mode in distill_config.FORWARD_KL_ATTENTION:
    function = jax.value_and_grad(forward_kl(forward_kl_attention=mode))
    values[mode], grads = jax.jit(function)(networks()[0])
    largest = max(np.abs(g).max() for g in jax.tree.leaves(grads))
    assert np.isfinite(values[mode]) and 0 < largest < np.inf
  # Both sides, a noisy past, the student's own clean past.
  assert np.diff(sorted(values.values())).min() > 1e-3, values


@pytest.mark.parametrize(
  'numbers',
  [
    dict(forward_kl_target='velocity'),
    dict(forward_kl_target='chord_x0'),
    dict(forward_kl_attention='cached'),
  ],
)
def test_one_program_takes_the_forward_kl_of_every_step(numbers):
  function, params = forward_kl(**numbers), networks()[0]
  run = jax.jit(function)
  values = [run(params, np.int32(i)) for i in range(ROLLOUT.num_steps)]
  assert run._cache_size() == 1 and len(set(map(float, values))) == len(values)
  own = jax.jit(function, static_argnums=1)
  for step in (0, ROLLOUT.num_steps - 1):
    np.testing.assert_allclose(values[step], own(params, step), rtol=2e-6)


def test_forward_kl_targets_are_the_chord_in_other_spaces():
  value = {
    target: jax.jit(forward_kl(forward_kl_target=target))(networks()[0])
    for target in losses.FORWARD_KL_TARGETS
  }
  sigma, sigma_next = ROLLOUT.levels[1:3]
  for target, ratio in (('chord_x0', sigma), ('euler', sigma - sigma_next)):
    np.testing.assert_allclose(
      value[target], ratio**2 * value['velocity'], rtol=1e-3
    )
  assert abs(value['final_x0'] - value['chord_x0']) > 1e-3


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    (dict(order='hybrid'), "order='hybrid' is not one of"),
    (dict(past_gradient='all'), "past_gradient='all' is not one of"),
    (dict(cut_start='cut'), "cut_start='cut' is not one of"),
    (dict(block_first_context='all'), "block_first_context='all' is not one"),
    (dict(forward_kl_target='x0'), "forward_kl_target='x0' is not one of"),
    (dict(forward_kl_attention='none'), 'forward_kl_attention='),
    (dict(generator_every=0), 'generator_every=0 is below 1'),
    (dict(loss_blocks=0), 'loss_blocks=0 is below 1'),
    (dict(forward_kl_steps=0), 'forward_kl_steps=0 is below 1'),
    (dict(forward_kl_steps=5), 'more than the 4 steps of the rollout'),
    (dict(min_level=0.9, max_level=0.5), 'min_level=0.9, max_level=0.5'),
  ],
)
def test_distillation_names_a_value_that_does_not_fit(kwargs, message):
  with pytest.raises(ValueError, match=message):
    distillation(**kwargs)
