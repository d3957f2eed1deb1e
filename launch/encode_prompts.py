"""Encodes prompts once, for all of training.

  hiar-jax encode prompts --config=my_config.py

by the config's sections `prompts`, `text` and `states`; a config that trains on
`videos` or `latents` has their captions encoded. Kill it and start it again: it
goes on with the files that are missing. SIGTERM finishes the batch under way,
drops its file and ends with status 143. The processes of a pod, found as in
`hiar-jax train`, share the files among them, each on its own devices; so do any
others with --shard_index=0 --num_shards=4 and so on. They never wait for each
other: one that was killed is started again alone. --verify re-reads all states.
"""

import jax
import ml_collections
import tqdm
from absl import flags

from hiar_jax.data import text_states
from hiar_jax.models import sharding
from hiar_jax.runtime import config_flag, errors, shares, stopping
from hiar_jax.training import inputs

_CONFIG = config_flag.define(required=True)
shares.define_flags()
_VERIFY = flags.DEFINE_bool('verify', False, 'Re-read everything instead.')


def _mesh() -> jax.sharding.Mesh | None:
  """This process's devices, the weights divided over them."""
  devices = jax.local_devices()
  if len(devices) == 1:
    return None
  return sharding.make_mesh(sharding.MeshConfig(fsdp=-1), devices)


def _encode(config: ml_collections.ConfigDict) -> None:
  settings = config.states
  if settings.batch_size < 1:
    raise ValueError(
      f'states.batch_size={settings.batch_size} is not at least 1'
    )
  share = shares.by_flags()
  prompts = inputs.captions_to_encode(config)
  encoder = inputs.open_encoder(config, _mesh())
  manifest = text_states.make_manifest(
    prompts, encoder, num=settings.num, shard_size=settings.shard_size
  )
  out = settings.dir
  missing = manifest.missing(out, **share._asdict())
  manifest.settle(out)  # Refuses a folder that has others.
  if share.shard_index == 0:
    texts = inputs.other_texts(config, encoder)
    if added := text_states.add_captions(out, encoder, texts):
      print(f'{out}: added {added} texts beside the prompts')
  todo = [index for shard in missing for index in manifest.indices(shard)]
  print(f'{out}: {len(todo)} of {manifest.num} prompts to encode; {share}')
  cut, tokens = text_states.count_cut(prompts, encoder, todo)
  if cut:
    print(
      f'{out}: {cut} of these prompts have more than {encoder.length} tokens '
      f'and lose {tokens} in all'
    )
  with (
    stopping.StopSignals(together=False) as stop,
    tqdm.tqdm(total=len(todo), unit='prompt', dynamic_ncols=True) as bar,
  ):
    done = text_states.make(
      out,
      manifest,
      prompts,
      encoder,
      batch_size=settings.batch_size,
      progress=bar.update,
      should_stop=lambda: stop.requested(bar.n),
      **share._asdict(),
    )
    if not done:
      stop.leave()


def _verify(out: str) -> None:
  problems = text_states.verify(out)
  if problems:
    print('\n'.join(problems))
    raise ValueError(
      f'{out} has {len(problems)} problems; delete the damaged files and '
      'encode again'
    )
  print(f'{out}: {text_states.Manifest.read(out).num} prompts, whole')


def main(argv):
  del argv
  config = _CONFIG.value
  if 'states' not in config:
    raise ValueError(
      f'the {config.phase} config has no states; training encodes its prompts '
      'as it goes'
    )
  if _VERIFY.value:
    _verify(config.states.dir)
  else:
    _encode(config)


if __name__ == '__main__':
  errors.run_main(main)
