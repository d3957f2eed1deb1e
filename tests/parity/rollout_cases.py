"""Whole rollouts, pass by pass, against the public inference pipelines."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from hiar_jax import noise_schedule, rollout
from hiar_jax.denoiser import Denoiser
from tests.parity.golden_lib import (
  PIPELINE,
  cases,
  from_pipeline,
  load,
  network,
  stored,
  to_pipeline,
)
from tests.toy_network import jit

_STEP_FIRST = {'make': rollout.step_first, 'blocks': 5}

# Stored name -> how ours is called. What is not named: batch 1, window 21.
_ROLLOUTS = {
  'timestep_first': _STEP_FIRST,
  'timestep_first_B2': _STEP_FIRST | {'batch': 2},
  'timestep_first_ode': _STEP_FIRST | {'stepping': 'ode'},
  'timestep_first_clean_context': _STEP_FIRST | {'context': 'clean'},
  'timestep_first_local6_7blocks': _STEP_FIRST | {'blocks': 7, 'window': 6},
  'timestep_first_initial_latent': _STEP_FIRST | {'blocks': 4, 'given': True},
  'frame_first': {'make': rollout.block_first, 'blocks': 5},
  'hybrid_2frame_first_steps': {
    'make': functools.partial(rollout.hybrid, block_first_steps=2),
    'blocks': 5,
  },
  'hybrid_block0_n1': {
    'make': functools.partial(rollout.hybrid, anchor_blocks=1),
    'blocks': 5,
  },
}


@dataclasses.dataclass(frozen=True)
class _Recorder(Denoiser):
  """A denoiser that leaves each pass in `passes`, in the order of execution."""

  passes: list = dataclasses.field(default_factory=list, hash=False)

  def flow(self, params, x_BFhwC, sigma, text, **kwargs):
    flow, kv = super().flow(params, x_BFhwC, sigma, text, **kwargs)
    io_callback(
      lambda *arrays: self.passes.append(jax.tree.map(np.asarray, arrays)),
      None,
      x_BFhwC,
      flow,
      kv,
      jnp.stack([1000 * sigma, kwargs['past'].frames.astype(jnp.float32)]),
      ordered=True,
    )
    return flow, kv


def _run(name, make, blocks, batch=1, window=21, given=False, **config):
  golden = load('hierarchical')
  denoiser, params = network('hierarchical')
  denoiser = _Recorder(denoiser.config)
  # The stored noise is by (level, block): level 0 is the start.
  start = from_pipeline(golden['in/noise']).reshape(1, 2, 7, 3, 4, 6, 4)
  renoise = from_pipeline(golden['in/sde_noise'])
  bank = jnp.concatenate([start.swapaxes(1, 2), renoise])[:, :, :batch]
  config = rollout.RolloutConfig(
    levels=noise_schedule.warped_levels((1000, 750, 500, 250), 5.0),
    window=window,
    **config,
  )

  # One block more than is compared: the public code commits the last block as
  # well, which nobody reads and ours leaves out.
  @jit
  def run(params, context, initial):
    text = denoiser.project_text(params, context)
    sampler = rollout.Sampler(denoiser, params, text, config)
    # There is no noise of an eighth block; any will do.
    noise = lambda level, block: bank[level, jnp.minimum(block, 6)]
    return make(sampler, noise, blocks + 1, initial)

  initial = from_pipeline(golden['in/initial_latent']) if given else None
  latents = run(params, golden['in/context'][:batch], initial)
  jax.effects_barrier()
  end = latents.shape[1] - config.frames_per_block
  passes = [one for one in denoiser.passes if one[-1][1] < end]
  inputs, flows, kvs, calls = zip(*passes, strict=True)
  out = {
    'latents': to_pipeline(latents[:, :end]),
    'calls_input': to_pipeline(np.stack(inputs)),
    'calls_flow': to_pipeline(np.stack(flows)),
    'calls_t_startframe': np.stack(calls),
  }
  # The last cache holds the clean commits of as many blocks as it has room.
  clean = [kv for kv, (level, _) in zip(kvs, calls, strict=True) if level == 0]
  clean = clean[-(window // config.frames_per_block) :]
  for layer in range(denoiser.config.num_layers):
    out[f'final_k{layer}'] = np.concatenate([kv.k[layer] for kv in clean], 1)
    out[f'final_v{layer}'] = np.concatenate([kv.v[layer] for kv in clean], 1)
  return {f'out/{name}/{array}': x for array, x in out.items()}


CASES = []
for _name, _rollout in _ROLLOUTS.items():
  CASES += cases(
    'hierarchical',
    functools.partial(_run, _name, **_rollout),
    stored('hierarchical', f'out/{_name}/'),
    PIPELINE,
  )
