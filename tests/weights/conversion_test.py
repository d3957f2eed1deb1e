"""Published weights: in, generated from, out again bit by bit, or named."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hiar_jax
from hiar_jax.models import umt5, vae
from hiar_jax.models.config import WanConfig
from hiar_jax.sampling import loading
from hiar_jax.text import tokens as text_tokens
from hiar_jax.text import umt5 as text_umt5
from hiar_jax.weights import (
  conversion,
  conversion_cache,
  foreign,
  hub,
  identity,
  layouts,
  releases,
  safetensors_io,
  tables,
  umt5_tables,
  vae_tables,
)
from tests import fake_release

OPTIONS = conversion.Options(
  latent_size=(4, 4), compute_dtype='float32', attention='xla'
)
# As some releases are: a transformer in bfloat16, a VAE in float32.
DTYPES = {
  'transformer': fake_release.BFLOAT16,
  'text_encoder': fake_release.BFLOAT16,
}


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
  reader = safetensors_io.Reader(path)
  return {name: reader.read(name) for name in reader.entries}


def assert_same_bits(found: dict, expected: dict) -> None:
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    assert found[name].dtype == array.dtype, name
    assert found[name].shape == array.shape, name
    np.testing.assert_array_equal(
      fake_release.bits(found[name]), fake_release.bits(array), err_msg=name
    )


def to_ours(source: pathlib.Path, out: pathlib.Path, **changes) -> None:
  options = dataclasses.replace(OPTIONS, **changes)
  conversion.to_ours(releases.find(source), out, name='tiny', options=options)


@pytest.mark.parametrize('naming', identity.NAMINGS)
@pytest.mark.parametrize('shard_bytes', [10**9, 3000])
def test_release_comes_back_bit_by_bit(tmp_path, naming, shard_bytes):
  states = fake_release.write_release(
    tmp_path / 'in', naming, dtypes=DTYPES, shard_bytes=shard_bytes
  )
  sharded = (tmp_path / 'in').rglob('*-00002-of-*')
  assert any(sharded) == (shard_bytes < 10**9)
  to_ours(tmp_path / 'in', tmp_path / 'ours', shard_bytes=shard_bytes)
  conversion.to_foreign(
    tmp_path / 'ours', tmp_path / 'out', naming=naming, shard_bytes=shard_bytes
  )
  for kind, state in states.items():
    path = tmp_path / 'out' / layouts.FILES[naming][kind]
    assert_same_bits(read(path), state)
    before = (tmp_path / 'in' / layouts.FILES[naming][kind]).with_name(
      'config.json'
    )
    if before.exists():
      after = path.with_name('config.json')
      assert json.loads(before.read_text()) == json.loads(after.read_text())


def test_both_namings_give_the_same_folder(tmp_path):
  fake_release.write_release(tmp_path / 'wan', 'wan', dtypes=DTYPES)
  to_ours(tmp_path / 'wan', tmp_path / 'a')
  conversion.to_foreign(
    tmp_path / 'a', tmp_path / 'diffusers', naming='diffusers'
  )
  to_ours(tmp_path / 'diffusers', tmp_path / 'b')
  for kind, file in layouts.OWN_FILES.items():
    assert_same_bits(read(tmp_path / 'b' / file), read(tmp_path / 'a' / file))
    # As the table that goes through memory has it.
    config = fake_release.CONFIGS[kind]
    state = read(tmp_path / 'wan' / layouts.FILES['wan'][kind])
    dtype = next(iter(state.values())).dtype
    tree = tables.convert_state_dict(
      state,
      {
        'transformer': tables.WAN_RULES,
        'vae': vae_tables.VAE_RULES,
        'text_encoder': umt5_tables.RULES,
      }[kind],
      {
        path: jax.ShapeDtypeStruct(leaf.shape, dtype)
        for path, leaf in tables.flatten(
          identity.abstract_params(config)
        ).items()
      },
    )
    assert_same_bits(read(tmp_path / 'a' / file), tables.flatten(tree))
  configs = [
    json.loads((tmp_path / name / 'config.json').read_text()) for name in 'ab'
  ]
  # diffusers has no such key; it is 512 in all of Wan2.1.
  assert [c['model'].pop('text_len') for c in configs] == [8, 512]
  assert configs[0] == configs[1]


@pytest.fixture(scope='module')
def released(tmp_path_factory):
  """A release in Wan2.1's layout, all float32; and a cache."""
  folder = tmp_path_factory.mktemp('released')
  fake_release.write_release(folder / 'wan', 'wan')
  to_ours(folder / 'wan', folder / 'ours')
  return folder


@pytest.mark.slow
def test_converted_release_makes_a_streamed_video(released):
  pipe = hiar_jax.load(released / 'ours')
  pipe = dataclasses.replace(
    pipe,
    rollout=dataclasses.replace(pipe.rollout, levels=(1.0, 0.5, 0.0), window=6),
  )
  stream = pipe.stream('a red  disc &amp;amp; a cat', mode='serial')
  blocks = [next(stream) for _ in range(2)]
  # 2x in time: 3 latent frames are 5 frames at first, then 6.
  assert [b.shape for b in blocks] == [(1, 5, 8, 8, 3), (1, 6, 8, 8, 3)]
  assert blocks[0].dtype == np.uint8
  video = np.concatenate(blocks, 1)
  assert len(np.unique(video)) > 50
  latents = np.concatenate(
    [pipe.encode(video[0, :1]), np.zeros((1, 2, 4, 4, 16), np.float32)], 1
  )
  # Streamed decoding is decoding at once.
  frames = pipe.decode(np.concatenate([latents, latents[:, ::-1]], 1))
  at_once = pipe.codec.decode(
    jnp.asarray(np.concatenate([latents, latents[:, ::-1]], 1))
  )
  np.testing.assert_allclose(
    frames / 127.5 - 1, np.asarray(at_once), atol=1.01 / 127.5
  )


def test_prompts_are_cleaned_cut_and_padded(released):
  tokenize = text_tokens.load_tokenizer(released / 'ours' / 'tokenizer')
  assert text_tokens.clean(' a \n&amp;amp;  red\t') == 'a & red'
  config = fake_release.CONFIGS['text_encoder']
  encoder = text_umt5.UMT5TextEncoder(
    config, released / 'ours' / 'text_encoder.safetensors', tokenize, length=4
  )
  ids, mask = encoder.ids('a red')
  assert (ids.tolist(), mask.tolist()) == ([3, 4, 1, 0], [1, 1, 1, 0])
  # The end of the text stays when it is cut.
  assert encoder.ids('a red disc cat dog')[0].tolist() == [3, 4, 5, 1]
  states = encoder.encode(['a red', ' a   red', ''])
  assert states.shape == (3, 4, 16)
  np.testing.assert_array_equal(states[0], states[1])
  assert states[0][:3].any(axis=1).all() and not states[0][3].any()
  assert states[2][0].any() and not states[2][1:].any()
  encoder.release()
  np.testing.assert_array_equal(encoder.encode(['red'])[0][2:], 0)
  small = dataclasses.replace(config, vocab_size=4)
  with pytest.raises(ValueError, match='token 4 of .a red. is not in the voc'):
    text_umt5.UMT5TextEncoder(small, {}, tokenize).ids('a red')


def test_sentencepiece_models_end_a_text_as_well(tmp_path):
  sentencepiece = pytest.importorskip('sentencepiece')
  corpus = tmp_path / 'corpus.txt'
  corpus.write_text('a red disc\na cat and a dog\nred dog\n' * 20)
  sentencepiece.SentencePieceTrainer.train(
    input=str(corpus),
    model_prefix=str(tmp_path / 'spiece'),
    vocab_size=18,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    minloglevel=2,
  )
  tokenize = text_tokens.load_tokenizer(tmp_path)
  ids = tokenize('a red dog')
  assert ids[-1] == 1 and 1 not in ids[:-1] and len(ids) > 2


def test_published_weights_are_converted_on_first_load(
  released, tmp_path, monkeypatch
):
  monkeypatch.setenv('HIAR_JAX_CACHE', str(tmp_path / 'cache'))
  made = conversion_cache.cached(released / 'wan', options=OPTIONS)
  stamp = (made / 'student.safetensors').stat().st_mtime_ns
  assert conversion_cache.cached(released / 'wan', options=OPTIONS) == made
  assert (made / 'student.safetensors').stat().st_mtime_ns == stamp
  assert [p.name for p in (tmp_path / 'cache').iterdir()] == [made.name]
  # Other options, or another file, and it is converted anew.
  other = dataclasses.replace(OPTIONS, dtype='bfloat16')
  assert conversion_cache.cached(released / 'wan', options=other) != made
  config = released / 'wan' / 'config.json'
  config.write_text(config.read_text() + ' ')
  assert conversion_cache.cached(released / 'wan', options=OPTIONS) != made


def test_load_reads_a_hubs_release_through_the_cache(
  released, tmp_path, monkeypatch
):
  hub = pytest.importorskip('huggingface_hub')
  monkeypatch.setenv('HIAR_JAX_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  asked = []

  def snapshot_download(name, **options):
    asked.append((name, options['local_files_only']))
    return str(released / 'wan')

  monkeypatch.setattr(hub, 'snapshot_download', snapshot_download)
  pipe = hiar_jax.load('Somebody/Tiny-Wan')
  assert asked == [('Somebody/Tiny-Wan', True)]
  assert pipe.denoiser.config.dim == 24
  # What full-size weights run in.
  assert pipe.params['head']['kernel'].dtype == jnp.bfloat16


def test_a_hubs_release_that_is_not_there_is_named(tmp_path, monkeypatch):
  pytest.importorskip('huggingface_hub')
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path))
  with pytest.raises(ValueError, match="'no/such'.*HF_HUB_OFFLINE is set"):
    hub.download('no/such')


def test_weights_without_vae_take_the_bases(released, tmp_path, monkeypatch):
  monkeypatch.setenv('HIAR_JAX_CACHE', str(tmp_path / 'cache'))
  state = fake_release.state_dict('transformer', 'wan')
  state['head.head.bias'] += 1
  # No config.json beside it: the base tells the number of heads.
  path = tmp_path / 'alone' / 'student.safetensors'
  fake_release.write(path, state)
  made = conversion_cache.cached(path, base=released / 'wan', options=OPTIONS)
  assert_same_bits(
    {'bias': read(made / 'student.safetensors')['head/bias']},
    {'bias': state['head.head.bias']},
  )
  assert_same_bits(
    read(made / 'vae.safetensors'), read(released / 'ours/vae.safetensors')
  )
  with pytest.raises(ValueError, match='24 channels are no heads of 128'):
    conversion_cache.cached(path, options=OPTIONS)


def _change(kind: str, edit):
  """A release of which one state dict is changed before it is written."""

  def damage(folder: pathlib.Path):
    path = folder / layouts.FILES['wan'][kind]
    state = read(path)
    edit(state)
    fake_release.write(path, state)

  return damage


def _several_wrong(state):
  del state['blocks.1.ffn.0.bias']
  state['blocks.0.cross_attn.q.weight'] = np.zeros((24, 23), np.float32)
  state['img.proj.0.weight'] = np.zeros(3, np.float32)


def _unreadable_config(folder):
  (folder / 'config.json').write_text('{')


@pytest.mark.parametrize(
  ('damage', 'messages'),
  [
    (
      _change('transformer', _several_wrong),
      [
        "'blocks.1.ffn.0.bias' is missing from .*diffusion_pytorch_model",
        r"'blocks.0.cross_attn.q.weight' in .* has shape \(24, 23\), not "
        r'\(24, 24\)',
        "'img.proj.0.weight' in .*diffusion_pytorch_model.* is unknown",
      ],
    ),
    (
      _change('transformer', lambda s: s.pop('text_embedding.0.weight')),
      ["'text_embedding.0.weight' is missing from"],
    ),
    (
      _change(
        'transformer',
        lambda s: [s.pop(k) for k in list(s) if k.startswith('blocks.1.')],
      ),
      # Its config.json says that there are two.
      ["'blocks.1.modulation' is missing"],
    ),
    (
      _change('vae', lambda s: s.pop('decoder.head.2.bias')),
      ["'decoder.head.2.bias' is missing from .*Wan2.1_VAE"],
    ),
    (
      _change(
        'text_encoder',
        lambda s: s.update({'norm.weight': s['norm.weight'].astype(np.int8)}),
      ),
      ["'norm.weight' in .*models_t5.* is int8, not one of"],
    ),
    (
      _change('vae', lambda s: (s.clear(), s.update(x=np.zeros(3)))),
      [r"Wan2.1_VAE.* is no Wan2.1 transformer, VAE or umT5.*\['x'\]"],
    ),
    (_unreadable_config, ['config.json is not JSON']),
  ],
)
def test_what_is_wrong_with_a_release_is_named(tmp_path, damage, messages):
  fake_release.write_release(tmp_path / 'in', 'wan')
  damage(tmp_path / 'in')
  with pytest.raises(ValueError) as caught:
    to_ours(tmp_path / 'in', tmp_path / 'out')
  for message in messages:
    caught.match(message)
  assert '\n' not in str(caught.value)
  # Checked before anything is written.
  assert not (tmp_path / 'out').exists()


def test_a_missing_shard_is_named(tmp_path):
  fake_release.write_release(tmp_path / 'in', 'diffusers', shard_bytes=3000)
  (shard,) = (tmp_path / 'in' / 'vae').glob('*-00002-of-*')
  shard.unlink()
  with pytest.raises(FileNotFoundError, match=str(shard)):
    to_ours(tmp_path / 'in', tmp_path / 'out')


def test_layers_of_different_dtypes_need_a_choice(tmp_path):
  state = fake_release.state_dict('transformer', 'wan')
  state['blocks.1.ffn.0.bias'] = state['blocks.1.ffn.0.bias'].astype(np.float16)
  fake_release.write(tmp_path / 'in' / 'a.safetensors', state)
  with pytest.raises(ValueError, match='layers/ffn_in/bias have different'):
    to_ours(tmp_path / 'in', tmp_path / 'out', head_dim=12)
  to_ours(tmp_path / 'in', tmp_path / 'out', head_dim=12, dtype='float32')
  assert read(tmp_path / 'out/student.safetensors')['head/bias'].dtype == 'f4'


def test_nothing_there_and_several_there_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='no file or folder'):
    releases.find(tmp_path / 'nowhere')
  with pytest.raises(ValueError, match='no weights in'):
    releases.find(tmp_path)
  state = fake_release.state_dict('transformer', 'wan')
  for name in ('a.safetensors', 'b.safetensors'):
    fake_release.write(tmp_path / name, state)
  with pytest.raises(ValueError, match='more than one set.*a.safet.*b.safet'):
    releases.find(tmp_path)


def _open_pickle(folder):
  (folder / 'x.pt').write_bytes(b'\x80\x02.')
  releases.find(folder / 'x.pt')


def _ask_hub(folder):
  hub.download('some/body')


def _read_tokenizer(folder):
  fake_release.write_words(folder)
  text_tokens.load_tokenizer(folder)


def _read_pieces(folder):
  (folder / 'spiece.model').write_bytes(b'\n\x0e')
  text_tokens.load_tokenizer(folder)


@pytest.mark.parametrize(
  ('package', 'use'),
  [
    ('torch', _open_pickle),
    ('huggingface_hub', _ask_hub),
    ('tokenizers', _read_tokenizer),
    ('sentencepiece', _read_pieces),
  ],
)
def test_a_package_that_is_not_installed_is_named(
  tmp_path, monkeypatch, package, use
):
  monkeypatch.setitem(sys.modules, package, None)  # Its import fails.
  with pytest.raises(ValueError, match=r"pip install 'hiar_jax\[convert\]'"):
    use(tmp_path)


def test_a_disk_that_is_too_small_is_named(released, tmp_path, monkeypatch):
  monkeypatch.setattr(
    'shutil.disk_usage', lambda path: types.SimpleNamespace(free=10)
  )
  release = releases.find(released / 'wan')
  with pytest.raises(ValueError, match='out has 0.0 GB free, and 0.0 GB are'):
    conversion.to_ours(release, tmp_path / 'out', name='x', options=OPTIONS)
  assert not any((tmp_path / 'out').iterdir())


def test_a_part_of_the_wrong_kind_is_named(released):
  wrong = releases.Release(vae=releases.find(released / 'wan').transformer)
  with pytest.raises(ValueError, match='is a transformer, not a vae'):
    conversion.open_networks(wrong, OPTIONS)


def test_other_latents_do_not_fit_wans_layout():
  cfg = fake_release.CONFIGS['vae']
  other = dataclasses.replace(cfg, mean=(0.0,) * 16)
  with pytest.raises(ValueError, match='no place for the mean and std'):
    layouts.config_of(other, 'wan')
  assert layouts.config_of(other, 'diffusers')['latents_mean'] == [0.0] * 16


@pytest.mark.parametrize(
  ('name', 'cleaned'),
  [
    ('model.blocks.0.ffn.0.weight', 'blocks.0.ffn.0.weight'),
    ('module.model.head.head.bias', 'head.head.bias'),
    (
      'model._fsdp_wrapped_module.blocks.3._fsdp_wrapped_module.'
      '_checkpoint_wrapped_module.self_attn.q.weight',
      'blocks.3.self_attn.q.weight',
    ),
    ('_orig_mod.model.patch_embedding.weight', 'patch_embedding.weight'),
    ('model.diffusion_model.patch_embedding.bias', 'patch_embedding.bias'),
    ('encoder.block.0.layer.0.layer_norm.weight',) * 2,
    ('my_model.x',) * 2,
  ],
)
def test_wrappers_leave_no_trace_in_names(name, cleaned):
  assert foreign.clean_name(name) == cleaned


@pytest.mark.parametrize(
  'config',
  [
    WanConfig.wan_1_3b(),
    WanConfig.wan_14b(),
    vae.VAEConfig.wan(),
    umt5.UMT5Config.xxl(),
  ],
  ids=['1.3B', '14B', 'VAE', 'umT5'],
)
def test_full_size_shapes_are_told_from_the_names_alone(config):
  """Nothing is allocated: 14B would be 57 GB."""
  abstract = tables.flatten(identity.abstract_params(config))
  shapes = {path: leaf.shape for path, leaf in abstract.items()}
  for naming in identity.NAMINGS:
    slots = identity.expected_slots(config, naming)
    foreign_shapes = {name: slot.shape for name, slot in slots.items()}
    _, found, rules = identity.identify(foreign_shapes, pathlib.Path('x'))
    assert found == naming
    assert tables.our_shapes(foreign_shapes, rules) == shapes
    assert not tables.mismatches(foreign_shapes, slots)
    filled = {(slot.path, slot.index) for slot in slots.values()}
    assert len(filled) == len(slots)


def test_defaults_are_those_of_the_full_size_config():
  from hiar_jax.configs import hiar_1_3b

  config = hiar_1_3b.get_config()
  for section, values in conversion.DEFAULTS.items():
    assert config[section].to_dict() == values, section


def test_the_program_converts_and_names_mistakes(released, tmp_path):
  out = tmp_path / 'ours'
  program = [sys.executable, 'launch/convert_checkpoint.py']
  root = pathlib.Path(hiar_jax.__file__).parents[1]
  run = lambda *flags: subprocess.run(
    [*program, *flags], cwd=root, capture_output=True, text=True
  )
  flags = [f'--weights={released / "wan"}', '--height=32', '--width=32']
  done = run(*flags, f'--out={out}')
  assert not done.returncode, done.stderr
  assert 'student.safetensors' in done.stdout
  assert loading.load(out).frame_shape == (8, 8, 3)
  again = run(*flags, f'--out={out}')
  assert again.returncode == 2
  assert again.stderr == f'error: --out={out} is not empty\n'
  (config,) = [json.loads((out / 'config.json').read_text())]
  assert config['weights_dtype'] == 'bfloat16'
