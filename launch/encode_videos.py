"""Encodes the small world's videos once, for the teacher's training.

  hiar-jax encode videos --config=bouncing:teacher_start

Kill it and start it again: it goes on with the files that are missing. SIGTERM
finishes the batch under way, drops its file and ends with status 143.
"""

import tqdm

from hiar_jax.codecs import pixels
from hiar_jax.data import latent_files
from hiar_jax.runtime import config_flag, errors, stopping
from hiar_jax.training import phase_parts

_CONFIG = config_flag.define(required=True)


def main(argv):
  del argv
  config = _CONFIG.value
  if 'latents' not in config:
    raise ValueError(f'the {config.phase} config has no latents to encode')
  codec = phase_parts.world_codec(config)
  manifest = phase_parts.latents_manifest(config, codec)
  out = config.latents.dir
  manifest.settle(out)  # Refuses a folder that has others.
  missing = manifest.missing(out)
  total = sum(len(manifest.indices(shard)) for shard in missing)
  print(f'{out}: {total} of {manifest.num} videos to encode')
  with (
    stopping.StopSignals(together=False) as stop,
    tqdm.tqdm(total=total, unit='video', dynamic_ncols=True) as bar,
  ):
    done = latent_files.make(
      out,
      manifest,
      phase_parts.videos(config),
      pixels.encoder(codec),
      batch_size=config.latents.batch_size,
      progress=bar.update,
      should_stop=lambda: stop.requested(bar.n),
    )
    if not done:
      stop.leave()


if __name__ == '__main__':
  errors.run_main(main)
