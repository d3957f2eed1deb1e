"""Releases of tiny networks in the layouts of others, of random numbers."""

import dataclasses
import json
import pathlib

import ml_dtypes
import numpy as np

from hiar_jax.models import umt5, vae
from hiar_jax.models.config import WanConfig
from hiar_jax.weights import identity, layouts, safetensors_io

WAN = vae.VAEConfig.wan()
CONFIGS = {
  'transformer': WanConfig(
    dim=24,
    ffn_dim=16,
    num_heads=2,
    num_layers=2,
    latent_height=4,
    latent_width=4,
    freq_dim=8,
    text_dim=16,
    text_len=8,
  ),
  # The 16 latent channels of Wan2.1, whose mean and std its layout implies.
  'vae': vae.VAEConfig(
    base_dim=4,
    z_dim=16,
    dim_mult=(1, 2),
    num_res_blocks=1,
    temporal_downsample=(True,),
    mean=WAN.mean,
    std=WAN.std,
  ),
  'text_encoder': umt5.UMT5Config(
    vocab_size=32,
    dim=16,
    ffn_dim=24,
    num_heads=2,
    attention_dim=16,
    num_layers=2,
  ),
}
PIECES = 290  # At most; 256 of them are bytes.
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def state_dict(
  kind: str, naming: str, dtype=np.float32, **changes
) -> dict[str, np.ndarray]:
  """Random weights of one network under others' names."""
  config = dataclasses.replace(CONFIGS[kind], **changes)
  rng = np.random.default_rng(len(kind))
  return {
    name: rng.normal(0, 0.2, slot.shape).astype(dtype)
    for name, slot in identity.expected_slots(config, naming).items()
  }


def write(path: pathlib.Path, arrays: dict, shard_bytes: int = 10**9) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  plan = {name: (a.shape, a.dtype) for name, a in arrays.items()}
  with safetensors_io.Writer(path, plan, shard_bytes=shard_bytes) as writer:
    for name, array in arrays.items():
      writer.write(name, array)


def write_release(
  folder: pathlib.Path,
  naming: str,
  *,
  dtypes: dict | None = None,
  shard_bytes: int = 10**9,
  changes: dict | None = None,
  write_tokenizer=None,
) -> dict[str, dict[str, np.ndarray]]:
  """Writes all parts and a tokenizer; kind -> state dict.

  Args:
    folder: of the release.
    naming: whose layout.
    dtypes: of a kind's weights; float32 unless given.
    shard_bytes: of the largest file.
    changes: of a kind's CONFIGS; None as a kind's: without it.
    write_tokenizer: into a folder; None: words.
  """
  states = {}
  for kind, config in CONFIGS.items():
    changed = (changes or {}).get(kind, {})
    if changed is None:
      continue
    config = dataclasses.replace(config, **changed)
    dtype = (dtypes or {}).get(kind, np.float32)
    states[kind] = state_dict(kind, naming, dtype, **changed)
    path = folder / layouts.FILES[naming][kind]
    write(path, states[kind], shard_bytes)
    written = layouts.config_of(config, naming)
    if written:
      path.with_name('config.json').write_text(json.dumps(written))
  place = 'tokenizer' if naming == 'diffusers' else 'google/umt5-xxl'
  (write_tokenizer or write_words)(folder / place)
  return states


def write_pieces(folder: pathlib.Path) -> None:
  """A sentencepiece model that falls back on bytes, as umT5's does."""
  import sentencepiece

  folder.mkdir(parents=True, exist_ok=True)
  texts = ['a red disc over dark blue', 'a cat and a dog'] * 4
  with (folder / 'spiece.model').open('wb') as file:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(texts),
      model_writer=file,
      vocab_size=PIECES,
      byte_fallback=True,
      hard_vocab_limit=False,
      pad_id=0,
      eos_id=1,
      unk_id=2,
      bos_id=-1,
      minloglevel=2,
    )


def write_words(folder: pathlib.Path) -> None:
  """A word-level tokenizer.json that ends a text with </s>, as umT5's does."""
  words = ['<pad>', '</s>', '<unk>', 'a', 'red', 'disc', 'cat', '&', 'dog']
  special = {'single_word': False, 'lstrip': False, 'rstrip': False}
  special |= {'normalized': False, 'special': True}
  tokenizer = {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': [
      {'id': i, 'content': words[i], **special} for i in range(3)
    ],
    'normalizer': None,
    'pre_tokenizer': {'type': 'WhitespaceSplit'},
    'post_processor': {
      'type': 'TemplateProcessing',
      'single': [
        {'Sequence': {'id': 'A', 'type_id': 0}},
        {'SpecialToken': {'id': '</s>', 'type_id': 0}},
      ],
      'pair': [
        {'Sequence': {'id': 'A', 'type_id': 0}},
        {'Sequence': {'id': 'B', 'type_id': 0}},
      ],
      'special_tokens': {
        '</s>': {'id': '</s>', 'ids': [1], 'tokens': ['</s>']}
      },
    },
    'decoder': None,
    'model': {
      'type': 'WordLevel',
      'vocab': {word: i for i, word in enumerate(words)},
      'unk_token': '<unk>',
    },
  }
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'tokenizer.json').write_text(json.dumps(tokenizer))


def bits(array: np.ndarray) -> np.ndarray:
  """The array's bits, for comparing NaN and -0 as well."""
  array = np.ascontiguousarray(array)
  return array.reshape(-1).view(np.uint8)
