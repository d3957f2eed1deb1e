"""Networks: config, RoPE, cache, attention, transformer, VAE, umT5."""
