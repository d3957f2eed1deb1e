"""What both sides of torch_race.py make."""

SIZES = {
  # dim, ffn_dim, heads, layers, latent side
  'tiny': (24, 48, 2, 1, 4),
  'small': (192, 768, 6, 6, 16),
}
FRAMES, CHANNELS, WINDOW = 3, 16, 21  # Of a block; of a latent; in frames.
FREQ_DIM, TEXT_LEN, TEXT_DIM, EPS = 256, 16, 64, 1e-6
