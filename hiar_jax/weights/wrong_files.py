"""What a file is that is not what was hoped for, in words.

A download that went wrong leaves a page or a pointer under the name of the
weights, and many networks share the names of Wan2.1's arrays. Both are told
here by what they are, with what helps, instead of by the first byte or array
that does not fit.
"""

import json
import pathlib
import re
import zipfile
from collections.abc import Mapping
from typing import Any

_HEAD_BYTES = 2048
# Longer texts are no messages.
_MAX_TEXT = 100_000

_ZIP, _PICKLE = b'PK\x03\x04', b'\x80'
_STARTS = {
  b'GGUF': (
    'a GGUF file, quantised for llama.cpp and ComfyUI-GGUF, which read it; '
    'take the safetensors of the same release'
  ),
  b'\x1f\x8b': 'a gzip archive: unpack it first',
  b'7z\xbc\xaf': 'a 7z archive: unpack it first',
  b'Rar!': 'a rar archive: unpack it first',
  b'\x28\xb5\x2f\xfd': 'a zstd archive: unpack it first',
  b'\x89HDF': 'an HDF5 file; weights are read from safetensors and pickles',
  b'%PDF': 'a PDF',
  b'\x89PNG': 'a picture',
  b'\xff\xd8\xff': 'a picture',
}


def check(path: pathlib.Path) -> None:
  """Raises ValueError if a file's first bytes tell that it is no weights."""
  what = describe_bytes(path)
  if what:
    raise ValueError(f'{path} is {what}')


def describe_bytes(path: pathlib.Path) -> str | None:
  """What a file is that holds no weights, tokenizer or config; None: unknown.

  Args:
    path: of a file that exists.
  """
  size = path.stat().st_size
  with path.open('rb') as file:
    head = file.read(_HEAD_BYTES)
  if not size:
    return 'empty: its download did not begin'
  if not any(head):
    return (
      'zeros at its beginning: its download was not finished; fetch it again'
    )
  for start, what in _STARTS.items():
    if head.startswith(start):
      return what
  text = head.removeprefix(b'\xef\xbb\xbf').lstrip()
  if text.startswith(b'version https://git-lfs'):
    return (
      f'a Git LFS pointer of {size} bytes, not the file itself: run '
      "'git lfs pull' in that folder, or download the file"
    )
  if b'/annex/objects/' in head and size < _HEAD_BYTES:
    return "a git-annex pointer, not the file itself: run 'git annex get'"
  if re.match(rb'<(!doctype|html|head)', text, re.IGNORECASE):
    return (
      'an HTML page, not the file itself: its address was that of a page '
      'about the file, or of one that asks to log in'
    )
  if text.startswith(b'<?xml'):
    return f"an XML message of a server, not the file itself: '{_line(text)}'"
  if head.startswith(_ZIP) and not zipfile.is_zipfile(path):
    return (
      f'cut after {size} bytes: its download was not finished; fetch it again'
    )
  return None


def describe(path: pathlib.Path) -> str | None:
  """As `describe_bytes`, for a file that may be no text either."""
  return describe_bytes(path) or _describe_text(path)


def _describe_text(path: pathlib.Path) -> str | None:
  size = path.stat().st_size
  with path.open('rb') as file:
    head = file.read(_HEAD_BYTES)
  try:
    text = head.decode() if size < _MAX_TEXT else ''
  except UnicodeDecodeError:
    return None
  if text and all(c.isprintable() or c.isspace() for c in text):
    return f"a text, not weights: '{_line(head)}'"
  return None


def is_pickle(path: pathlib.Path) -> bool:
  """Whether the first bytes are those of a torch file, new or old."""
  if is_safetensors(path):
    return False  # Whose length may begin as a pickle does.
  with path.open('rb') as file:
    head = file.read(512)
  # Before torch 0.1.10 it was a tar archive.
  return head.startswith((_ZIP, _PICKLE)) or head[257:262] == b'ustar'


def is_safetensors(path: pathlib.Path) -> bool:
  """Whether a file begins as safetensors do: a length, then a JSON object."""
  with path.open('rb') as file:
    head = file.read(9)
  return (
    len(head) == 9
    and head[8:] == b'{'
    and int.from_bytes(head[:8], 'little') <= path.stat().st_size - 8
  )


def check_tokenizer(path: pathlib.Path) -> None:
  """Raises ValueError if the file of a tokenizer is something else.

  Args:
    path: tokenizer.json, or a sentencepiece model.
  """
  check(path)
  if path.suffix == '.json':
    try:
      model = json.loads(path.read_bytes()).get('model')
    except (ValueError, AttributeError) as error:
      raise ValueError(f'{path} is no tokenizer: {error}') from error
    if not isinstance(model, dict):
      raise ValueError(f"{path} is no tokenizer: it has no 'model'")
  elif what := _describe_text(path):
    raise ValueError(f'{path} is {what}')


_IMAGE = (
  'an image-to-video transformer, which takes a picture beside the noise and '
  "is not this network; diffusers' WanImageToVideoPipeline reads it"
)
_LORA = (
  'a LoRA: an addition to a network, not a network. Give the network as the '
  'weights, and this file as --lora, or as loras=[...] to hiar_jax.load'
)
_QUANTISED = 'take the bfloat16 or float16 file of the same release'
# What is found in names -> what that file is. The first that is there counts.
_NAMES = (
  (
    r'\.(lora_(A|B|up|down)|lora\.(up|down)|hada_w[12]_[ab]|lokr_w[12]|dora_'
    r'scale)(\.|$)|(^|\.)lora_unet_',
    _LORA,
  ),
  (
    r'\.(absmax|quant_map|quant_state\.\S+|SCB|nested_absmax)$',
    'quantised by bitsandbytes, which diffusers reads with it; ' + _QUANTISED,
  ),
  (
    r'\.(qweight|qzeros|wscales|smooth_factor)$',
    'quantised to integers (GPTQ, AWQ or SVDQuant); ' + _QUANTISED,
  ),
  (
    r'(^|\.)(scaled_fp8|scale_weight|scale_input|weight_scale|input_scale)$',
    'stored in scaled fp8 whose scales are of no float8 or int8 weight; '
    + _QUANTISED,
  ),
  (
    r'^(vace_blocks|vace_patch_embedding)\.',
    'a VACE transformer, which takes a video to edit beside the noise and is '
    "not this network; diffusers' WanVACEPipeline reads it",
  ),
  (
    r'^(casual_audio_encoder|audio_injector|audio_proj)\.',
    "a speech-to-video transformer; Wan2.2's own code reads it",
  ),
  (
    r'^(face_adapter|motion_encoder|pose_patch_embedding|face_encoder)\.',
    "an Animate transformer; diffusers' WanAnimatePipeline reads it",
  ),
  (
    r'^(control_adapter|ref_conv|control_blocks)\.',
    'a Wan-Fun transformer with controls beside the noise, which is not this '
    'network; VideoX-Fun reads it',
  ),
  (
    r'^(img_emb\.|condition_embedder\.image_embedder)|\.(k_img|add_k_proj)\.',
    _IMAGE,
  ),
  (
    r'^(encoder\.downsamples\.\d+\.downsamples|decoder\.upsamples\.\d+\.'
    r'upsamples)\.|^encoder\.down_blocks\.\d+\.resnets\.',
    "the VAE of Wan2.2-TI2V-5B (48 channels), whose network is not Wan2.1's; "
    "diffusers' AutoencoderKLWan reads it",
  ),
  (
    r'^(visual\.|vision_model\.|textual\.|log_scale$)',
    'a CLIP encoder, which only image-to-video networks need',
  ),
  (
    r'^(double_blocks|single_blocks|transformer_blocks|joint_blocks|'
    r'input_blocks)\.',
    'a transformer or U-Net of another family (Flux, Hunyuan, LTX, Stable '
    'Diffusion and others)',
  ),
)
_SECTIONS = re.compile(
  r'^(text_encoders|cond_stage_model|first_stage_model|vae|text_encoder)\.'
)


def describe_arrays(
  shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, Any]
) -> str | None:
  """What a state dict is that this library's networks do not read.

  Args:
    shapes: of arrays by their names, prefixes taken off.
    dtypes: likewise.

  Returns:
    What follows 'this file is'; None: nothing speaks against it.
  """
  sections = {m[1] for name in shapes if (m := _SECTIONS.match(name))}
  if sections and any(not _SECTIONS.match(name) for name in shapes):
    return (
      f'an all-in-one checkpoint (it has {sorted(sections)} beside the '
      'transformer), which ComfyUI reads; take the three files of the parts'
    )
  for pattern, what in _NAMES:
    if any(re.search(pattern, name) for name in shapes):
      return what
  attention = 'encoder.block.{}.layer.0.SelfAttention.{}.weight'.format
  bias = attention(1, 'relative_attention_bias')
  if attention(1, 'q') in shapes and bias not in shapes:
    return 'a T5 encoder; Wan2.1 has the umT5 one, with positions in each layer'
  kinds = {
    name: str(dtype) for name, dtype in dtypes.items() if name != 'spiece_model'
  }
  integers = sum(kind.startswith(('int', 'uint')) for kind in kinds.values())
  # One alone is a mistake, and is named by the check of every array.
  if integers > len(kinds) // 8:
    return (
      f'quantised: {integers} of {len(kinds)} arrays are integers; '
      + _QUANTISED
    )
  return _describe_inputs(shapes)


def _describe_inputs(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
  """A transformer that is told by how many channels go in and out."""
  patches = shapes.get('patch_embedding.weight', ())
  head = shapes.get('head.head.bias', shapes.get('proj_out.bias', ()))
  if len(patches) != 5 or len(head) != 1:
    return None
  channels = patches[1]
  out, rest = divmod(head[0], patches[2] * patches[3] * patches[4])
  if (channels, out) == (48, 48):
    return (
      'the transformer of Wan2.2-TI2V-5B, whose latents have 48 channels and '
      "are of another VAE; diffusers' WanPipeline reads it"
    )
  if rest or out == channels:
    return None
  if (channels, out) == (36, 16):
    return _IMAGE
  return (
    f'a transformer of {channels} input and {out} output channels: it takes '
    'controls or pictures beside the noise (as Wan-Fun and other variants do) '
    'and is not this network'
  )


def _line(text: bytes) -> str:
  """The beginning of a text, in one line."""
  words = ' '.join(text.decode(errors='replace').split())
  return words[:80] + ('...' if len(words) > 80 else '')
