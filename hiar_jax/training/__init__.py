"""From data to weights: rollout, steps, phases, the loop."""
