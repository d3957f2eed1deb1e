"""What networks are trained on: prompts, videos, latents, trajectories."""
