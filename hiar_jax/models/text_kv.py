"""What cross-attention reads of a prompt, projected once for all layers."""

# B batch, L text tokens, D width, H heads, K head width, N layers, E out

import flax.struct
import jax
from flax import linen as nn

from hiar_jax.models import dense, quantised, sharding
from hiar_jax.models.config import WanConfig
from hiar_jax.models.norms import rms_norm


@flax.struct.dataclass
class TextKV:
  """Cross-attention K/V of a prompt, all layers: [N, B, L, H, K] each."""

  k: jax.Array
  v: jax.Array


class StackedTextKV(nn.Module):
  """The k and v projections of all cross-attentions as stacked products."""

  config: WanConfig

  @nn.compact
  def __call__(self, x_BLD: jax.Array) -> TextKV:
    cfg = self.config
    init = nn.initializers.variance_scaling(
      1.0, 'fan_avg', 'uniform', batch_axis=(0,)
    )
    shape = (cfg.num_layers, cfg.dim, cfg.dim)

    def project(name):
      out = whole_rank(name)
      added = dense.stacked_adapters(self, f'{name}_kernel', x_BLD)
      return out if added is None else out + added

    def whole_rank(name):
      kernel = self.param(f'{name}_kernel', init, shape)
      bias = self.param(f'{name}_bias', nn.initializers.zeros, shape[:2])
      scale, in_8_bits = quantised.of_module(self, f'{name}_kernel')
      if scale is not None:
        stored = quantised.Stored(kernel, scale)
        project_one = lambda one: dense.stored_affine(
          x_BLD, one[0], one[1], in_8_bits
        )
        return jax.lax.map(project_one, (stored, bias))
      if cfg.is_unrolled:  # A small network: one product is faster.
        return jax.vmap(dense.affine, (None, 0, 0))(x_BLD, kernel, bias)
      # Layer by layer: divided kernels are gathered one at a time, of a 14B
      # teacher else 2.1 GB at once.
      return jax.lax.map(lambda one: dense.affine(x_BLD, *one), (kernel, bias))

    norm_k = self.param('norm_k', nn.initializers.ones, shape[:2])
    k = jax.vmap(rms_norm, (0, 0, None))(project('k'), norm_k, cfg.eps)
    v = project('v')
    heads = (*k.shape[:-1], cfg.num_heads, cfg.head_dim)
    k, v = (
      sharding.constrain(x.reshape(heads), sharding.TEXT_NBSHK) for x in (k, v)
    )
    return TextKV(k=k, v=v)
