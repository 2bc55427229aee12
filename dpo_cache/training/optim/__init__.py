"""Updates of weights by their gradients: optimizers, rounding, and updates within the backward pass."""
