"""From gradients to updates: optimizers, rounding, and updates within the backward pass."""
