"""Which network a file of others is, and of what sizes.

That is told from the names of its arrays, not from the file's own name; sizes
come from a config.json beside it and else from the shapes.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax

from hiar_jax.denoiser import Denoiser
from hiar_jax.models import umt5, vae
from hiar_jax.models.config import WanConfig
from hiar_jax.weights import (
  foreign,
  safetensors_io,
  tables,
  umt5_tables,
  vae_tables,
  wrong_files,
)
from hiar_jax.weights.tables import Rule, Shape, Slot

KINDS = ('transformer', 'vae', 'text_encoder')
NAMINGS = ('wan', 'diffusers')

Config = WanConfig | vae.VAEConfig | umt5.UMT5Config

# What whole umT5 models have beside the encoder, and ComfyUI's files of it.
_NOT_ENCODER = re.compile(rf'decoder\.|lm_head\.|{foreign.TOKENIZER_ARRAY}$')
_FLOATS = ('float64', 'float32', 'float16', 'bfloat16')


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
  """One network in a foreign file.

  Attributes:
    kind: one of KINDS.
    naming: one of NAMINGS, of its arrays.
    config: its sizes.
    state: the file.
    slots: foreign name -> place in our tree; complete and of the right shapes.
    is_base_model: a transformer whose config.json is that of Wan2.1's own,
      which is no student.
  """

  kind: str
  naming: str
  config: Config
  state: foreign.StateDict
  slots: dict[str, Slot]
  is_base_model: bool = False


def open_network(
  path: pathlib.Path,
  *,
  member: str | None = None,
  head_dim: int = 128,
  latent_size: tuple[int, int] = (60, 104),
) -> Network:
  """Opens a file and checks every name and shape in it.

  Args:
    path: see `foreign.StateDict`.
    member: likewise.
    head_dim: width of a transformer's heads where no config.json tells their
      number; 128 in all of Wan2.1.
    latent_size: rows and columns of a transformer's latent frames, which its
      weights do not know.

  Raises:
    FileNotFoundError: if a file or a shard is missing.
    ValueError: naming every array that is unknown, missing or misshapen.
  """
  state = foreign.StateDict(path, member=member)
  kind, naming, rules = recognise(state)
  ours = tables.our_shapes(state.shapes, rules)
  known = _config_sizes(state.path, kind)
  config: WanConfig | vae.VAEConfig | umt5.UMT5Config
  try:
    if kind == 'vae':
      config = _vae_config(state, ours, known)
    elif kind == 'text_encoder':
      config = _umt5_config(ours, known)
    else:
      config = _wan_config(state, ours, known, head_dim, latent_size)
  except KeyError as error:
    name = _foreign_name(error.args[0], rules)
    raise ValueError(f'{name!r} is missing from {state.path}') from None
  expected = expected_slots(config, naming)
  problems = tables.mismatches(state.shapes, expected, state.files)
  problems += [
    f'{name!r} in {state.files[name]} is {dtype}, not one of {_FLOATS}'
    for name, dtype in state.dtypes.items()
    if str(dtype) not in _FLOATS
  ]
  if problems:
    raise ValueError(
      f'{state.path} is not what a {kind} needs: {tables.report(problems)}'
    )
  is_base = kind == 'transformer' and is_base_model(state.path)
  return Network(kind, naming, config, state, expected, is_base)


def is_base_model(path: pathlib.Path) -> bool:
  """Whether a config.json beside a transformer is that of Wan2.1's own."""
  known = _config_sizes(path, 'transformer')
  return bool(known) and _class_of(path) != 'CausalWanModel'


def config_head_dim(folder: pathlib.Path) -> int | None:
  """Width of a transformer's heads, from a config.json in a folder."""
  sizes = _config_sizes(folder / 'weights', 'transformer')
  if 'dim' not in sizes or 'num_heads' not in sizes:
    return None
  return sizes['dim'] // sizes['num_heads']


def recognise(state: foreign.StateDict) -> tuple[str, str, list[Rule]]:
  """Kind, naming and table of an open file.

  A prefix of all names, and what is no part of these networks, is taken off.

  Raises:
    ValueError: saying what the file is, if it is none of them.
  """
  state.rename(umt5_tables.ALIASES)
  while True:
    try:
      found = identify(state.shapes, state.path)
      break
    except ValueError:
      what = wrong_files.describe_arrays(state.shapes, state.dtypes)
      if what:
        raise ValueError(f'{state.path} is {what}') from None
      if not state.strip_prefix():
        raise
      state.rename(umt5_tables.ALIASES)
  what = wrong_files.describe_arrays(state.shapes, state.dtypes)
  if what:
    raise ValueError(f'{state.path} is {what}')
  if found[0] == 'text_encoder':
    for name in [n for n in state.shapes if _NOT_ENCODER.match(n)]:
      state.drop(name)
  return found


def identify(
  names: Mapping[str, Any], path: pathlib.Path
) -> tuple[str, str, list[Rule]]:
  """Kind, naming and table of a state dict: that which knows most names."""
  known = {}
  for kind, namings in _tables(names).items():
    for naming, rules in namings.items():
      hits = sum(
        any(tables.rule_matches(rule, name) for rule in rules) for name in names
      )
      known[kind, naming] = hits, rules
  (kind, naming), (hits, rules) = max(known.items(), key=lambda kv: kv[1][0])
  # Names such as norm.weight are anyone's.
  if hits < max(3, len(names) // 4):
    raise ValueError(
      f'{path} is no Wan2.1 transformer, VAE or umT5 encoder: it has '
      f'{sorted(names)[:3]} and {max(len(names) - 3, 0)} more'
    )
  return kind, naming, rules


@functools.cache
def abstract_params(config: Config) -> dict:
  """Shapes of a network's float32 parameters, without allocating them.

  Cached, and so not to be changed: tracing a network takes a second.
  """
  if isinstance(config, WanConfig):
    init = Denoiser(config).init
  else:
    module = vae if isinstance(config, vae.VAEConfig) else umt5
    init = functools.partial(module.init, config)
  return jax.eval_shape(init, jax.random.key(0))


def expected_slots(config: Config, naming: str) -> dict[str, Slot]:
  """Foreign names of a network's parameters and their places in our tree."""
  shapes = {
    path: leaf.shape
    for path, leaf in tables.flatten(abstract_params(config)).items()
  }
  if isinstance(config, vae.VAEConfig):
    rules = vae_tables.VAE_RULES
    if naming == 'diffusers':
      rules = vae_tables.diffusers_rules(
        len(config.dim_mult), config.num_res_blocks
      )
    return tables.slots(shapes, rules)
  kind = 'transformer' if isinstance(config, WanConfig) else 'text_encoder'
  patch = getattr(config, 'patch', (2, 2))
  return tables.slots(shapes, _tables({})[kind][naming], patch=patch)


def _tables(names: Mapping[str, Any]) -> dict[str, dict[str, list[Rule]]]:
  return {
    'transformer': {
      'wan': tables.WAN_RULES,
      'diffusers': tables.WAN_DIFFUSERS_RULES,
    },
    'vae': {
      'wan': vae_tables.VAE_RULES,
      'diffusers': vae_tables.diffusers_rules_of(names),
    },
    'text_encoder': {
      'wan': umt5_tables.RULES,
      'diffusers': umt5_tables.TRANSFORMERS_RULES,
    },
  }


# What a config.json calls a size -> what we call it.
_CONFIG_KEYS = {
  'transformer': {
    'dim': 'dim',
    'ffn_dim': 'ffn_dim',
    'num_heads': 'num_heads',
    'num_attention_heads': 'num_heads',
    'num_layers': 'num_layers',
    'in_dim': 'channels',
    'in_channels': 'channels',
    'freq_dim': 'freq_dim',
    'text_dim': 'text_dim',
    'text_len': 'text_len',
    'eps': 'eps',
  },
  'vae': {
    'base_dim': 'base_dim',
    'z_dim': 'z_dim',
    'dim_mult': 'dim_mult',
    'num_res_blocks': 'num_res_blocks',
    'temperal_downsample': 'temporal_downsample',
    'patch_size': 'patch_size',
    'latents_mean': 'mean',
    'latents_std': 'std',
  },
  'text_encoder': {
    'vocab_size': 'vocab_size',
    'd_model': 'dim',
    'd_ff': 'ffn_dim',
    'num_heads': 'num_heads',
    'num_layers': 'num_layers',
    'relative_attention_num_buckets': 'num_buckets',
    'relative_attention_max_distance': 'max_distance',
    'layer_norm_epsilon': 'eps',
  },
}
_CLASSES = {
  'transformer': ('WanModel', 'CausalWanModel', 'WanTransformer3DModel'),
  'vae': ('AutoencoderKLWan',),
  'text_encoder': ('umt5',),
}


def _class_of(path: pathlib.Path) -> str | None:
  """Whose config.json lies beside the weights."""
  file = path.with_name('config.json')
  if not file.exists():
    return None
  config = safetensors_io.read_json(file)
  return config.get('_class_name', config.get('model_type'))


def _config_sizes(path: pathlib.Path, kind: str) -> dict[str, Any]:
  """Our sizes from a config.json beside the weights, if it is theirs."""
  file = path.with_name('config.json')
  if not file.exists():
    return {}
  config = safetensors_io.read_json(file)
  if config.get('is_residual'):
    raise ValueError(
      f"{file} is of Wan2.2-TI2V-5B's VAE, whose network is not Wan2.1's; "
      "diffusers' AutoencoderKLWan reads it"
    )
  whose = _class_of(path)
  if whose not in _CLASSES[kind]:
    return {}
  sizes = {
    ours: config[theirs]
    for theirs, ours in _CONFIG_KEYS[kind].items()
    if config.get(theirs) is not None
  }
  for theirs in _CONFIG_KEYS[kind]:
    if isinstance(config.get(theirs), str | bool | Mapping):
      raise ValueError(f'{file}: {theirs}={config[theirs]!r} is no number')
  if 'attention_head_dim' in config:
    sizes['dim'] = config['attention_head_dim'] * sizes['num_heads']
  if 'd_kv' in config:
    sizes['attention_dim'] = config['d_kv'] * sizes['num_heads']
  if kind == 'transformer' and config.get('patch_size') is not None:
    sizes['patch'] = tuple(config['patch_size'][1:])
  return sizes


def _wan_config(
  state: foreign.StateDict,
  ours: Mapping[str, Shape],
  known: Mapping[str, Any],
  head_dim: int,
  latent_size: tuple[int, int],
) -> WanConfig:
  patches = state.shapes.get('patch_embedding.weight', ())
  if len(patches) != 5 or patches[2] != 1:
    raise ValueError(
      f"'patch_embedding.weight' in {state.path} has shape {patches}, not "
      '[dim, channels, 1, rows, columns]'
    )
  sizes: dict[str, Any] = {
    'dim': ours['patch_embedding/bias'][0],
    'channels': patches[1],
    'patch': patches[3:],
    'ffn_dim': ours['layers/ffn_in/bias'][1],
    'num_layers': ours['layers/ffn_in/bias'][0],
    'freq_dim': ours['time_in/kernel'][0],
    'text_dim': ours['text_in/kernel'][0],
    'latent_height': latent_size[0],
    'latent_width': latent_size[1],
  } | dict(known)
  if 'num_heads' not in sizes:
    if sizes['dim'] % head_dim:
      raise ValueError(
        f'{state.path}: {sizes["dim"]} channels are no heads of {head_dim}, '
        'and no config.json tells their number; give head_dim'
      )
    sizes['num_heads'] = sizes['dim'] // head_dim
  return WanConfig(**sizes)


def _vae_config(
  state: foreign.StateDict, ours: Mapping[str, Shape], known: Mapping[str, Any]
) -> vae.VAEConfig:
  wan = vae.VAEConfig.wan()
  sizes = vae_tables.infer_sizes(ours) | dict(known)
  if 'mean' not in sizes:
    if sizes['z_dim'] != wan.z_dim:
      raise ValueError(
        f'{state.path} has {sizes["z_dim"]} latent channels, not the '
        f'{wan.z_dim} of Wan2.1, and no config.json tells their mean and std'
      )
    sizes |= {'mean': wan.mean, 'std': wan.std}
  return vae.VAEConfig(**sizes)


def _umt5_config(
  ours: Mapping[str, Shape], known: Mapping[str, Any]
) -> umt5.UMT5Config:
  sizes = {
    'vocab_size': ours['token_embedding/embedding'][0],
    'dim': ours['token_embedding/embedding'][1],
    'ffn_dim': ours['layers/ffn_in/kernel'][2],
    'num_heads': ours['layers/relative_bias'][2],
    'attention_dim': ours['layers/q/kernel'][2],
    'num_layers': ours['layers/q/kernel'][0],
    'num_buckets': ours['layers/relative_bias'][1],
  }
  return umt5.UMT5Config(**(sizes | dict(known)))


def _foreign_name(path: str, rules: list[Rule]) -> str:
  """The name (of layer 0) that a path of ours has in a table."""
  for foreign_name, ours, _ in rules:
    for name in (path, f'{path}[0]'):
      fields = tables.match(ours, name)
      if fields is not None:
        return foreign_name.format(**fields)
  return path
