"""The learnt codec: trained on crops, its latents made white at the end."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hiar_jax.data import bouncing
from hiar_jax.models import vae
from hiar_jax.training import codec as training_codec
from hiar_jax.training import state as training_state

WORLD = bouncing.WorldConfig(num_frames=5)
VIDEOS = bouncing.ObjectClips(WORLD, seed=3, crop=16)
CONFIG = vae.VAEConfig(
  base_dim=4,
  z_dim=3,
  dim_mult=(1, 1),
  num_res_blocks=1,
  temporal_downsample=(True,),
  mean=(0.0,) * 3,
  std=(1.0,) * 3,
  patch_size=4,
)

init = jax.jit(training_codec.init, static_argnums=0)


def test_every_residual_branch_starts_as_nothing():
  params = init(CONFIG, jax.random.key(0))
  paths, _ = jax.tree_util.tree_flatten_with_path(params)
  silent = [
    [key.key for key in path] for path, leaf in paths if not np.any(leaf)
  ]
  ends = [p for p in silent if p[-1] == 'kernel']
  assert len(ends) == 12
  assert {p[-2] for p in ends} == {'conv2', 'proj'}


def test_updates_lower_the_error():
  optimiser = optax.adam(3e-3)
  params = init(CONFIG, jax.random.key(0))
  step = jax.jit(
    training_codec.make_step(CONFIG, optimiser, kl_weight=1e-4, ema_decay=0.5)
  )
  state = training_state.RegressionState(
    iteration=jnp.zeros((), jnp.int32),
    net=training_state.init_net(params, optimiser),
    ema=params,
  )
  video = np.stack([VIDEOS[index]['crop'] for index in range(4)])
  errors = []
  for iteration in range(60):
    state, metrics = step(state, video, jax.random.key(iteration))
    errors.append(float(metrics['absolute_error']))
  assert np.mean(errors[-5:]) < 0.75 * errors[0]
  assert int(state.iteration) == 60
  assert {'loss', 'kl', 'psnr'} < metrics.keys()


def test_folded_statistics_whiten_the_latents_and_change_no_pixel():
  params = jax.jit(vae.init, static_argnums=0)(CONFIG, jax.random.key(1))
  mean_C, std_C = training_codec.statistics(
    CONFIG, params, VIDEOS, num_videos=4
  )
  folded = training_codec.fold_statistics(params, mean_C, std_C)
  after = training_codec.statistics(CONFIG, folded, VIDEOS, num_videos=4)
  np.testing.assert_allclose(after[0], 0, atol=1e-4)
  np.testing.assert_allclose(after[1], 1, atol=1e-4)
  video = jnp.asarray(VIDEOS[0]['video'][None] / 127.5 - 1, jnp.float32)

  @jax.jit
  def decoded(params):
    return vae.decode(CONFIG, params, vae.encode(CONFIG, params, video))

  np.testing.assert_allclose(decoded(params), decoded(folded), atol=1e-4)
  # The posterior is as wide as before, in the new unit.
  posterior = jax.jit(vae.posterior, static_argnums=0)
  before, log_var = (posterior(CONFIG, p, video)[1] for p in (params, folded))
  np.testing.assert_allclose(
    np.asarray(log_var), np.asarray(before) - 2 * np.log(std_C), atol=1e-4
  )
