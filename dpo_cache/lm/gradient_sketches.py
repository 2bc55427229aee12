"""Gradients of all parameters in a thousandth of their memory, of which the norm of any difference is known.

A gradient of two and more dimensions is kept as the products of its rows with `NUM_DIRECTIONS` random
directions, one of fewer dimensions whole. Products are linear: those of a difference are the difference of
the products, and the sum of their squares is the difference's own, up to chance. A gradient that is missing,
counted twice or wrong in any row has another sketch.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch

NUM_DIRECTIONS = 4
ROWS_AT_ONCE = 4096  # rows of a gradient that are converted to float32 at once

# Largest gap between two gradients of a parameter that rounding explains, relative to its norm, and relative
# to that of all parameters (for gradients that are nothing but rounding): in float32, and in 16 bits.
TOLERANCES = {"fp32": (1e-3, 1e-5), "16 bits": (5e-2, 1e-3)}


class GradientSketches:
    """Sums of the gradients that are added, by the parameter's name."""

    def __init__(self) -> None:
        self.by_name: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, name: str, gradient: torch.Tensor) -> None:
        """Add a gradient, or a term of it, to what is there of this parameter."""
        sketch = _sketch(gradient)
        self.by_name[name] = sketch + self.by_name[name] if name in self.by_name else sketch

    def take(self, name: str, parameter: torch.Tensor) -> None:
        """Add the parameter's gradient if it has one, and free it."""
        if parameter.grad is not None:
            self.add(name, parameter.grad)
            parameter.grad = None

    def problem(
        self,
        expected: GradientSketches,
        *,
        is_fp32: bool,
        tolerances: Mapping[str, tuple[float, float]] = TOLERANCES,
    ) -> str:
        """The tensor that differs most from its expected gradient, beyond rounding; empty if none does."""
        of_own, of_all = tolerances["fp32" if is_fp32 else "16 bits"]
        norms = {name: float(sketch.norm()) for name, sketch in expected.by_name.items()}
        total = sum(norm**2 for norm in norms.values()) ** 0.5
        worst, problem = 1.0, ""
        for name in sorted(self.by_name.keys() | expected.by_name.keys()):
            norm, gap = norms.get(name, 0.0), _gap(name, self.by_name, expected.by_name)
            share = gap / (of_own * norm + of_all * total or 1.0)
            if not share <= worst:  # true for NaN
                worst, problem = share, f"{name}: by {gap:.2g} of {norm:.2g}"
        return problem


def _gap(name: str, one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    if name in one and name in other:
        return float((one[name] - other[name]).norm())
    return float((one[name] if name in one else other[name]).norm())


def _sketch(gradient: torch.Tensor) -> torch.Tensor:
    """Numbers in float32 on the CPU whose norm is about that of the gradient."""
    gradient = gradient.detach()
    if gradient.ndim < 2:
        return gradient.to("cpu", torch.float32, copy=True)
    directions = _directions(gradient.shape[-1]).to(gradient.device)
    with torch.autocast(gradient.device.type, enabled=False):
        parts = gradient.flatten(0, -2).split(ROWS_AT_ONCE)
        return torch.cat([part.float() @ directions for part in parts]).cpu()


@lru_cache(8)
def _directions(size: int) -> torch.Tensor:
    """Random directions [size, NUM_DIRECTIONS], whose mean square product with a row is the row's square."""
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, NUM_DIRECTIONS, generator=generator) / NUM_DIRECTIONS**0.5
