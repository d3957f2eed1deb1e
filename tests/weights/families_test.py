"""What weights were trained for: told by names, asked for, and overridden."""

import dataclasses

import numpy as np
import pytest

from hiar_jax.sampling import loading
from hiar_jax.weights import conversion_cache, families
from tests import fake_release

_LATENTS = (4, 4)


@pytest.mark.parametrize(
  ('name', 'family'),
  [
    ('jackyhate/HiAR/hiar.pt', 'hiar'),
    ('ckpts/hiar.pt', 'hiar'),
    ('gdhe17/Self-Forcing/checkpoints/self_forcing_dmd.pt', 'self-forcing'),
    ('checkpoints/self_forcing_sid.pt', 'self-forcing'),
    ('x/SelfForcing-Wan2.1-T2V-1.3B-Diffusers/transformer/a', 'self-forcing'),
    ('a/self_forcing_framewise.pt', 'self-forcing-framewise'),
    ('zhuhz22/Causal-Forcing/chunkwise/causal_forcing.pt', 'causal-forcing'),
    ('framewise/causal_forcing.pt', 'causal-forcing-framewise'),
    ('causal-forcing++/framewise-2step.pt', 'causal-forcing-2step'),
    ('causal-forcing++/framewise-1step.pt', 'causal-forcing-1step'),
    ('tianweiy/CausVid/autoregressive_checkpoint/model.pt', 'causvid'),
    (
      'CausVid/autoregressive_checkpoint_warp_4step_cfg2/model.pt',
      'causvid-4step',
    ),
    ('Wan2.1-T2V-14B-CausVid/model.pt', 'causvid-14b'),
    ('Wan21_CausVid_14B_T2V_lora_rank32.safetensors', 'causvid-14b'),
    ('Efficient-Large-Model/LongLive/models/longlive_base.pt', 'longlive'),
    ('Wan2_1-T2V-1_3B_fp8_e4m3fn.safetensors', 'wan2.1'),
    ('Wan2.1-T2V-14B/diffusion_pytorch_model.safetensors.index.json', 'wan2.1'),
    (
      '/home/me/.cache/huggingface/hub/models--gdhe17--Self-Forcing/snapshots/'
      'ab/checkpoints/model.pt',
      'self-forcing',
    ),
  ],
)
def test_a_release_is_told_by_what_it_is_called(name, family):
  found = families.recognise([name])
  assert found is not None and found[0].name == family


@pytest.mark.parametrize(
  'name',
  [
    *('model.pt', 'causal_forcing.pt', '/home/hiar_jax/weights/last/model.pt'),
    'hiar/runs/student/last/model.pt',
  ],
)
def test_what_names_do_not_tell_is_asked_for(name):
  assert families.recognise([name]) is None


def test_a_config_json_tells_of_the_base_alone_and_after_the_names():
  found = families.recognise(['a/model.pt'], is_base=True)
  assert found is not None and found[0].is_base
  found = families.recognise(['self_forcing/model.pt'], is_base=True)
  assert found is not None and found[0].name == 'self-forcing'


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('zhuhz22/Causal-Forcing/chunkwise/longvideo.pt', 'of Rolling Forcing'),
    ('checkpoints/rolling_forcing_dmd.pt', 'of Rolling Forcing'),
    ('Causal-Forcing/chunkwise/ar_diffusion.pt', 'of many steps'),
    ('tianweiy/CausVid/bidirectional_checkpoint2/model.pt', 'a bidirectional'),
    ('Wan2.1-T2V-14B-StepDistill-CfgDistill/model.pt', 'a bidirectional'),
    (
      'Wan21_CausVid_bidirect2_T2V_1_3B_lora_rank32.safetensors',
      'a bidirectional',
    ),
  ],
)
def test_what_makes_no_blocks_in_few_steps_is_refused_by_name(name, message):
  with pytest.raises(ValueError, match=message):
    families.recognise([name])


@pytest.fixture(scope='module')
def released(tmp_path_factory):
  """Folders of fakes: base/ whole, and students of the transformer alone."""
  root = tmp_path_factory.mktemp('releases')
  fake_release.write_release(root / 'base', 'wan')
  state = fake_release.state_dict('transformer', 'wan')
  for name in ('self_forcing_dmd', 'framewise-2step', 'longlive_base', 'mine'):
    fake_release.write(root / f'{name}.safetensors', state)
  folder = root / 'LongLive' / 'models'
  fake_release.write(folder / 'longlive_base.safetensors', state)
  # Told by what it holds: named as a pickle, and none.
  fake_release.write(folder / 'lora.pt', longlive_lora(state))
  causvid = 'Wan21_CausVid_14B_T2V_lora_rank32.safetensors'
  fake_release.write(root / 'loras' / causvid, causvid_lora(state))
  fake_release.write(root / 'loras' / 'style.safetensors', causvid_lora(state))
  return root


def longlive_lora(state):
  """As PEFT names it, alpha its rank: every matrix of every block."""
  rng = np.random.default_rng(2)
  arrays = {}
  for name, array in state.items():
    if name.startswith('blocks.') and array.ndim == 2:
      stem = f'base_model.model.{name.removesuffix(".weight")}'
      draw = lambda *shape: rng.normal(0, 0.1, shape).astype(np.float32)
      arrays[f'{stem}.lora_A.weight'] = draw(4, array.shape[1])
      arrays[f'{stem}.lora_B.weight'] = draw(array.shape[0], 4)
  return arrays


def causvid_lora(state):
  """As it was extracted: factors of matrices, differences of the rest."""
  rng = np.random.default_rng(3)
  draw = lambda *shape: rng.normal(0, 0.1, shape).astype(np.float32)
  arrays = {}
  for name, array in state.items():
    stem, _, last = f'diffusion_model.{name}'.rpartition('.')
    if last == 'bias':
      arrays[f'{stem}.diff_b'] = draw(*array.shape)
    elif array.ndim == 2 and last == 'weight':
      arrays[f'{stem}.lora_down.weight'] = draw(2, array.shape[1])
      arrays[f'{stem}.lora_up.weight'] = draw(array.shape[0], 2)
    elif last == 'weight':
      arrays[f'{stem}.diff'] = draw(*array.shape)
    elif last == 'modulation':
      arrays[f'{stem}.diff_m'] = draw(*array.shape)
  return arrays


def added(arrays, stem):
  """What a LoRA file adds to a matrix, [O, I]."""
  for up, down in (('lora_B', 'lora_A'), ('lora_up', 'lora_down')):
    if f'{stem}.{up}.weight' in arrays:
      return arrays[f'{stem}.{up}.weight'] @ arrays[f'{stem}.{down}.weight']
  raise AssertionError(stem)


@pytest.fixture
def load(released, tmp_path_factory, monkeypatch):
  """`loading.load` of a student with its base, through one cache."""
  monkeypatch.setenv('HIAR_JAX_CACHE', str(released / 'cache'))
  small = dataclasses.replace(
    conversion_cache._DEFAULT,
    latent_size=_LATENTS,
    compute_dtype='float32',
    attention='xla',
  )
  whole = conversion_cache.cached
  monkeypatch.setattr(
    conversion_cache,
    'cached',
    lambda *a, **kwargs: whole(*a, options=small, **kwargs),
  )

  def load(name, **kwargs):
    path = released / name
    if path.is_dir():
      return loading.load(path, **kwargs)
    path = path.with_name(f'{path.name}.safetensors')
    return loading.load(path, base=released / 'base', **kwargs)

  return load


def test_a_student_is_run_as_its_name_tells_and_a_line_says_so(load, capsys):
  pipe = load('self_forcing_dmd')
  assert (pipe.order, pipe.rollout.context) == ('block_first', 'clean')
  assert pipe.rollout.num_steps == 4
  said = capsys.readouterr().err
  assert said.count('\n') == 1
  assert 'Self-Forcing: block_first, ' in said
  assert "by the name 'self_forcing_dmd.safetensors'" in said


def test_each_family_has_its_own_window_sink_and_steps(load, capsys):
  long = load('longlive_base').rollout
  assert (long.window, long.sink) == (12, 3)
  assert 'with its lora.pt (loras=, --lora)' in capsys.readouterr().err
  few = load('framewise-2step').rollout
  assert (few.frames_per_block, few.num_steps) == (1, 2)
  assert few.of_block(0).num_steps == 4 and few.of_block(1).num_steps == 2


def test_longlive_is_its_base_with_the_lora_that_lies_beside_it(
  load, released, capsys
):
  plain = load('longlive_base')
  capsys.readouterr()
  pipe = load('LongLive/models/longlive_base')
  said = capsys.readouterr().err
  assert said.count('\n') == 1
  assert (
    'LongLive: block_first' in said and 'lora.pt beside it is merged' in said
  )
  state = fake_release.state_dict('transformer', 'wan')
  for name, path in (
    ('self_attn.q', 'self_attention/q'),
    ('ffn.0', 'ffn_in'),
  ):
    mine, base = (p.params['layers'] for p in (pipe, plain))
    for key in path.split('/'):
      mine, base = mine[key], base[key]
    expected = added(
      longlive_lora(state), f'base_model.model.blocks.1.{name}'
    ).T
    np.testing.assert_allclose(
      mine['kernel'][1] - base['kernel'][1], expected, atol=1e-5
    )


def test_the_lora_of_a_student_makes_the_base_that_student(
  load, released, capsys
):
  loras = released / 'loras'
  causvid = loras / 'Wan21_CausVid_14B_T2V_lora_rank32.safetensors'
  pipe = load('base', loras=[causvid, (loras / 'style.safetensors', 0.5)])
  said = capsys.readouterr().err
  assert 'CausVid, 14B: block_first' in said
  assert "by the name 'Wan21_CausVid_14B_T2V_lora_rank32.safetensors'" in said
  assert pipe.rollout.num_steps == 9
  state = fake_release.state_dict('transformer', 'wan')
  arrays = causvid_lora(state)
  stem = 'diffusion_model.blocks.1.cross_attn.o'
  read = pipe.params['layers']['cross_attention']['o']
  for mine, own, more in (
    (
      read['kernel'][1],
      state['blocks.1.cross_attn.o.weight'].T,
      added(arrays, stem).T,
    ),
    (
      read['bias'][1],
      state['blocks.1.cross_attn.o.bias'],
      arrays[f'{stem}.diff_b'],
    ),
  ):
    np.testing.assert_allclose(mine, own + 1.5 * more, atol=1e-5)
  # A student stays what it is, whatever is added to it.
  load('self_forcing_dmd', loras=[causvid])
  assert 'Self-Forcing: block_first' in capsys.readouterr().err


def test_a_student_whose_name_tells_nothing_is_asked_for(load, released):
  kept = set((released / 'cache').iterdir())
  with pytest.raises(ValueError, match=r'family= \(--family\), one of hiar'):
    load('mine')
  # Before anything is converted.
  assert set((released / 'cache').iterdir()) == kept
  with pytest.raises(ValueError, match="family='mine' is not one of"):
    load('mine', family='mine')
  assert load('mine', family='hiar').order == 'step_first'


def test_a_family_that_is_said_goes_before_names_and_configs(load, released):
  pipe = load('self_forcing_dmd', family='causvid')
  assert pipe.rollout.levels == (1.0, 0.757, 0.522, 0.0)
  made = conversion_cache.cached(
    released / 'self_forcing_dmd.safetensors', base=released / 'base'
  )
  assert loading.load(made, family='longlive').rollout.sink == 3


def test_any_value_of_a_family_can_be_chosen(load):
  pipe = load(
    'self_forcing_dmd',
    order='step_first',
    context='matched',
    window=9,
    sink=3,
    steps=(1000, 500),
    shift=8.0,
    height=32,
    width=64,
  )
  config = pipe.rollout
  assert (pipe.order, config.context) == ('step_first', 'matched')
  assert (config.window, config.sink) == (9, 3)
  assert config.levels == pytest.approx((1.0, 8 / 9, 0.0))
  assert pipe.frame_shape[0] / pipe.frame_shape[1] == 0.5
  assert load('self_forcing_dmd', steps=5).rollout.num_steps == 5
  one = load('self_forcing_dmd', frames_per_block=1).rollout
  assert one.frames_per_block == 1


@pytest.mark.parametrize(
  ('chosen', 'message'),
  [
    ({'order': 'first'}, "order='first' is not one of"),
    ({'window': 10}, 'window=10 is not a positive multiple'),
    ({'steps': 0}, r'steps=0 is not in 1\.\.1000'),
    ({'steps': (500, 1000)}, 'must fall strictly'),
    ({'shift': -1.0}, 'shift=-1.0 is not positive'),
    ({'height': 33}, 'height=33 is not a positive multiple of 4'),
  ],
)
def test_a_choice_that_does_not_fit_is_named(load, chosen, message):
  with pytest.raises(ValueError, match=message):
    load('self_forcing_dmd', **chosen)


def test_a_misspelt_choice_is_named(load):
  with pytest.raises(TypeError, match='windw'):
    load('self_forcing_dmd', windw=9)


def test_a_missing_part_names_the_base_that_has_it(released, monkeypatch):
  monkeypatch.setenv('HIAR_JAX_CACHE', str(released / 'cache'))
  monkeypatch.setitem(families.BASES, 24, 'Wan-AI/Tiny')
  with pytest.raises(FileNotFoundError, match="base='Wan-AI/Tiny'"):
    conversion_cache.cached(
      released / 'self_forcing_dmd.safetensors', needs=('vae',)
    )
