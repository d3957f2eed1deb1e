"""Self-rollouts and their gradients against the public training pipeline."""

import functools

import jax
import jax.numpy as jnp

from hiar_jax import noise_schedule, rollout
from hiar_jax.training.rollout import training_rollout
from tests.parity.golden_lib import (
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

# Stored name of the gradient -> ours.
_PAST_GRADIENTS = {
  'grad_official': 'straight_through',
  'grad_detached': 'detached',
}
_EXITS = {
  'exit0': (0, 'sde'),
  'exit2': (2, 'sde'),
  'exit3': (3, 'sde'),
  'exit1_ode': (1, 'ode'),
}
_BLOCKS = 3


@functools.cache
def _program(stepping: str, past_gradient: str):
  """(params, exit step) -> output and gradient, compiled for all exit steps."""
  golden = load('training_rollout')
  denoiser, _ = network('training_rollout')
  # Noise by (level, block): level 0 is the start.
  start = from_pipeline(golden['in/noise']).reshape(1, 1, 4, 3, 4, 6, 4)
  renoise = from_pipeline(golden['in/sde_noise'])
  bank = jnp.concatenate([start.swapaxes(1, 2), renoise])
  cotangent = from_pipeline(golden['in/cotangent'])[:, : 3 * _BLOCKS]
  config = rollout.RolloutConfig(
    levels=noise_schedule.warped_levels((1000, 750, 500, 250), 5.0),
    stepping=stepping,
  )

  def loss(params, exit_step):
    text = denoiser.project_text(params, golden['in/context'])
    output = training_rollout(
      rollout.Sampler(denoiser, params, text, config),
      lambda level, block: bank[level, block],
      _BLOCKS,
      exit_step,
      order='step_first',
      past_gradient=past_gradient,
    )
    return jnp.sum(output * cotangent), output

  return jit(jax.grad(loss, has_aux=True))


def _run(name: str):
  exit_step, stepping = _EXITS[name]
  _, params = network('training_rollout')
  out = {}
  for stored_name, past_gradient in _PAST_GRADIENTS.items():
    gradients, output = _program(stepping, past_gradient)(params, exit_step)
    out[f'out/{name}/output'] = to_pipeline(output)
    out |= gradients_by_name(
      'training_rollout', f'out/{name}/{stored_name}/', gradients
    )
  return out


def _cases(name: str):
  run = functools.cache(functools.partial(_run, name))
  for array in stored('training_rollout', f'out/{name}/'):
    if '/grad_' in array:
      yield Case('training_rollout', array, run, GRADIENT, relative=True)
    else:
      yield Case('training_rollout', array, run, PIPELINE)


CASES = [case for name in _EXITS for case in _cases(name)]
