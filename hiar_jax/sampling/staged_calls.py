"""A call whose steps are on devices of their own: a stream of a known length.

The blocks are those of `calls.sample` in step-first order, and finished one
after the other.
"""

# B batch, F frames, h w latent rows and columns, C channels, L text tokens,
# D width

from collections.abc import Callable

import jax
import numpy as np

from hiar_jax.sampling import calls, meshes, streaming


def check(request: calls.Request, start: calls.Start | None) -> None:
  """Raises ValueError for a call that has no stages."""
  if request.order != 'step_first' or start is not None:
    raise ValueError(
      'a mesh with stages makes videos in step-first order from pure noise, '
      f'not in {request.order!r}{" from a clip" if start is not None else ""}; '
      'stage=1 divides the passes of any call over tensor and context'
    )


def sample(
  engine: streaming.Engine,
  params: dict,
  request: calls.Request,
  keys_B: jax.Array,
  states_BLD: np.ndarray,
  initial: np.ndarray | None,
  report: Callable[[int], None],
) -> np.ndarray:
  """Samples one batch; arguments and result as in `calls.sample`."""
  mesh = engine.mesh
  params = meshes.put_params(engine.denoiser, params, mesh)
  keys_B = engine.place(keys_B)
  if initial is not None:
    initial = np.repeat(initial, len(states_BLD) // len(initial), 0)
  with meshes.under(mesh):
    text = streaming.project(params, states_BLD, denoiser=engine.denoiser)
    bank = streaming.new_bank(text, size=engine.bank_size)
    state = streaming.begin(params, text, initial, 0, engine=engine)
    made = [] if initial is None else [initial]
    for block in range(request.num_blocks):
      turns = engine.turns(block)
      slots = np.zeros((len(turns), len(turns[0])), np.int32)
      state, latents = streaming.run_turns(
        params, bank, slots, keys_B, state, engine=engine
      )
      made.append(np.asarray(latents.addressable_data(0)))
      report(_passes(engine))
  return np.concatenate(made, 1)


def _passes(engine: streaming.Engine) -> int:
  """Of a block, as `calls.num_passes` counts them."""
  shared = engine.mode == 'shared'
  steps = engine.config.num_steps
  return steps + 1 if shared else 2 * steps
