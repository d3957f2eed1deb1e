"""The distillation losses and their gradients, and the teacher's trajectory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from hiar_jax import noise_schedule as ns
from hiar_jax.models import attention
from hiar_jax.training import losses
from tests.parity.golden_lib import (
  FORMULA,
  FORWARD,
  GRADIENT,
  PIPELINE,
  Case,
  from_pipeline,
  gradients_by_name,
  load,
  network,
  stored,
  to_pipeline,
)
from tests.toy_network import jit

_INDICES = (1000, 750, 500, 250)


def _drawn_sigma() -> np.ndarray:
  """Levels of the stored draws by the training law, [B, F]."""
  draw = load('dmd_loss')['in/raw_timestep'] / ns.TIMESTEPS
  sigma = np.clip(ns.warp_timestep(draw, 5.0), 0.02, 0.98)
  return np.repeat(sigma, 9, 1)


def _dmd_batch():
  """Generated latents, their noised form, and the levels (two, see below)."""
  golden = load('dmd_loss')
  x0, eps = (from_pipeline(golden[f'in/{n}']) for n in ('latent', 'noise'))
  # The public code noises at the nearest level of one table and converts flow
  # to x0 at another's; the network is told the drawn timestep, which is in
  # neither.
  noising, conversion = golden['in/sigma_noising__sigma_x0conv'].T
  told = golden['out/dmd/timestep_shifted_clamped'] / ns.TIMESTEPS
  return x0, eps, ns.add_noise(x0, eps, noising), told, noising, conversion


def _dmd():
  golden = load('dmd_loss')
  x0, _, noisy, told, _, sigma = _dmd_batch()
  critic, critic_params = network('dmd_loss', 'w_fake')
  teacher, teacher_params = network('dmd_loss', 'w_real')

  def text(denoiser, params, name):
    return jit(denoiser.project_text)(params, golden[f'in/{name}'])

  fake_flow, _ = jit(critic.flow)(
    critic_params, noisy, told, text(critic, critic_params, 'context')
  )
  cond = text(teacher, teacher_params, 'context')
  uncond = text(teacher, teacher_params, 'neg_context')
  guided = jit(functools.partial(teacher.guided_flow, teacher_params))
  cond_flow = guided(noisy, told[:, 0], cond, uncond, 1.0)
  uncond_flow = guided(noisy, told[:, 0], cond, uncond, 0.0)
  fake_x0 = ns.flow_to_x0(noisy, fake_flow, sigma)
  # cond + 3 (cond - uncond).
  real_x0 = ns.flow_to_x0(
    noisy, guided(noisy, told[:, 0], cond, uncond, 4.0), sigma
  )
  direction = losses.reverse_kl_direction(jnp.asarray(x0), fake_x0, real_x0)
  loss, gradient = jax.value_and_grad(losses.reverse_kl_along)(
    jnp.asarray(x0), direction
  )
  size = jnp.mean(jnp.abs(direction))
  latents = {
    'noisy_latent': noisy,
    'pred_fake_flow': fake_flow,
    'pred_fake_x0': fake_x0,
    'pred_real_cond_flow': cond_flow,
    'pred_real_cond_x0': ns.flow_to_x0(noisy, cond_flow, sigma),
    'pred_real_uncond_x0': ns.flow_to_x0(noisy, uncond_flow, sigma),
    'pred_real_x0_cfg': real_x0,
    'kl_grad': gradient * gradient.size,
    'dloss_dlatent': gradient,
  }
  return {
    'out/dmd/timestep_shifted_clamped': ns.TIMESTEPS * _drawn_sigma(),
    'out/dmd/loss': loss[None],
    'out/dmd/dmdtrain_gradient_norm': size[None],
    **{f'out/dmd/{name}': to_pipeline(x) for name, x in latents.items()},
  }


def _critic():
  x0, eps, noisy, told, noising, conversion = _dmd_batch()
  context = load('dmd_loss')['in/context']
  critic, params = network('dmd_loss', 'w_fake')

  def loss(params):
    text = critic.project_text(params, context)
    flow, _ = critic.flow(params, noisy, told, text)
    # The public loss takes the flow back from x0 with the other table.
    flow *= ns.expand(conversion / noising, flow)
    return losses.flow_matching(flow, x0, eps)

  loss, gradients = jit(jax.value_and_grad(loss))(params)
  return {
    'out/critic_flow/loss': loss[None],
    'out/critic_flow/critic_timestep': ns.TIMESTEPS * _drawn_sigma(),
    **gradients_by_name('dmd_loss', 'out/critic_flow/grad/', gradients),
  }


# Stored name -> (target of the loss, student sees all frames).
_FORWARD_KL = {
  'x0_pred_x0_step0': ('chord_x0', False),
  'x0_gt_x0_step0': ('final_x0', False),
  'velocity_step0': ('velocity', False),
  'x0_pred_x0_step0_bidirectional': ('chord_x0', True),
}


def _student(params, context, x, sigma, mask):
  student, _ = network('forward_kl')
  text = student.project_text(params, context)
  return student.flow(params, x, sigma, text, frame_mask=mask)[0]


@functools.cache
def _student_programs(bidirectional: bool):
  """The student's flow, and its gradient from a cotangent, under its mask."""
  mask = attention.block_causal_mask(9, 3) | bidirectional

  def gradients(params, context, x, sigma, cotangent):
    flow = lambda params: _student(params, context, x, sigma, mask)
    return jax.vjp(flow, params)[1](cotangent)[0]

  return jit(functools.partial(_student, mask=mask)), jit(gradients)


def _forward_kl(name: str):
  target, bidirectional = _FORWARD_KL[name]
  golden = load('forward_kl')
  _, params = network('forward_kl')
  points = ns.warped_levels(_INDICES, 8.0)
  levels = ns.warped_levels(_INDICES, 5.0)
  trajectory = np.moveaxis(from_pipeline(golden['in/ode_latent']), 1, 0)
  x, sigma, answer = losses.forward_kl_pair(
    trajectory, points, levels, step=0, target=target
  )
  text = golden['in/context']
  student_flow, student_gradients = _student_programs(bidirectional)
  flow = student_flow(params, text, x, sigma)
  loss, cotangent = jax.value_and_grad(losses.forward_kl)(
    flow, x, sigma, levels[1], answer, target
  )
  gradients = student_gradients(params, text, x, sigma, cotangent)
  velocity = target == 'velocity'
  latents = {
    'student_flow': flow,
    'target': answer,
    'student_pred_in_loss': flow if velocity else ns.flow_to_x0(x, flow, sigma),
  }
  here = f'out/{name}'
  return {
    f'{here}/loss': loss[None],
    **{f'{here}/{array}': to_pipeline(x) for array, x in latents.items()},
    **gradients_by_name('forward_kl', f'{here}/grad/', gradients),
  }


def _teacher_ode():
  """48 Euler steps under guidance 6; every 12th point and the end."""
  golden = load('forward_kl')
  teacher, params = network('forward_kl', 'w_teacher')
  cond, uncond = (
    jit(teacher.project_text)(params, golden[f'in/{name}'][:1])
    for name in ('context', 'neg_context')
  )

  sigmas = ns.sampling_sigmas(48, 8.0)
  # The public script takes x0 at the nearest level of a 1000-step table and
  # the flow back from x0 at the true level.
  table = ns.sampling_sigmas(1000, 8.0)[:-1]
  nearest = table[np.abs(table - sigmas[:-1, None]).argmin(1)]

  @jit
  def sample(params, x):
    def step(x, levels):
      sigma, sigma_next, nearest = levels
      flow = teacher.guided_flow(params, x, sigma, cond, uncond, 6.0)
      return ns.euler_step(x, nearest / sigma * flow, sigma, sigma_next), x

    levels = (sigmas[:-1], sigmas[1:], nearest)
    levels = jax.tree.map(lambda s: jnp.asarray(s, jnp.float32), levels)
    end, points = jax.lax.scan(step, x, levels)
    return jnp.stack([*points[::12], end], 1)

  trajectory = sample(params, from_pipeline(golden['in/teacher_noise']))
  return {'out/teacher_ode/trajectory': to_pipeline(trajectory)}


def _points():
  return {'out/pd_teacher_sigmas': np.asarray(ns.warped_levels(_INDICES, 8.0))}


def _all(file, run, prefix):
  """Cases of all stored arrays under a prefix, each with its kind's limit."""
  run = functools.cache(run)
  for array in stored(file, prefix):
    name = array.rsplit('/', 1)[1]
    if '/grad/' in array or name in ('kl_grad', 'dloss_dlatent'):
      yield Case(file, array, run, GRADIENT, relative=True)
    elif 'timestep' in name or 'sigmas' in name:
      yield Case(file, array, run, FORMULA, relative=True)
    elif name == 'trajectory':
      yield Case(file, array, run, PIPELINE)
    else:
      yield Case(file, array, run, FORWARD)


CASES = [
  *_all('dmd_loss', _dmd, 'out/dmd/'),
  *_all('dmd_loss', _critic, 'out/critic_flow/'),
  *(
    case
    for name in _FORWARD_KL
    for case in _all(
      'forward_kl', functools.partial(_forward_kl, name), f'out/{name}/'
    )
  ),
  *_all('forward_kl', _teacher_ode, 'out/teacher_ode/'),
  *_all('forward_kl', _points, 'out/pd_teacher_sigmas'),
]
