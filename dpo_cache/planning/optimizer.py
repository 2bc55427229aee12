"""Bytes of optimizer state and of an update, by arithmetic that tests compare with the updater itself.

State is float32 even for bfloat16 weights: two moments for each weight; `adamw-bf16` has two bfloat16
moments. In 8 bits, it is two bytes for each weight and two float32 scales for each block of 256, but two
float32 moments in a tensor of fewer than 4,096 weights. Adafactor keeps the means of rows and columns. Each
tensor also has a float32 scalar: the step of AdamW, the root mean square of Adafactor. 8-bit state needs two
tables of 256 float32 values once.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dpo_cache.errors import OptionError

OPTIMIZERS = ("adamw", "adamw-bf16", "adamw-8bit", "adamw-paged", "adamw-8bit-paged", "adafactor", "none")
MIN_8BIT_WEIGHTS, BLOCK = 4096, 256
SCALAR = 4

# As in `training/optim`: the number of values that are rounded, or pass through a device, at once, and those
# that are updated at once in place; the number of buffers that take turns, and the alignment in them.
SLICE, SLICE_AT_HOME = 2**22, 2**24
NUM_BUFFERS, ALIGNMENT = 2, 256


def optimizer_bytes(
    parameters: Iterable[torch.nn.Parameter], optimizer: str, rounding: str | None = "auto"
) -> int:
    """Bytes of an optimizer's state for these parameters, after a step in which each had a gradient.

    `rounding` is the rounding of bfloat16 weights that are updated in float32; None is an optimizer that runs
    on the weights themselves, as in TRL: the moments of AdamW then have the dtype of the weights. Raises
    `OptionError` for an unknown optimizer.
    """
    trained, name = list(parameters), _known(optimizer)
    tables = 2 * BLOCK * 4 if name == "adamw-8bit" and any(map(_is_in_8_bits, trained)) else 0
    return tables + sum(
        _state_bytes(parameter, name, rounding) + _rest_bytes(parameter, name, rounding)
        for parameter in trained
    )


def update_bytes(
    parameters: Iterable[torch.nn.Parameter],
    optimizer: str,
    rounding: str | None = "auto",
    *,
    is_streamed: bool = False,
) -> int:
    """Peak bytes that updating these parameters one after another takes on a GPU besides values, gradients
    and state: float32 stand-ins and other temporary values.

    With `is_streamed`, parameters and state are on the host, and slices of them pass through the GPU: its
    buffers count as well, and the host has pinned ones of the same size (`stream_bytes`). Adafactor is then
    computed on the host, where it needs the bytes that are returned without `is_streamed`. On a CPU,
    bitsandbytes takes 20 more bytes for each 8-bit weight of a slice.
    """
    name, trained = _known(optimizer), list(parameters)
    if is_streamed and name == "adafactor":
        return 0
    is_whole = name == "adafactor" or optimizer.endswith("-paged")
    most = SLICE if is_streamed else SLICE_AT_HOME
    largest = max(
        (
            _temporary_bytes(one, one.numel() if is_whole else min(one.numel(), most), name, rounding)
            for one in trained
        ),
        default=0,
    )
    return largest + (stream_bytes(trained, optimizer, rounding) if is_streamed else 0)


def stream_bytes(
    parameters: Iterable[torch.nn.Parameter], optimizer: str, rounding: str | None = "auto"
) -> int:
    """Bytes of the buffers through which slices pass, on one side; the other side has as many."""
    name = _known(optimizer)
    if name in ("adafactor", "none"):
        return 0
    return NUM_BUFFERS * max((_slice_bytes(one, name, rounding) for one in parameters), default=0)


def _known(optimizer: str) -> str:
    """The optimizer's name without the suffix of paged state. Raises `OptionError` for an unknown one."""
    if optimizer not in OPTIMIZERS:
        raise OptionError(
            f"optimizer {optimizer!r}: its state is not known.\nUse one of {', '.join(OPTIMIZERS)}."
        )
    return optimizer.removesuffix("-paged")


def _state_bytes(parameter: torch.nn.Parameter, optimizer: str, rounding: str | None) -> int:
    count, shape = parameter.numel(), parameter.shape
    match optimizer:
        case "adamw":
            return SCALAR + 2 * count * (parameter.element_size() if rounding is None else 4)
        case "adamw-bf16":
            return SCALAR + 2 * count * 2
        case "adamw-8bit":
            return 2 * (count + 4 * -(-count // BLOCK)) if _is_in_8_bits(parameter) else 8 * count
        case "adafactor":
            means = count if len(shape) < 2 else count // shape[-1] + count // shape[-2]
            return SCALAR + 4 * means
    return 0


def _rest_bytes(parameter: torch.nn.Parameter, optimizer: str, rounding: str | None) -> int:
    has_rest = rounding == "compensated" and _is_bf16(parameter) and optimizer != "none"
    return 2 * parameter.numel() if has_rest else 0


def _temporary_bytes(
    parameter: torch.nn.Parameter, at_once: int, optimizer: str, rounding: str | None
) -> int:
    """Bytes of temporary values while that many values of a parameter are updated."""
    computed = 8 * at_once if optimizer == "adafactor" else 0
    if optimizer == "none" or (rounding is None and not computed):
        return 0
    value = gradient = 4 * at_once if _is_bf16(parameter) else 0
    moments = 8 * at_once if optimizer == "adamw-bf16" else 0
    drawn = 6 * min(at_once, SLICE)
    split = {"nearest": 0, "compensated": 8 * min(at_once, SLICE)}.get(str(rounding), drawn)
    return max(
        value + moments + max(gradient + computed, split if value else 0), moments + drawn if moments else 0
    )


def _slice_bytes(parameter: torch.nn.Parameter, optimizer: str, rounding: str | None) -> int:
    """Bytes of a slice in a buffer: value, gradient, two states, and their scales or the rest."""
    count = min(parameter.numel(), SLICE)
    of_each = 1 if optimizer == "adamw-8bit" and _is_in_8_bits(parameter) else 4
    of_each = 2 if optimizer == "adamw-bf16" else of_each
    sizes = [*2 * [parameter.element_size() * count], *2 * [of_each * count]]
    if of_each == 1:
        sizes += 2 * [4 * -(-count // BLOCK)]
    if rounding == "compensated" and _is_bf16(parameter):
        sizes.append(2 * count)
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def _is_in_8_bits(parameter: torch.nn.Parameter) -> bool:
    return parameter.numel() >= MIN_8BIT_WEIGHTS


def _is_bf16(parameter: torch.nn.Parameter) -> bool:
    return parameter.dtype == torch.bfloat16
