"""Cost of an update by optimizer, dtype and rounding: bytes of state and of temporary values, and time.

    updates.py [--device cuda] [--values 16777216]

`home`: weights, gradients and state are on the device, or on the CPU. With a GPU also `streamed`: they are on
the host, and slices of them pass through the GPU; the results are compared bit for bit. Time is CPU time without
a GPU, which other processes disturb less.
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
        "\n|---|---|---|---|---|---|---|"
    )
    differing = 0
    for name, dtype, rounding in CASES:
        home = updater(name, dtype, rounding, arguments.values, device, None)
        weights = home.parameters
        cells = [
            f"{optimizer_bytes(weights, name, rounding) / arguments.values:.2f}",
            f"{update_bytes(weights, name, rounding) / 1e6:.0f}",
            f"{nanoseconds(home, device):.2f}",
        ]
        if device.type != "cpu":
            streamed = updater(name, dtype, rounding, arguments.values, torch.device("cpu"), device)
            took = nanoseconds(streamed, device)
            rate = 2 * link_bytes(name, dtype, rounding, arguments.values) / took
            is_same = torch.equal(streamed.parameters[0].to(device), weights[0])
            differing += not is_same
            cells.append(
                f"{took:.2f} ({rate:.0f} GB/s, {stream_bytes(weights, name, rounding) / 1e6:.0f} MB of buffers, "
                f"{'to the bit' if is_same else 'OTHER BITS'})"
            )
        else:
            cells.append("")
        print(
            f"| {name} | {str(dtype).removeprefix('torch.')} | {rounding} | " + " | ".join(cells) + " |",
            flush=True,
        )
    if differing:
        sys.exit(f"{differing} results of streamed updates differ from those at home.")


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
