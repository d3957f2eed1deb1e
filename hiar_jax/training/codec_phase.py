"""The phase of a learnt codec.

Its section `clips` names what it is trained on, see `inputs.open_clips`.
"""

import jax

from hiar_jax.codecs import vae as codecs_vae
from hiar_jax.data import sources
from hiar_jax.models import vae
from hiar_jax.training import codec as training_codec
from hiar_jax.training import inputs, phase_parts
from hiar_jax.training.phase_parts import Config

# Every so often the VAE sees whole frames, as many pixels as in the crops.
_WHOLE_EVERY = 4
_STATISTICS_VIDEOS = 64


def build(config: Config) -> phase_parts.Phase:
  """The learnt codec: the video VAE on crops and whole frames of clips."""
  if 'mesh' in config:
    raise ValueError('the phase codec runs on one device, and has a mesh')
  vae_config = vae.VAEConfig(**config.vae)
  numbers = config.codec_training
  optimiser = phase_parts.make_optimiser(config.optimiser, config.iterations)
  key = jax.random.key(config.seed)
  clips = inputs.open_clips(config)
  _, height, width, _ = clips.shape
  whole_videos = max(
    1, config.batch_size * clips.crop**2 // min(height, width) ** 2
  )
  batches = sources.batches(
    clips, batch_size=config.batch_size, seed=config.seed
  )
  update = training_codec.make_step(
    vae_config,
    optimiser,
    kl_weight=numbers.kl_weight,
    ema_decay=config.ema_decay,
  )

  def step(state, batch, iteration):
    whole = iteration % _WHOLE_EVERY == _WHOLE_EVERY - 1
    video = batch['video'][:whole_videos] if whole else batch['crop']
    return update(state, video, jax.random.fold_in(key, iteration))

  def weights(state):
    mean_C, std_C = training_codec.statistics(
      vae_config,
      state.ema,
      clips,
      num_videos=min(_STATISTICS_VIDEOS, len(clips)),
    )
    return training_codec.fold_statistics(state.ema, mean_C, std_C)

  if numbers.start_weights:
    params = codecs_vae.load_vae_codec(numbers.start_weights, vae_config).params
  else:
    params = training_codec.init(vae_config, key)
  return phase_parts.Phase(
    state=phase_parts.regression_state(params, optimiser),
    step=step,
    batches=batches,
    weights=weights,
  )
