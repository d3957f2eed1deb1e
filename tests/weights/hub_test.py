"""What is fetched from a hub: of a repository's files those that are read."""

import types

import pytest

from hiar_jax.sampling import loading
from hiar_jax.weights import conversion, hub, releases
from tests import fake_release

huggingface_hub = pytest.importorskip('huggingface_hub')

GB = 10**9
WAN = {
  'README.md': 1,
  'config.json': 1,
  'diffusion_pytorch_model.safetensors': 6 * GB,
  'Wan2.1_VAE.pth': GB,
  'models_t5_umt5-xxl-enc-bf16.pth': 11 * GB,
  'models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth': 5 * GB,
  'google/umt5-xxl/tokenizer.json': 1,
  'google/umt5-xxl/spiece.model': 1,
  'assets/a.json': 1,
  'examples/cat.png': 1,
}
DIFFUSERS = {
  'model_index.json': 1,
  'scheduler/scheduler_config.json': 1,
  'transformer/config.json': 1,
  'transformer/diffusion_pytorch_model.safetensors.index.json': 1,
  'transformer/diffusion_pytorch_model-00001-of-00002.safetensors': GB,
  'transformer/diffusion_pytorch_model-00002-of-00002.safetensors': GB,
  'transformer/diffusion_pytorch_model.bin': GB,
  'transformer/diffusion_pytorch_model.fp16.safetensors': GB,
  'vae/config.json': 1,
  'vae/diffusion_pytorch_model.safetensors': GB,
  'text_encoder/config.json': 1,
  'text_encoder/model.safetensors': GB,
  'tokenizer/spiece.model': 1,
  'tokenizer/special_tokens_map.json': 1,
  'image_encoder/model.safetensors': GB,
}


def test_of_wans_layout_what_is_read_is_chosen():
  assert set(WAN) - set(hub.choose(WAN, 'a/b')) == {
    'README.md',
    'models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth',
    'assets/a.json',
    'examples/cat.png',
  }


def test_of_several_formats_and_precisions_one_is_chosen():
  assert set(DIFFUSERS) - set(hub.choose(DIFFUSERS, 'a/b')) == {
    'model_index.json',
    'scheduler/scheduler_config.json',
    'transformer/diffusion_pytorch_model.bin',
    'transformer/diffusion_pytorch_model.fp16.safetensors',
    'image_encoder/model.safetensors',
  }


@pytest.mark.parametrize(
  'sizes',
  [
    {'t2v_fp16.safetensors': 28 * GB, 'i2v_fp16.safetensors': 32 * GB},
    {
      'split_files/diffusion_models/t2v_fp16.safetensors': 28 * GB,
      'split_files/diffusion_models/i2v_fp16.safetensors': 32 * GB,
    },
  ],
)
def test_of_many_networks_one_is_to_be_named(sizes):
  with pytest.raises(ValueError) as caught:
    hub.choose(sizes, 'a/b')
  caught.match(r'a/b holds several networks \(60 GB\); name one: ')
  caught.match(r'a/b/\S*t2v_fp16.safetensors \(28.0 GB\)')
  name = next(iter(sizes))
  assert hub.choose(sizes, 'a/b', name) == [name]
  assert hub.is_name(f'a/b/{name}')


def test_two_experts_are_refused_before_they_are_fetched():
  sizes = {
    'high_noise_model/config.json': 1,
    'high_noise_model/x.safetensors': 28 * GB,
    'low_noise_model/config.json': 1,
    'low_noise_model/x.safetensors': 28 * GB,
    'Wan2.1_VAE.pth': GB,
  }
  with pytest.raises(ValueError, match='Give a/b/high_noise_model or a/b/low_'):
    hub.choose(sizes, 'a/b')
  assert hub.choose(sizes, 'a/b', as_base=True) == ['Wan2.1_VAE.pth']
  assert hub.choose(sizes, 'a/b', 'low_noise_model') == [
    'low_noise_model/config.json',
    'low_noise_model/x.safetensors',
  ]


def test_of_a_base_only_the_parts_that_are_lacking_are_fetched():
  has = ('transformer',)
  chosen = hub.choose(WAN, 'a/b', as_base=True, has=has)
  assert 'config.json' in chosen and 'Wan2.1_VAE.pth' in chosen
  assert not [f for f in chosen if f.startswith('diffusion_pytorch_model')]
  chosen = hub.choose(DIFFUSERS, 'a/b', as_base=True, has=has)
  assert [f for f in chosen if f.startswith('transformer/')] == [
    'transformer/config.json'
  ]
  chosen = hub.choose(
    DIFFUSERS, 'a/b', as_base=True, has=('transformer', 'text_encoder')
  )
  assert [f for f in chosen if hub._is_weights(f)] == [
    'vae/diffusion_pytorch_model.safetensors'
  ]
  # Several transformers in one folder are then no question.
  sizes = WAN | {'another.safetensors': 28 * GB}
  assert hub.choose(sizes, 'a/b', has=has) == hub.choose(WAN, 'a/b', has=has)


@pytest.mark.parametrize('naming', ['wan', 'diffusers'])
def test_a_training_s_weights_take_their_heads_from_a_base_without_weights(
  naming, tmp_path
):
  fake_release.write_release(tmp_path, naming)
  folder = tmp_path if naming == 'wan' else tmp_path / 'transformer'
  for file in folder.glob('diffusion_pytorch_model*'):
    file.unlink()
  base = releases.locate(tmp_path, as_base=True)
  assert base.transformer is None and base.vae is not None
  assert releases.head_dim(base) == 12


class _Api:
  sizes = WAN

  def model_info(self, name, files_metadata):
    assert files_metadata
    files = [
      types.SimpleNamespace(rfilename=f, size=n) for f, n in self.sizes.items()
    ]
    return types.SimpleNamespace(siblings=files, sha='abc')


def test_the_size_is_asked_for_before_anything_is_fetched(
  tmp_path, monkeypatch, capsys
):
  asked = {}

  def snapshot_download(name, **options):
    asked.update(options, name=name)
    return str(tmp_path)

  monkeypatch.delenv('HF_HUB_OFFLINE', raising=False)
  monkeypatch.setattr(huggingface_hub, 'HfApi', _Api)
  monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
  free = types.SimpleNamespace(free=100 * GB)
  monkeypatch.setattr('shutil.disk_usage', lambda path: free)
  assert hub.download('a/b') == tmp_path
  assert asked['allow_patterns'] == hub.choose(WAN, 'a/b')
  # The files that the list was of, should the branch move meanwhile.
  assert asked['revision'] == 'abc'
  assert 'fetching 6 of 10 files of a/b, 18.0 GB' in capsys.readouterr().err
  asked.clear()
  free.free = 10 * GB
  with pytest.raises(ValueError, match='a/b needs 18.0 GB, and .* has 10.0 GB'):
    hub.download('a/b')
  assert not asked


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
  monkeypatch.delenv('HF_HUB_OFFLINE', raising=False)
  api = huggingface_hub.HfApi(endpoint='http://127.0.0.1:9')
  monkeypatch.setattr(huggingface_hub, 'HfApi', lambda: api)
  with pytest.raises(
    ValueError, match="'a/b' is no folder here, and no releas"
  ):
    hub.download('a/b')


def test_a_bug_on_the_way_to_the_hub_is_not_hidden(monkeypatch):
  class Api:
    def model_info(self, *unused, **unused_too):
      raise RuntimeError('a bug')

  monkeypatch.delenv('HF_HUB_OFFLINE', raising=False)
  monkeypatch.setattr(huggingface_hub, 'HfApi', Api)
  with pytest.raises(RuntimeError, match='a bug'):
    hub.download('a/b')


def _cached(tmp_path, monkeypatch):
  """A hub's cache with the files of a release, and a list with one more."""
  folder = tmp_path / 'hub' / 'models--a--b'
  (folder / 'refs').mkdir(parents=True)
  (folder / 'refs' / 'main').write_text('abc')
  snapshot = folder / 'snapshots' / 'abc'
  fake_release.write_release(snapshot, 'wan')
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  monkeypatch.setattr(
    huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'hub')
  )
  return snapshot


def test_offline_a_file_that_is_not_needed_may_be_missing(
  tmp_path, monkeypatch
):
  snapshot = _cached(tmp_path, monkeypatch)

  def incomplete(name, **options):
    assert options['local_files_only']
    error = ValueError('1 file(s) are missing (assets/a.json)')
    error.snapshot_path = str(snapshot)
    raise error

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', incomplete)
  release = releases.locate('a/b')
  assert release.transformer and release.vae and release.tokenizer


def test_offline_what_is_missing_is_named_before_converting(
  tmp_path, monkeypatch
):
  monkeypatch.setenv('HIAR_JAX_CACHE', str(tmp_path / 'cache'))
  snapshot = _cached(tmp_path, monkeypatch)
  (snapshot / 'Wan2.1_VAE.safetensors').unlink()
  monkeypatch.setattr(
    huggingface_hub, 'snapshot_download', lambda *a, **k: str(snapshot)
  )
  called = []
  monkeypatch.setattr(conversion, 'to_ours', lambda *a, **k: called.append(a))
  with pytest.raises(FileNotFoundError) as caught:
    loading.load('a/b')
  caught.match('a/b: no vae. Looked for vae/, Wan2.1_VAE')
  caught.match('the other parts are in .*models--a--b/snapshots')
  assert not called


def test_a_local_path_with_a_mistake_in_it_is_not_asked_of_a_hub(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'runs').mkdir()
  assert not hub.is_name('runs/distill/student.safetensors')
  assert not hub.is_name('./a/b') and not hub.is_name('../a')
  assert hub.is_name('a/b')
