"""Prompts to the states that cross-attention reads."""
