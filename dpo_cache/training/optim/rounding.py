"""float32 values -> bfloat16 weights, which keep 8 of 24 significant bits.

A bfloat16 weight of 0.1 has neighbours 0.0005 away. An update of 1e-6 is lost if the result is rounded to the
nearest, in every step, and nothing is learned. Two ways to round avoid that:

    stochastic    up or down at random, with odds that make the mean exact; needs no memory
    compensated   to the nearest; the rest is kept in 16 bits, and both together give the exact float32 value

Both work on the bits: the upper half of a float32 is the bfloat16 below it in magnitude.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

SLICE = 2**22  # values rounded at once: bounds the memory for temporary values
BITS = 16  # of a float32 that a bfloat16 lacks
QUIET_NAN = 0x7FC00000


def stochastic_bf16(values: torch.Tensor, *draw: int) -> torch.Tensor:
    """The values in bfloat16, each rounded up or down in magnitude; the mean of many draws is the value.

    The draw depends only on the integers `draw` and the device's kind, and does not change the global random
    state. Values that bfloat16 can represent are kept, such as zeros, infinities and NaN.
    """
    generator = torch.Generator(values.device).manual_seed(_seed(draw))
    rounded = torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)
    for part, target in _slices(values.contiguous(), rounded):
        noise = torch.randint(
            0, 1 << BITS, part.shape, dtype=torch.int32, device=part.device, generator=generator
        )
        bits = part.view(torch.int32).add(noise).bitwise_and_(-1 << BITS)
        target.copy_(torch.where(part.isfinite(), bits.view(torch.float32), part))
    return rounded


def split_float(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest bfloat16 of each float32 value (of two, the larger in magnitude), and the rest as int16.

    `join_float` computes the value from the two.
    """
    rounded = torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)
    rest = torch.empty(values.shape, dtype=torch.int16, device=values.device)
    for part, target, left in _slices(values.contiguous(), rounded, rest):
        bits = torch.where(part.isnan(), QUIET_NAN, part.view(torch.int32))
        upper = bits.add(1 << (BITS - 1)).bitwise_right_shift_(BITS)
        target.view(torch.int16).copy_(upper)
        left.copy_(bits - upper.bitwise_left_shift(BITS))
    return rounded, rest


def join_float(rounded: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """The float32 values that `split_float` has split, bit for bit (of NaN: some NaN)."""
    values = torch.empty(rounded.shape, dtype=torch.float32, device=rounded.device)
    for part, left, target in _slices(rounded.contiguous(), rest, values):
        target.view(torch.int32).copy_(
            part.view(torch.int16).to(torch.int32).bitwise_left_shift_(BITS).add_(left)
        )
    return values


def _slices(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the same slice of each of several contiguous tensors of one shape."""
    return zip(*(tensor.view(-1).split(SLICE) for tensor in tensors), strict=True)


def _seed(draw: tuple[int, ...]) -> int:
    digest = hashlib.blake2b(",".join(map(str, draw)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
