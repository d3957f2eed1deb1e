"""Serves the live page: a video that never ends, and a prompt that changes it.

  hiar-jax serve

and open http://127.0.0.1:8000/. --pipeline takes what hiar_jax.load does, such
as a converted folder; without it the weights that come with the package are
served. docs/live.md has the protocol, which needs no page.

Up to --sessions videos are made at a time, and who comes later waits. Bound to
another host than this machine (--host=0.0.0.0) the server wants a --token,
which the page takes as http://HOST:PORT/#token=... SIGTERM and Ctrl-C end it:
viewers are told, whole videos under way are finished for --drain_s.

Needs the extra `live`: pip install 'hiar_jax[live]'.
"""

import asyncio
import os
import sys
from collections.abc import Sequence

from absl import flags

from hiar_jax.runtime import errors
from hiar_jax.sampling import choice_flags, loading, modes, streaming

_PIPELINE = flags.DEFINE_string(
  'pipeline',
  None,
  'what hiar_jax.load takes; default: what comes with the package',
)
_CHOICES = choice_flags.ChoiceFlags()
_TEXT_ENCODER = flags.DEFINE_string(
  'text_encoder',
  'keep',
  'keep: hold it in memory; release: read it anew for every prompt that is not '
  'cached; or a path of embeddings that --text_cache left',
)
_TEXT_CACHE = flags.DEFINE_string(
  'text_cache',
  None,
  'a folder for the states of prompts, so that each is encoded once',
)
_PROMPT = flags.DEFINE_multi_string(
  'prompt', [], 'that the page offers; the first one to begin with'
)
_MODE = flags.DEFINE_enum(
  'mode',
  modes.AUTO,
  (modes.AUTO, *streaming.MODES),
  'of the streams; auto: the fastest one that fits the memory and the weights',
)
_SHARE_BATCH = flags.DEFINE_bool(
  'share_batch',
  None,
  "make the blocks of all sessions as one batch, with mode 'batched' on one "
  'device; default: on accelerators',
)
_HOST = flags.DEFINE_string('host', '127.0.0.1', 'to listen on')
_PORT = flags.DEFINE_integer(
  'port', 8000, 'likewise; 0 is any free one', 0, 65535
)
_TOKEN = flags.DEFINE_string(
  'token',
  None,
  'that every request must show; or in the environment as HIAR_JAX_TOKEN',
)
_ORIGIN = flags.DEFINE_multi_string(
  'origin', [], 'of other pages that may use the server: https://example.org'
)
_SESSIONS = flags.DEFINE_integer(
  'sessions', 4, 'videos that are made at a time', lower_bound=1
)
_WAITING = flags.DEFINE_integer(
  'waiting', 16, 'sessions that may wait for a place', lower_bound=0
)
_SESSION_MINUTES = flags.DEFINE_float(
  'session_minutes',
  10.0,
  'after which a session ends if others wait for its place',
  lower_bound=0.1,
)
_SOCKETS = flags.DEFINE_integer(
  'sockets', 256, 'connections of any kind', lower_bound=1
)
_UPLOAD_MB = flags.DEFINE_integer(
  'upload_mb', 32, 'of a picture or video to go on from', lower_bound=1
)
_DRAIN_S = flags.DEFINE_float(
  'drain_s', 20.0, 'seconds for whole videos at the end', lower_bound=0
)

_FALLBACK = 'a red sailing boat on a calm lake at sunset, slow camera'


def main(argv: Sequence[str]) -> None:
  del argv
  try:
    from hiar_jax.serving import app, gate, maker, protocol, server, studio
  except ModuleNotFoundError as error:
    raise ValueError(
      f'{error.name} is not installed; the live page needs '
      "pip install 'hiar_jax[live]'"
    ) from error
  token = _TOKEN.value or os.environ.get('HIAR_JAX_TOKEN') or None
  if token is None and not gate.is_local(_HOST.value):
    raise ValueError(
      f'--host={_HOST.value} lets others in: give a --token that they must show'
    )
  # Before the weights are read: whether the port is free is known at once.
  listening = server.bind(_HOST.value, _PORT.value)
  name = _PIPELINE.value or loading.known_names()[0]
  pipeline = _CHOICES.load(
    name, text_encoder=_TEXT_ENCODER.value, text_cache=_TEXT_CACHE.value
  )
  made_by = studio.Studio(
    pipeline,
    mode=_MODE.value,
    share_batch=_SHARE_BATCH.value,
    places=_SESSIONS.value,
  )
  if made_by.places < _SESSIONS.value:
    print(
      f'note: the device has room for {made_by.places} videos at a time, not '
      f'for --sessions={_SESSIONS.value}',
      file=sys.stderr,
    )
  limits = protocol.Limits(
    sessions=made_by.places,
    waiting=_WAITING.value,
    session_s=60 * _SESSION_MINUTES.value,
    sockets=_SOCKETS.value,
    upload_bytes=_UPLOAD_MB.value * 2**20,
    drain_s=_DRAIN_S.value,
  )
  rules = gate.Rules(_HOST.value, token, tuple(_ORIGIN.value))
  prompts = tuple(_PROMPT.value) or made_by.examples() or (_FALLBACK,)
  streaming.check_prompts(prompts)

  async def run():
    live = app.Live(maker.Maker(made_by, limits), rules, prompts=prompts)
    says = f'{pipeline!r}, mode {made_by.mode!r}: {made_by.reason}'
    await server.serve(live, listening, prompts[0], says=says)

    return live.maker.ready

  if not asyncio.run(run()):
    # A thread still compiles, and Python would wait for it.
    sys.stdout.flush()
    os._exit(0)


if __name__ == '__main__':
  errors.run_main(main)
