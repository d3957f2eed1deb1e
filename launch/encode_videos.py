"""Encodes videos once, for the teacher's training.

  hiar-jax encode videos --config=my_config.py:teacher

by the config's sections `videos`, `codec` and `latents`. A video that is broken
or too short is named and left out. Kill it and start it again: it goes on with
the files that are missing. SIGTERM finishes the batch under way, drops its file
and ends with status 143. The processes of a pod, found as in `hiar-jax train`,
share the files among them, each on its own devices; so do any others with
--shard_index=0 --num_shards=4 and so on. They never wait for each other: one
that was killed is started again alone. --verify re-reads all latents.
"""

import math
import os

import jax
import ml_collections
import tqdm
from absl import flags

from hiar_jax.codecs import pixels
from hiar_jax.data import latents
from hiar_jax.runtime import config_flag, errors, shares, stopping
from hiar_jax.training import inputs

_CONFIG = config_flag.define(required=True)
shares.define_flags()
_VERIFY = flags.DEFINE_bool('verify', False, 'Re-read everything instead.')
_NUM_THREADS = flags.DEFINE_integer(
  'num_threads',
  None,
  'That decode videos; default: as many as there are processors.',
  lower_bound=1,
)


def _encode(config: ml_collections.ConfigDict) -> None:
  settings = config.latents
  if settings.batch_size < 1:
    raise ValueError(
      f'latents.batch_size={settings.batch_size} is not at least 1'
    )
  share = shares.by_flags()
  videos = inputs.open_bare_videos(config)
  codec = inputs.open_codec(config)
  manifest = inputs.latents_manifest(config, videos, codec)
  devices = jax.local_devices()
  # Every batch is shared by as many devices as divide it.
  devices = devices[: math.gcd(len(devices), settings.batch_size)]
  out = settings.dir
  missing = manifest.missing(out, **share._asdict())
  manifest.settle(out)  # Refuses a folder that has others.
  total = sum(len(manifest.indices(shard)) for shard in missing)
  print(
    f'{out}: {total} of {manifest.num} videos to encode; {share}, devices '
    f'{len(devices)}'
  )
  problems = 0
  with (
    stopping.StopSignals(together=False) as stop,
    tqdm.tqdm(total=total, unit='video', dynamic_ncols=True) as bar,
  ):

    def report(problem: str) -> None:
      nonlocal problems
      problems += 1
      bar.write(f'left out: {problem}')

    done = latents.make(
      out,
      manifest,
      videos,
      pixels.encoder(codec, devices),
      batch_size=settings.batch_size,
      num_threads=_NUM_THREADS.value or os.cpu_count() or 1,
      progress=bar.update,
      report=report,
      should_stop=lambda: stop.requested(bar.n),
      **share._asdict(),
    )
    if not done:
      stop.leave()
  if problems:
    print(f'{out}: {problems} of {total} videos were left out')


def _verify(out: str) -> None:
  problems = latents.verify(out)
  if problems:
    print('\n'.join(problems))
    raise ValueError(
      f'{out} has {len(problems)} problems; delete the damaged files and '
      'encode again'
    )
  left_out = len(latents.problems(out))
  num = latents.Manifest.read(out).num - left_out
  print(f'{out}: {num} videos, whole; {left_out} could not be read')


def main(argv):
  del argv
  config = _CONFIG.value
  if 'latents' not in config:
    raise ValueError(f'the {config.phase} config has no latents to encode')
  if _VERIFY.value:
    _verify(config.latents.dir)
  else:
    _encode(config)


if __name__ == '__main__':
  errors.run_main(main)
