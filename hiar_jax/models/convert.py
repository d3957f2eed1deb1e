"""Tables that turn foreign state dicts into our parameter trees.

A rule is (regex, path, transform): the regex matches a whole foreign name,
the path (with its groups) is ours, the transform names a change of layout. A
path with '[i]' at its end is entry i of an array stacked on axis 0.
"""

import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np

Rule = tuple[str, str, str]

TRANSFORMS = {
  'keep': lambda w: w,
  # torch Linear [out, in] -> Dense kernel [in, out].
  'linear': lambda w: w.T,
  # torch Conv [out, in, *k] -> lax kernel [*k, in, out].
  'conv': lambda w: np.moveaxis(w, (0, 1), (-1, -2)),
  # Patch Conv3d [out, in, 1, ph, pw] -> Dense kernel [ph * pw * in, out].
  'patch': lambda w: np.moveaxis(w, (0, 1), (-1, -2)).reshape(-1, w.shape[0]),
  # Modulation [1, 6 or 2, dim] -> [6 or 2, dim].
  'drop_first': lambda w: w[0],
}


def _both(foreign: str, ours: str) -> list[Rule]:
  """Rules of a Linear: its weight and its bias."""
  ours, index = re.fullmatch(r'(.*?)(\[.*\])?', ours).groups()
  index = index or ''
  return [
    (rf'{foreign}\.weight', f'{ours}/kernel{index}', 'linear'),
    (rf'{foreign}\.bias', f'{ours}/bias{index}', 'keep'),
  ]


_BLOCK = r'blocks\.(\d+)'

WAN_RULES: list[Rule] = [
  (r'patch_embedding\.weight', 'patch_embedding/kernel', 'patch'),
  (r'patch_embedding\.bias', 'patch_embedding/bias', 'keep'),
  *_both(r'text_embedding\.0', 'text_in'),
  *_both(r'text_embedding\.2', 'text_out'),
  *_both(r'time_embedding\.0', 'time_in'),
  *_both(r'time_embedding\.2', 'time_out'),
  *_both(r'time_projection\.1', 'time_projection'),
  (rf'{_BLOCK}\.modulation', r'layers/modulation[\1]', 'drop_first'),
  (rf'{_BLOCK}\.norm3\.weight', r'layers/cross_norm/scale[\1]', 'keep'),
  (rf'{_BLOCK}\.norm3\.bias', r'layers/cross_norm/bias[\1]', 'keep'),
  *_both(rf'{_BLOCK}\.self_attn\.([qkvo])', r'layers/self_attention/\2[\1]'),
  (
    rf'{_BLOCK}\.self_attn\.norm_([qk])\.weight',
    r'layers/self_attention/norm_\2[\1]',
    'keep',
  ),
  *_both(rf'{_BLOCK}\.cross_attn\.([qo])', r'layers/cross_attention/\2[\1]'),
  (
    rf'{_BLOCK}\.cross_attn\.norm_q\.weight',
    r'layers/cross_attention/norm_q[\1]',
    'keep',
  ),
  (
    rf'{_BLOCK}\.cross_attn\.([kv])\.weight',
    r'text_kv/\2_kernel[\1]',
    'linear',
  ),
  (rf'{_BLOCK}\.cross_attn\.([kv])\.bias', r'text_kv/\2_bias[\1]', 'keep'),
  (rf'{_BLOCK}\.cross_attn\.norm_k\.weight', r'text_kv/norm_k[\1]', 'keep'),
  *_both(rf'{_BLOCK}\.ffn\.0', r'layers/ffn_in[\1]'),
  *_both(rf'{_BLOCK}\.ffn\.2', r'layers/ffn_out[\1]'),
  *_both(r'head\.head', 'head'),
  (r'head\.modulation', 'head_modulation', 'drop_first'),
]


def target(name: str, rules: Sequence[Rule]) -> tuple[str, int | None, str]:
  """Our path, stacked index or None, and transform of a foreign name.

  Raises:
    KeyError: if no rule or more than one matches.
  """
  hits = [
    (match.expand(path), transform)
    for regex, path, transform in rules
    if (match := re.fullmatch(regex, name))
  ]
  if len(hits) != 1:
    raise KeyError(f'{name!r} matches {len(hits)} rules')
  path, transform = hits[0]
  path, _, index = path.partition('[')
  return path, int(index[:-1]) if index else None, transform


def convert_state_dict(
  state_dict: Mapping[str, np.ndarray],
  rules: Sequence[Rule],
  abstract_params: dict,
) -> dict:
  """Builds our parameters from a foreign state dict.

  Args:
    state_dict: foreign name -> array.
    rules: table of the network, e.g. WAN_RULES.
    abstract_params: our tree of arrays or ShapeDtypeStructs.

  Returns:
    A tree of numpy arrays with the shapes and dtypes of `abstract_params`.

  Raises:
    ValueError: naming every unknown, missing or misshapen entry.
  """
  flat = {
    '/'.join(str(k.key) for k in path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params)
  }
  out = {name: np.zeros(a.shape, a.dtype) for name, a in flat.items()}
  filled = {
    name: np.zeros(a.shape[:1] if a.shape else (1,), bool)
    for name, a in flat.items()
  }
  problems = []
  for name, array in state_dict.items():
    try:
      path, index, transform = target(name, rules)
    except KeyError as error:
      problems.append(error.args[0])
      continue
    if path not in out:
      problems.append(f'{name!r}: this network has no {path!r}')
      continue
    where = ... if index is None else index
    if index is not None and index >= out[path].shape[0]:
      problems.append(f'{name!r}: {path!r} has {out[path].shape[0]} layers')
      continue
    value = TRANSFORMS[transform](np.asarray(array))
    if value.shape != out[path][where].shape:
      problems.append(
        f'{name!r}: shape {value.shape} where {path!r} has '
        f'{out[path][where].shape}'
      )
      continue
    out[path][where] = value
    filled[path][where] = True
  for name, done in filled.items():
    if not done.all():
      problems.append(f'{name!r} is missing')
  if problems:
    raise ValueError('weights do not fit: ' + '; '.join(problems))
  return unflatten(out)


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
