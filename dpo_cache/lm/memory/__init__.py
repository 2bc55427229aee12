"""Activations that are computed again or moved away instead of kept."""
