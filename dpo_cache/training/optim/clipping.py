"""Clipping of the gradient by its norm, wherever the gradients are: on the device, on the host, or both."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from dpo_cache.training.ranks import Ranks

SLICE = 2**22  # values of a bfloat16 gradient that are made float32 at once


@torch.no_grad()
def clip_gradient(
    parameters: Iterable[torch.nn.Parameter], max_norm: float, ranks: Ranks | None = None
) -> torch.Tensor:
    """Scale the gradients in place such that their norm is at most `max_norm`; returns the norm before.

    Equals `torch.nn.utils.clip_grad_norm_`, but computes the norm of bfloat16 gradients in float32, where
    torch rounds it to bfloat16. Makes no copy of a gradient. If `ranks` have shards of the gradients, the
    result is the norm of all shards.
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    norm = norm_over(ranks, gradient_norm(trained))
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if norm.device.type == "cpu" and float(scale) == 1.0:
        return norm  # saves a pass over gradients on the host
    by_device: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for parameter in trained:
        assert parameter.grad is not None
        by_device.setdefault((parameter.grad.device, parameter.grad.dtype), []).append(parameter.grad)
    for (device, _), gradients in by_device.items():
        torch._foreach_mul_(gradients, scale.to(device))
    return norm


@torch.no_grad()
def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """The norm of all gradients together, a float32 scalar on the device of the first one; 0 without any."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if all(gradient.dtype == torch.float32 for gradient in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    norms = torch.stack([norm_of(gradient).to(gradients[0].device) for gradient in gradients])
    return torch.linalg.vector_norm(norms)


def norm_over(ranks: Ranks | None, norm: torch.Tensor) -> torch.Tensor:
    """The norm of the gradients of all ranks, if each has a shard, from this rank's norm; on the CPU."""
    if ranks is None or not ranks.shards:
        return norm
    return torch.tensor(math.hypot(*ranks.gather(float(norm))))


@torch.no_grad()
def norm_of(gradient: torch.Tensor) -> torch.Tensor:
    """The norm of one gradient, summed in float32: a scalar on its device.

    Makes no float32 copy of it, as `torch.linalg.vector_norm(gradient, dtype=torch.float32)` does on a CPU.
    """
    if gradient.dtype == torch.float32:
        return torch.linalg.vector_norm(gradient)
    parts = gradient.reshape(-1).split(SLICE)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part.float()) for part in parts]))
