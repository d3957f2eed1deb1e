"""Pure training steps of the distillation: (state, ...) -> (state, metrics).

A batch holds `text` [B, L, text_dim] and what a loss adds. Keys are made from
(seed, iteration) by the host loop; nothing random lives in the state.

An update whose loss or gradient is not finite is not applied: parameters,
optimiser state and average stay as they were, and the metric `student_skipped`
or `critic_skipped` is 1.
"""

# B batch, F frames, h w latent rows and columns, C channels

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from hiar_jax import noise_schedule, rollout
from hiar_jax.denoiser import Denoiser, guide
from hiar_jax.models import attention, lora
from hiar_jax.models.transformer import TextKV
from hiar_jax.rollout import Sampler
from hiar_jax.training import exit_pass, losses, microbatches, recoding
from hiar_jax.training import rollout as training_rollout
from hiar_jax.training import state as training_state
from hiar_jax.training.distill_config import DistillConfig

Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class Frozen:
  """What a distillation reads and never changes.

  Attributes:
    teacher: parameters of the real score.
    negative_text: states [1, L, text_dim] of what guidance leads away from:
      for Wan its encoded negative prompt, for a teacher that was trained
      without captions now and then, the empty one.
    codec: see `codecs`; None where no rollout is longer than the losses see, or
      its cut begins 'as_made'.
    student_base: what the student's adapters belong to; None: the teacher. Read
      with adapters alone.
    critic_base: likewise of the critic.
  """

  teacher: Any
  negative_text: jax.Array
  codec: Any = None
  student_base: Any = None
  critic_base: Any = None


@dataclasses.dataclass(frozen=True)
class Distillation:
  """The two steps of HiAR training, as pure functions.

  Attributes:
    student: network of the generator.
    critic: network of the fake score.
    teacher: network of the real score, frozen.
    student_optimiser: of the generator.
    critic_optimiser: of the critic.
    rollout: how the student's blocks are denoised.
    config: the numbers.
    adapters: what is trained of student and critic in place of all of their
      parameters; a state then has adapters where it else has parameters. None:
      all is trained.
  """

  student: Denoiser
  critic: Denoiser
  teacher: Denoiser
  student_optimiser: optax.GradientTransformation
  critic_optimiser: optax.GradientTransformation
  rollout: rollout.RolloutConfig
  config: DistillConfig
  adapters: lora.LoRAConfig | None = None

  def __post_init__(self):
    if self.config.forward_kl_steps > self.rollout.num_steps:
      raise ValueError(
        f'forward_kl_steps={self.config.forward_kl_steps} is more than the '
        f'{self.rollout.num_steps} steps of the rollout'
      )

  def generator_step(
    self,
    state: training_state.DistillState,
    frozen: Frozen,
    batch: dict,
    key: jax.Array,
    *,
    num_blocks: int,
    before: jax.Array | None = None,
    most_before: int | None = None,
    forward_kl_step: int | jax.Array = 0,
  ) -> tuple[training_state.DistillState, Metrics]:
    """One update of the student: reverse KL + weight * forward KL.

    Args:
      state: of the run.
      frozen: teacher, and what it is led away from.
      batch: `text` [B, L, text_dim]; with a forward KL also `trajectory`
        [b, S + 1, F, h, w, C] and `trajectory_text` [b, L, text_dim].
      key: of this iteration.
      num_blocks: of the rollout that the losses see, static.
      before: blocks of the rollout before these, at least 1; None: none.
      most_before: the most that those can be, static.
      forward_kl_step: which of the first K steps; may be traced, so that one
        program serves all of them.
    """
    blocks = dict(num_blocks=num_blocks, before=before, most_before=most_before)
    self._check(frozen, **blocks)
    draws = self._draws(key, batch['text'].shape[0], num_blocks)
    size = self.rollout.frames_per_block

    def prepare(params, part):
      batch, draws = part
      sampler = self._student_sampler(params, frozen, batch['text'])
      record = self._rollout(sampler, draws, **blocks)
      # Scores first: critic and teacher judge the record, which is what the
      # exit pass gives, before that pass's residuals take room.
      direction = self._direction(
        state, frozen, batch, self._cut(frozen, record), draws
      )
      metrics = {'dmd_gradient': jnp.mean(jnp.abs(direction))}
      keys, record = record.keys, record.replace(keys=None)
      return (batch, record, direction), keys, metrics

    # The first frames of a cut have no past to be judged with.
    first = 0 if before is None else 1

    def reverse_kl(params, start, keys, block=None):
      batch, record, direction = start
      record = record.replace(keys=keys)
      sampler = self._student_sampler(params, frozen, batch['text'])
      if block is None:
        x0 = exit_pass.parallel(
          sampler, record, past_gradient=self.config.past_gradient
        )
        judged, share = slice(first * size, None), 1.0
        x0 = x0[:, judged]
      else:
        x0 = exit_pass.one_block(sampler, record, block)
        judged = slice(block * size, (block + 1) * size)
        share = 1 / (num_blocks - first)
      loss = share * losses.reverse_kl_along(x0, direction[:, judged])
      return loss, {'reverse_kl': loss}

    def forward_kl(params, start, keys):
      del keys
      params = self._whole(params, frozen.student_base, frozen)
      loss = self._forward_kl(params, start[0], forward_kl_step)
      return self.config.forward_kl_weight * loss, {'forward_kl': loss}

    terms: list[microbatches.Term] = [reverse_kl]
    if self.config.exit_pass == 'blocks':
      terms = [
        functools.partial(reverse_kl, block=block)
        for block in range(first, num_blocks)
      ]
    if self.config.forward_kl_weight:
      terms.append(forward_kl)
    grads, metrics = microbatches.gradient(
      *(terms, state.student.params, (batch, draws)),
      *(self.config.microbatches, prepare),
      in_place=self.adapters is None,
    )
    norm = optax.tree.norm(grads)
    finite = training_state.finite_update(norm, *metrics.values())
    metrics |= self._exit_metric('exit_step', draws) | {
      'student_grad_norm': norm,
      'student_skipped': ~finite,
    }
    student = state.student.update(grads, self.student_optimiser)
    decay = jnp.where(
      state.iteration < self.config.ema_start, 0.0, self.config.ema_decay
    )
    ema = training_state.ema_update(state.ema, student.params, decay)
    state = dataclasses.replace(
      state,
      student=training_state.where(finite, student, state.student),
      ema=training_state.where(finite, ema, state.ema),
    )
    return state, metrics

  def critic_step(
    self,
    state: training_state.DistillState,
    frozen: Frozen,
    batch: dict,
    key: jax.Array,
    *,
    num_blocks: int,
    before: jax.Array | None = None,
    most_before: int | None = None,
  ) -> tuple[training_state.DistillState, Metrics]:
    """One update of the critic: flow matching on a fresh rollout.

    Arguments as of `generator_step`, whose trajectories it does not read.
    """
    blocks = dict(num_blocks=num_blocks, before=before, most_before=most_before)
    self._check(frozen, **blocks)
    draws = self._draws(key, batch['text'].shape[0], num_blocks)

    def loss_fn(params, part, _):
      batch, draws = part
      params = self._whole(params, frozen.critic_base, frozen)
      sampler = self._student_sampler(
        state.student.params, frozen, batch['text']
      )
      record = self._rollout(sampler, draws, **blocks)
      x0 = self._cut(frozen, record)
      x = noise_schedule.add_noise(x0, draws['eps'], draws['sigma'])
      text = self.critic.project_text(params, batch['text'])
      flow, _ = self.critic.flow(params, x, draws['sigma'], text)
      loss = losses.flow_matching(flow, x0, draws['eps'])
      return loss, {'critic': loss}

    grads, metrics = microbatches.gradient(
      *([loss_fn], state.critic.params, (batch, draws)),
      self.config.microbatches,
      in_place=self.adapters is None,
    )
    critic = state.critic.update(grads, self.critic_optimiser)
    norm = optax.tree.norm(grads)
    finite = training_state.finite_update(norm, *metrics.values())
    state = dataclasses.replace(
      state,
      critic=training_state.where(finite, critic, state.critic),
      iteration=state.iteration + 1,
    )
    metrics |= self._exit_metric('critic_exit_step', draws) | {
      'critic_grad_norm': norm,
      'critic_skipped': ~finite,
    }
    return state, metrics

  def _whole(self, params: Any, base: Any, frozen: Frozen) -> Any:
    """Parameters of a network, of which all or adapters are trained."""
    if self.adapters is None:
      return params
    base = frozen.teacher if base is None else base
    return lora.join(base, params, self.adapters.scale)

  def _student_sampler(
    self, trained: Any, frozen: Frozen, states: jax.Array
  ) -> Sampler:
    """Of what is trained of the student, and text states [B, L, text_dim]."""
    params = self._whole(trained, frozen.student_base, frozen)
    return self._sampler(params, self.student.project_text(params, states))

  def _sampler(self, params: Any, text: TextKV) -> Sampler:
    return Sampler(self.student, params, text, self.rollout)

  def _draws(self, key, batch, num_blocks):
    """All chance of a step, per sample.

    Exit steps are the same for all samples of a microbatch, each of which has
    one of its own. All else is drawn for the whole batch, so that its parts do
    not matter.
    """
    rollout_key, level_key, eps_key = jax.random.split(key, 3)
    exit_key, noise_key = jax.random.split(rollout_key)
    num_parts = self.config.microbatches
    exit_steps = jax.random.randint(
      exit_key, (num_parts,), 0, self.rollout.num_steps
    )
    frames, *frame = self.rollout.block_shape(self.student.config)
    frames *= num_blocks
    return {
      # Part i has the samples i, i + num_parts, ...
      'exit_step': jnp.tile(exit_steps, batch // num_parts),
      'noise_keys': jax.random.split(noise_key, batch),
      'sigma': self._level(level_key, batch),
      'eps': jax.random.normal(eps_key, (batch, frames, *frame)),
    }

  def _exit_metric(self, name, draws):
    """By which losses are told apart, where all of a batch left at one step."""
    if self.config.microbatches > 1:
      return {}
    return {name: draws['exit_step'][0]}

  def lengths(self, num_blocks: int, longest: int) -> dict[str, Any]:
    """Arguments of both steps for a rollout of so many blocks.

    Those beyond what the losses see are no static number: one program serves
    all of these lengths.

    Args:
      num_blocks: of a rollout.
      longest: the most blocks that a rollout of the run has.
    """
    shown = self.config.loss_blocks
    if num_blocks <= shown:
      return {'num_blocks': num_blocks}
    return {
      'num_blocks': shown,
      'before': np.int32(num_blocks - shown),
      'most_before': longest - shown,
    }

  def needs_codec(self, longest: int) -> bool:
    """Whether a run with rollouts of up to so many blocks needs a codec."""
    longer = longest > self.config.loss_blocks
    return longer and self.config.cut_start == 'reencoded'

  def _check(self, frozen, num_blocks, before, most_before):
    """Raises a ValueError if a step's arguments do not fit."""
    shown = self.config.loss_blocks
    if not 1 <= num_blocks <= shown or (before is None) != (
      most_before is None
    ):
      raise ValueError(
        f'num_blocks={num_blocks} are not within 1..{shown}, the loss_blocks; '
        f'of more, say how many come before, and the most_before'
      )
    if before is None:
      return
    if num_blocks < shown:
      raise ValueError(f'of a longer rollout {num_blocks} blocks, not {shown}')
    if self.config.cut_start == 'reencoded' and frozen.codec is None:
      raise ValueError(
        f'rollouts of more than loss_blocks={shown} blocks whose '
        "cut_start='reencoded' need a codec"
      )

  def _rollout(self, sampler, draws, num_blocks, before, most_before):
    """Self-rollout to one exit step, the same for all samples and blocks."""
    noise = rollout.named_noise(
      draws['noise_keys'], self.rollout.block_shape(self.student.config)
    )
    return training_rollout.record_rollout(
      sampler,
      noise,
      num_blocks,
      draws['exit_step'][0],
      order=self.config.order,
      block_first_context=self.config.block_first_context,
      before=0 if before is None else before,
      most_before=most_before,
    )

  def _cut(self, frozen, record):
    """The latents that the losses see; of a longer rollout they start anew."""
    x0 = rollout.join_blocks(record.x0)
    if self.config.cut_start == 'as_made' or not len(record.x0_before):
      return x0
    first = recoding.first_latent(
      frozen.codec, record.x0_before, record.num_before, x0[:, :1]
    )
    return jnp.concatenate([jax.lax.stop_gradient(first), x0[:, 1:]], 1)

  def _level(self, key, batch):
    """Uniform u, warped, clamped; one level per sample."""
    sigma = noise_schedule.warp_timestep(
      jax.random.uniform(key, (batch,)), self.config.timestep_shift
    )
    return jnp.clip(sigma, self.config.min_level, self.config.max_level)

  def _direction(self, state, frozen, batch, x0, draws):
    """Where the reverse KL pushes x0, by critic and teacher."""
    sigma = draws['sigma']
    x = noise_schedule.add_noise(x0, draws['eps'], sigma)
    critic = self._whole(state.critic.params, frozen.critic_base, frozen)
    fake_x0 = self._score(
      *(self.critic, critic, self.config.critic_guidance),
      *(x, sigma, batch['text'], frozen.negative_text),
    )
    real_x0 = self._score(
      *(self.teacher, frozen.teacher, self.config.guidance),
      *(x, sigma, batch['text'], frozen.negative_text),
    )
    return losses.reverse_kl_direction(x0, fake_x0, real_x0)

  def _score(self, network, params, guidance, x, sigma, states, negative):
    """A network's clean estimate, led away from the negative states.

    Guidance's two passes are one after the other, not a batch as in
    `Denoiser.guided_flow`: both at once would hold twice as much of a large
    teacher's activations.
    """

    def flow(states):
      text = network.project_text(params, states)
      return network.flow(params, x, sigma, text)[0]

    if guidance == 1.0:
      guided = flow(states)
    else:
      negative = jnp.broadcast_to(negative, states.shape)
      cond, uncond = jax.lax.map(flow, jnp.stack([states, negative]))
      guided = guide(cond, uncond, guidance)
    return noise_schedule.flow_to_x0(x, guided, sigma)

  def _forward_kl(self, params, batch, step):
    levels = self.rollout.levels
    x, sigma, answer = losses.forward_kl_pair(
      jnp.moveaxis(batch['trajectory'], 1, 0),
      levels,
      levels,
      step,
      self.config.forward_kl_target,
    )
    text = self.student.project_text(params, batch['trajectory_text'])
    mode = self.config.forward_kl_attention
    if mode == 'cached':
      flow = training_rollout.cached_flow(
        self._sampler(params, text),
        x,
        step,
        past_gradient=self.config.past_gradient,
      )
    else:
      mask = None
      if mode == 'block_causal':
        mask = attention.block_causal_mask(
          x.shape[1],
          self.rollout.frames_per_block,
          window=self.rollout.window,
          sink=self.rollout.sink,
        )
      flow, _ = self.student.flow(params, x, sigma, text, frame_mask=mask)
    sigma_next = losses.number_at(levels, step + 1)
    return losses.forward_kl(
      flow, x, sigma, sigma_next, answer, self.config.forward_kl_target
    )
