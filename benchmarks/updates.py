"""Cost of an update by optimizer, dtype and rounding: bytes of state and of temporary values, and time.

    updates.py [--device cuda] [--values 16777216]

`home`: weights, gradients and state are on the device, or on the CPU. With a GPU also: they are on the host, and
slices of them pass through the GPU (`streamed`; the results are compared with `home` bit for bit), or the host's
cores update them (`cores`). Without a GPU, time is CPU time, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch

from dpo_cache.planning.optimizer import optimizer_bytes, stream_bytes, update_bytes
from dpo_cache.training.optim.optimizers import make_optimizer
from dpo_cache.training.optim.updates import Updater

CASES = [
    ("adamw", torch.float32, "auto"),
    ("adamw", torch.bfloat16, "nearest"),
    ("adamw", torch.bfloat16, "stochastic"),
    ("adamw", torch.bfloat16, "compensated"),
    ("adamw-bf16", torch.float32, "auto"),
    ("adamw-bf16", torch.bfloat16, "stochastic"),
    ("adamw-8bit", torch.float32, "auto"),
    ("adamw-8bit", torch.bfloat16, "stochastic"),
]
REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--values", type=int, default=2**24)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(
        "| optimizer | weights | rounding | state, bytes a weight | temporary, MB | home, ns a weight | streamed |"
        " cores |\n|---|---|---|---|---|---|---|---|"
    )
    is_right = True
    for name, dtype, rounding in CASES:
        home = updater(name, dtype, rounding, arguments.values, device, None)
        weights = home.parameters
        cells = [
            f"{optimizer_bytes(weights, name, rounding) / arguments.values:.2f}",
            f"{update_bytes(weights, name, rounding) / 1e6:.0f}",
            f"{nanoseconds(home, device):.2f}",
            *(["", ""] if device.type == "cpu" else on_host(name, dtype, rounding, home, device)),
        ]
        is_right &= "OTHER" not in cells[-2]
        cells = [name, str(dtype).removeprefix("torch."), rounding, *cells]
        print("| " + " | ".join(cells) + " |", flush=True)
    if not is_right:
        sys.exit("Streamed updates gave other bits than those at home.")


def on_host(
    name: str, dtype: torch.dtype, rounding: str, home: Updater, device: torch.device
) -> tuple[str, str]:
    """The cells for weights on the host: streamed through the device, and updated by the host's cores."""
    host, num_values = torch.device("cpu"), home.parameters[0].numel()
    streamed = updater(name, dtype, rounding, num_values, host, device)
    took = nanoseconds(streamed, device)
    rate = 2 * link_bytes(name, dtype, rounding, num_values) / took
    buffers = stream_bytes(home.parameters, name, rounding) / 1e6
    is_same = torch.equal(streamed.parameters[0].to(device), home.parameters[0])
    result = "to the bit" if is_same else "OTHER BITS"
    cores = updater(name, dtype, rounding, num_values, host, None)
    return (
        f"{took:.2f} ({rate:.0f} GB/s, {buffers:.0f} MB of buffers, {result})",
        f"{nanoseconds(cores, device):.2f}",
    )


def updater(
    name: str,
    dtype: torch.dtype,
    rounding: str,
    num_values: int,
    home: torch.device,
    compute_device: torch.device | None,
) -> Updater:
    """The optimizer of one weight, with a gradient, after its first update."""
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(num_values, generator=generator).to(home, dtype) for _ in range(2))
    model = torch.nn.ParameterDict({"weight": weight})
    model.device = home  # type: ignore[assignment]
    found = make_optimizer(
        model,  # type: ignore[arg-type]
        name,
        lr=1e-3,
        weight_decay=0.1,
        rounding=rounding,
        compute_device=compute_device,
    )
    found.parameters[0].grad = gradient
    found.step()
    return found


def nanoseconds(optimizer: Updater, device: torch.device) -> float:
    """Time of an update, per weight: the shortest of several."""
    clock: Callable[[], float] = time.process_time if device.type == "cpu" else time.perf_counter
    shortest = float("inf")
    for _ in range(REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = clock()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        shortest = min(shortest, clock() - start)
    return shortest / optimizer.parameters[0].numel() * 1e9


def link_bytes(name: str, dtype: torch.dtype, rounding: str, num_values: int) -> float:
    """Bytes per weight that cross the link, the mean of both ways: the gradient only goes up."""
    weight = torch.nn.Parameter(torch.empty(num_values, dtype=dtype, device="meta"))
    state = optimizer_bytes([weight], name, rounding) / num_values
    return state + 1.5 * weight.element_size()


if __name__ == "__main__":
    main()
