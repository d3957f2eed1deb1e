"""Published names of the umT5 encoder's arrays, for `tables`."""

from hiar_jax.weights import tables

# models_t5_umt5-xxl-enc-bf16.pth, released with Wan2.1.
RULES: list[tables.Rule] = [
  ('token_embedding.weight', 'token_embedding/embedding', 'keep'),
  ('blocks.{i}.norm{n}.weight', 'layers/norm{n}/scale[{i}]', 'keep'),
  ('blocks.{i}.attn.{qkvo}.weight', 'layers/{qkvo}/kernel[{i}]', 'linear'),
  (
    'blocks.{i}.pos_embedding.embedding.weight',
    'layers/relative_bias[{i}]',
    'keep',
  ),
  ('blocks.{i}.ffn.gate.0.weight', 'layers/ffn_gate/kernel[{i}]', 'linear'),
  ('blocks.{i}.ffn.fc1.weight', 'layers/ffn_in/kernel[{i}]', 'linear'),
  ('blocks.{i}.ffn.fc2.weight', 'layers/ffn_out/kernel[{i}]', 'linear'),
  ('norm.weight', 'norm/scale', 'keep'),
]

_HF_ATTENTION = 'encoder.block.{i}.layer.0'
_HF_FFN = 'encoder.block.{i}.layer.1'

# UMT5EncoderModel of transformers. Its token table has a second name,
# encoder.embed_tokens.weight, which some files have instead or as well.
TRANSFORMERS_RULES: list[tables.Rule] = [
  ('shared.weight', 'token_embedding/embedding', 'keep'),
  (f'{_HF_ATTENTION}.layer_norm.weight', 'layers/norm1/scale[{i}]', 'keep'),
  (
    f'{_HF_ATTENTION}.SelfAttention.{{qkvo}}.weight',
    'layers/{qkvo}/kernel[{i}]',
    'linear',
  ),
  (
    f'{_HF_ATTENTION}.SelfAttention.relative_attention_bias.weight',
    'layers/relative_bias[{i}]',
    'keep',
  ),
  (f'{_HF_FFN}.layer_norm.weight', 'layers/norm2/scale[{i}]', 'keep'),
  (
    f'{_HF_FFN}.DenseReluDense.wi_0.weight',
    'layers/ffn_gate/kernel[{i}]',
    'linear',
  ),
  (
    f'{_HF_FFN}.DenseReluDense.wi_1.weight',
    'layers/ffn_in/kernel[{i}]',
    'linear',
  ),
  (
    f'{_HF_FFN}.DenseReluDense.wo.weight',
    'layers/ffn_out/kernel[{i}]',
    'linear',
  ),
  ('encoder.final_layer_norm.weight', 'norm/scale', 'keep'),
]
ALIASES = {'encoder.embed_tokens.weight': 'shared.weight'}
