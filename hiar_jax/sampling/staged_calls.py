"""A call as a stream of a known length: for stages, and for processes.

The blocks are those of `calls.sample`, and finished one after the other, by
programs whose results all processes have.
"""

# B batch, F frames, h w latent rows and columns, C channels, L text tokens,
# D width

from collections.abc import Callable

import jax
import numpy as np

from hiar_jax.sampling import block_stream, calls, meshes, streaming


def mode_of(
  request: calls.Request, start: calls.Start | None, context: str
) -> str:
  """The mode of the stream that a call is.

  Raises:
    ValueError: if there is none.
  """
  if request.order == 'hybrid' or start is not None:
    what = 'from a clip' if start is not None else "in 'hybrid' order"
    raise ValueError(
      f'a call {what} has no stages and is not made by several processes; '
      'stage=1 in one process divides its passes over tensor and context'
    )
  if request.order == 'block_first':
    return 'block_first'
  return 'shared' if context == 'shared' else 'batched'


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
      given = (params, bank, slots, keys_B, state)
      if engine.mode == 'block_first':
        state, latents = block_stream.run_block(
          *(*given, np.int32(block)),
          engine=engine,
          is_first=not block and bool(engine.config.first_levels),
        )
      else:
        state, latents = streaming.run_turns(*given, engine=engine)
      made.append(np.asarray(latents.addressable_data(0)))
      report(_passes(engine))
  return np.concatenate(made, 1)


def _passes(engine: streaming.Engine) -> int:
  """Of a block, as `calls.num_passes` counts them."""
  steps = engine.config.num_steps
  return 2 * steps if engine.mode == 'batched' else steps + 1
