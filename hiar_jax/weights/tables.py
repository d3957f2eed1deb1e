"""Tables between foreign state dicts and our parameter trees, both ways.

A rule is (foreign, ours, transform). Both names are templates over the same
fields: '{i}' is a number, '{qkvo}' one of these letters. '[{i}]' at the end of
ours is entry i of an array stacked on axis 0. The transform names a change of
layout, which has an inverse; a name matches one rule at most.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

Rule = tuple[str, str, str]
Shape = tuple[int, ...]

_FIELDS = {
  'i': r'\d+',
  'qkvo': '[qkvo]',
  'qkv': '[qkv]',
  'qk': '[qk]',
  'qo': '[qo]',
  'kv': '[kv]',
  'n': '[12]',
  'net': 'encoder|decoder',
}
# Reported one by one; a wrong file has hundreds.
_MAX_REPORTED = 20


@dataclasses.dataclass(frozen=True)
class _Transform:
  """A change of layout; `back` is told the size of a patch as well."""

  forward: Callable[[np.ndarray], np.ndarray]
  back: Callable[[np.ndarray, tuple[int, int]], np.ndarray]


def _conv_back(w: np.ndarray, patch: tuple[int, int]) -> np.ndarray:
  del patch
  return np.moveaxis(w, (-1, -2), (0, 1))


_TRANSFORMS = {
  'keep': _Transform(lambda w: w, lambda w, patch: w),
  # torch Linear [out, in] <-> Dense kernel [in, out].
  'linear': _Transform(lambda w: w.T, lambda w, patch: w.T),
  # torch Conv [out, in, *k] <-> lax kernel [*k, in, out].
  'conv': _Transform(lambda w: np.moveaxis(w, (0, 1), (-1, -2)), _conv_back),
  # Patch Conv3d [out, in, 1, ph, pw] <-> Dense kernel [ph * pw * in, out].
  'patch': _Transform(
    lambda w: np.moveaxis(w, (0, 1), (-1, -2)).reshape(-1, w.shape[0]),
    lambda w, patch: _conv_back(w.reshape(1, *patch, -1, w.shape[-1]), patch),
  ),
  # Modulation [1, 6 or 2, dim] <-> [6 or 2, dim].
  'drop_first': _Transform(lambda w: w[0], lambda w, patch: w[None]),
}


def linear(foreign: str, ours: str) -> list[Rule]:
  """Rules of a Linear: its weight and its bias."""
  name, bracket, index = ours.partition('[')
  return [
    (f'{foreign}.weight', f'{name}/kernel{bracket}{index}', 'linear'),
    (f'{foreign}.bias', f'{name}/bias{bracket}{index}', 'keep'),
  ]


# As released: diffusion_pytorch_model.safetensors, Self-Forcing's .pt.
WAN_RULES: list[Rule] = [
  ('patch_embedding.weight', 'patch_embedding/kernel', 'patch'),
  ('patch_embedding.bias', 'patch_embedding/bias', 'keep'),
  *linear('text_embedding.0', 'text_in'),
  *linear('text_embedding.2', 'text_out'),
  *linear('time_embedding.0', 'time_in'),
  *linear('time_embedding.2', 'time_out'),
  *linear('time_projection.1', 'time_projection'),
  ('blocks.{i}.modulation', 'layers/modulation[{i}]', 'drop_first'),
  ('blocks.{i}.norm3.weight', 'layers/cross_norm/scale[{i}]', 'keep'),
  ('blocks.{i}.norm3.bias', 'layers/cross_norm/bias[{i}]', 'keep'),
  *linear('blocks.{i}.self_attn.{qkvo}', 'layers/self_attention/{qkvo}[{i}]'),
  (
    'blocks.{i}.self_attn.norm_{qk}.weight',
    'layers/self_attention/norm_{qk}[{i}]',
    'keep',
  ),
  *linear('blocks.{i}.cross_attn.{qo}', 'layers/cross_attention/{qo}[{i}]'),
  (
    'blocks.{i}.cross_attn.norm_q.weight',
    'layers/cross_attention/norm_q[{i}]',
    'keep',
  ),
  ('blocks.{i}.cross_attn.{kv}.weight', 'text_kv/{kv}_kernel[{i}]', 'linear'),
  ('blocks.{i}.cross_attn.{kv}.bias', 'text_kv/{kv}_bias[{i}]', 'keep'),
  ('blocks.{i}.cross_attn.norm_k.weight', 'text_kv/norm_k[{i}]', 'keep'),
  *linear('blocks.{i}.ffn.0', 'layers/ffn_in[{i}]'),
  *linear('blocks.{i}.ffn.2', 'layers/ffn_out[{i}]'),
  *linear('head.head', 'head'),
  ('head.modulation', 'head_modulation', 'drop_first'),
]

# WanTransformer3DModel of diffusers.
WAN_DIFFUSERS_RULES: list[Rule] = [
  ('patch_embedding.weight', 'patch_embedding/kernel', 'patch'),
  ('patch_embedding.bias', 'patch_embedding/bias', 'keep'),
  *linear('condition_embedder.text_embedder.linear_1', 'text_in'),
  *linear('condition_embedder.text_embedder.linear_2', 'text_out'),
  *linear('condition_embedder.time_embedder.linear_1', 'time_in'),
  *linear('condition_embedder.time_embedder.linear_2', 'time_out'),
  *linear('condition_embedder.time_proj', 'time_projection'),
  ('blocks.{i}.scale_shift_table', 'layers/modulation[{i}]', 'drop_first'),
  # diffusers counts norms in order of use; Wan's norm3 is its norm2.
  ('blocks.{i}.norm2.weight', 'layers/cross_norm/scale[{i}]', 'keep'),
  ('blocks.{i}.norm2.bias', 'layers/cross_norm/bias[{i}]', 'keep'),
  *linear('blocks.{i}.attn1.to_{qkv}', 'layers/self_attention/{qkv}[{i}]'),
  *linear('blocks.{i}.attn1.to_out.0', 'layers/self_attention/o[{i}]'),
  (
    'blocks.{i}.attn1.norm_{qk}.weight',
    'layers/self_attention/norm_{qk}[{i}]',
    'keep',
  ),
  *linear('blocks.{i}.attn2.to_q', 'layers/cross_attention/q[{i}]'),
  *linear('blocks.{i}.attn2.to_out.0', 'layers/cross_attention/o[{i}]'),
  (
    'blocks.{i}.attn2.norm_q.weight',
    'layers/cross_attention/norm_q[{i}]',
    'keep',
  ),
  ('blocks.{i}.attn2.to_{kv}.weight', 'text_kv/{kv}_kernel[{i}]', 'linear'),
  ('blocks.{i}.attn2.to_{kv}.bias', 'text_kv/{kv}_bias[{i}]', 'keep'),
  ('blocks.{i}.attn2.norm_k.weight', 'text_kv/norm_k[{i}]', 'keep'),
  *linear('blocks.{i}.ffn.net.0.proj', 'layers/ffn_in[{i}]'),
  *linear('blocks.{i}.ffn.net.2', 'layers/ffn_out[{i}]'),
  *linear('proj_out', 'head'),
  ('scale_shift_table', 'head_modulation', 'drop_first'),
]


@dataclasses.dataclass(frozen=True)
class Slot:
  """The place of a foreign array in our tree.

  Attributes:
    path: of our array, 'layers/ffn_in/kernel'.
    index: on its first axis; None: all of it.
    transform: change of layout.
    shape: of the foreign array.
    patch: rows and columns of a patch of the transformer.
  """

  path: str
  index: int | None
  transform: str
  shape: Shape
  patch: tuple[int, int] = (2, 2)

  def to_ours(self, array: np.ndarray) -> np.ndarray:
    """The foreign array in our layout; a view where possible."""
    return _TRANSFORMS[self.transform].forward(array)

  def to_foreign(self, array: np.ndarray) -> np.ndarray:
    """Our array, or its entry `index`, in the foreign layout."""
    return _TRANSFORMS[self.transform].back(array, self.patch)


def target(name: str, rules: Sequence[Rule]) -> tuple[str, int | None, str]:
  """Our path, stacked index or None, and transform of a foreign name.

  Raises:
    KeyError: if no rule or more than one matches.
  """
  hits = [
    (ours.format(**fields), transform)
    for foreign, ours, transform in rules
    if (fields := match(foreign, name)) is not None
  ]
  if len(hits) != 1:
    raise KeyError(f'{name!r} matches {len(hits)} rules')
  path, transform = hits[0]
  path, _, index = path.partition('[')
  return path, int(index[:-1]) if index else None, transform


def slots(
  shapes: Mapping[str, Shape],
  rules: Sequence[Rule],
  *,
  patch: tuple[int, int] = (2, 2),
) -> dict[str, Slot]:
  """Every foreign name that a parameter tree stands for.

  Args:
    shapes: our path -> shape, see `flatten`.
    rules: table of the network.
    patch: rows and columns of a patch, for the transformer.

  Raises:
    KeyError: if a path has no rule or more than one.
  """
  stacked = {
    ours.partition('[')[0].format_map(fields)
    for _, ours, _ in rules
    if '[' in ours
    for fields in _choices(ours.partition('[')[0])
  }
  found = {}
  for path, shape in shapes.items():
    for index in range(shape[0]) if path in stacked else (None,):
      ours = path if index is None else f'{path}[{index}]'
      hits = [
        (foreign.format(**fields), transform)
        for foreign, template, transform in rules
        if (fields := match(template, ours)) is not None
      ]
      if len(hits) != 1:
        raise KeyError(f'{ours!r} matches {len(hits)} rules')
      name, transform = hits[0]
      # No memory behind it: only its shape is looked at.
      empty = np.broadcast_to(np.int8(0), shape if index is None else shape[1:])
      back = _TRANSFORMS[transform].back(empty, patch)
      found[name] = Slot(path, index, transform, back.shape, patch)
  return found


def our_shapes(
  foreign: Mapping[str, Shape], rules: Sequence[Rule]
) -> dict[str, Shape]:
  """Our path -> shape of those foreign arrays that the table knows.

  Args:
    foreign: name -> shape.
    rules: table of the network.

  Returns:
    Shapes as far as the names tell them: an array that is stacked here has as
    many layers as its highest number says.
  """
  found: dict[str, Shape] = {}
  for name, shape in foreign.items():
    try:
      path, index, transform = target(name, rules)
      empty = np.broadcast_to(np.int8(0), shape)
      shape = _TRANSFORMS[transform].forward(empty).shape
    except (KeyError, IndexError, ValueError):
      continue  # Unknown, or of a rank that the transform cannot take.
    if index is not None:
      layers = found.get(path, (0,))[0]
      shape = (max(layers, index + 1), *shape)
    found[path] = shape
  return found


def mismatches(
  stored: Mapping[str, Shape],
  expected: Mapping[str, Slot],
  where: Mapping[str, str] | str = 'the weights',
) -> list[str]:
  """Every foreign name that is unknown, missing or misshapen.

  Args:
    stored: foreign name -> shape.
    expected: from `slots`.
    where: the file, or that of each name.
  """

  def place(name):
    return where if isinstance(where, str) else where[name]

  files = ', '.join(
    [where] if isinstance(where, str) else sorted(set(where.values()))
  )
  return (
    [
      f'{name!r} in {place(name)} has shape {stored[name]}, not {slot.shape}'
      for name, slot in expected.items()
      if name in stored and stored[name] != slot.shape
    ]
    + [
      f'{name!r} is missing from {files}'
      for name in expected
      if name not in stored
    ]
    + [
      f'{name!r} in {place(name)} is unknown'
      for name in stored
      if name not in expected
    ]
  )


def report(problems: Sequence[str]) -> str:
  """All problems in one line, or the first ones and the number of the rest."""
  more = len(problems) - _MAX_REPORTED
  ending = [f'and {more} more'] if more > 0 else []
  return '; '.join([*problems[:_MAX_REPORTED], *ending])


def convert_state_dict(
  state_dict: Mapping[str, np.ndarray],
  rules: Sequence[Rule],
  abstract_params: dict,
  *,
  patch: tuple[int, int] = (2, 2),
) -> dict:
  """Builds our parameters from a foreign state dict that is in memory.

  Args:
    state_dict: foreign name -> array.
    rules: table of the network, e.g. WAN_RULES.
    abstract_params: our tree of arrays or ShapeDtypeStructs.
    patch: rows and columns of a patch, for the transformer.

  Returns:
    A tree of numpy arrays with the shapes and dtypes of `abstract_params`.

  Raises:
    ValueError: naming every unknown, missing or misshapen entry.
  """
  flat = flatten(abstract_params)
  expected = slots({k: a.shape for k, a in flat.items()}, rules, patch=patch)
  problems = mismatches(
    {name: np.shape(array) for name, array in state_dict.items()}, expected
  )
  if problems:
    raise ValueError(f'weights do not fit: {report(problems)}')
  out = {name: np.empty(a.shape, a.dtype) for name, a in flat.items()}
  for name, slot in expected.items():
    where = ... if slot.index is None else slot.index
    out[slot.path][where] = slot.to_ours(np.asarray(state_dict[name]))
  return unflatten(out)


def flatten(tree: Mapping) -> dict:
  """{'a': {'b': x}} to {'a/b': x}."""
  return {
    '/'.join(str(key.key) for key in path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def unflatten(flat: Mapping[str, np.ndarray]) -> dict:
  """{'a/b': x} to {'a': {'b': x}}."""
  tree: dict = {}
  for name, value in flat.items():
    *parents, leaf = name.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = value
  return tree


def rule_matches(rule: Rule, name: str) -> bool:
  """Whether the rule is for this foreign name."""
  return match(rule[0], name) is not None


def match(template: str, name: str) -> dict[str, str] | None:
  """The values of the template's fields in a name, None if it does not fit."""
  found = _compile(template).fullmatch(name)
  return None if found is None else found.groupdict()


@functools.cache
def _compile(template: str) -> re.Pattern:
  """The template as a regex with a named group for each field."""
  pieces = re.split(r'\{(\w+)\}', template)
  # Literals and fields take turns.
  return re.compile(
    ''.join(
      f'(?P<{piece}>{_FIELDS[piece]})' if i % 2 else re.escape(piece)
      for i, piece in enumerate(pieces)
    )
  )


def _choices(template: str) -> list[dict[str, str]]:
  """Every value of the one letter field that a path may have."""
  fields = re.findall(r'\{(\w+)\}', template)
  if not fields:
    return [{}]
  (field,) = fields
  return [{field: letter} for letter in _FIELDS[field].strip('[]')]
