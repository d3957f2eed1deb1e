"""The text encoder against the public umT5."""

import functools

import jax
import numpy as np

from hiar_jax.models import umt5
from hiar_jax.weights import tables, umt5_tables
from tests.parity.golden_lib import FORWARD, cases, load, state_dict, stored


def _run():
  golden = load('umt5')
  config = umt5.UMT5Config(
    vocab_size=100,
    dim=32,
    ffn_dim=64,
    num_heads=4,
    attention_dim=32,
    num_layers=2,
  )
  params = tables.convert_state_dict(
    state_dict('umt5'),
    umt5_tables.RULES,
    jax.eval_shape(functools.partial(umt5.init, config), jax.random.key(0)),
  )
  # The module, because `encode` clears the padding that some arrays hold.
  encode = jax.jit(umt5.UMT5Encoder(config).apply)

  def hidden(suffix='', see_all=False):
    ids, mask = (golden[f'in/{name}{suffix}'] for name in ('ids', 'mask'))
    return encode({'params': params}, ids, (mask > 0) | see_all)

  def buckets(positions):
    return umt5.relative_buckets(positions, num_buckets=32, max_distance=128)

  bias = params['layers']['relative_bias'][0][buckets(np.arange(160))]
  return {
    'out/hidden': hidden(),
    'out/hidden_no_mask': hidden(see_all=True),
    'out/hidden_short': hidden('_short'),
    'out/hidden_padding_zeroed': jax.jit(umt5.encode, static_argnums=0)(
      config, params, golden['in/ids'], golden['in/mask']
    ),
    'out/bucket_of_relpos_-159..159': buckets(np.arange(-159, 160)),
    'out/block0_pos_bias_first_row': bias.T,
  }


CASES = cases('umt5', _run, stored('umt5', 'out/'), FORWARD)
