"""The choice of device and dtype, and the memory that a computation took."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Any

import numpy as np
import torch

from dpo_cache.errors import ModelError, OptionError

CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
STREAMED = "_dpo_cache_streamed"  # marks the class of a model whose weights come when they are used
SPREAD = "_dpo_cache_spread"  # attribute of a model: runs on "one device" or "several devices"


def choose_device(name: str = "auto") -> torch.device:
    """The device; `auto` takes CUDA, then MPS, then the CPU. Raises `OptionError` if it is not available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    usable = [device for device, is_available in available.items() if is_available]
    if name not in (*usable, "auto"):
        raise OptionError(f"`device` {name}: not available here.\nAvailable: {', '.join(usable)}.")
    return torch.device(usable[0] if name == "auto" else name)


def check_one_device(model: torch.nn.Module) -> None:
    """Raise `ModelError` for a model whose weights are on several devices or not in memory, as `device_map`
    places them; not for one of a class of `computes_on`, whose weights are where they are used.
    """
    if getattr(type(model), STREAMED, False) or getattr(type(model), SPREAD, False):
        return
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) < 2 and devices != ["meta"]:
        return
    problem = f"is spread over {', '.join(name for name in devices if name != 'meta')}"
    if "meta" in devices:
        problem = "has weights that are not in memory: `device_map` offloaded them to the CPU or to disk"
    raise ModelError(
        f"{type(model).__name__} {problem}; it can only be run on one device.\n"
        "Load it without `device_map`, or with `dtype` bfloat16 or quantized if it does not fit."
    )


def computes_on(device: torch.device, kind: type[Any], **marks: Any) -> type[Any]:
    """The class of a model of this kind whose `device` is where it computes, not where its first weight is.
    `marks` are further attributes; by default it passes `check_one_device`.
    """
    members = {
        "device": property(lambda _: device),
        "__module__": kind.__module__,
        **(marks or {SPREAD: "one device"}),
    }
    return type(kind.__name__, (kind,), members)


def choose_dtype(name: str, device: torch.device, checkpoint_dtype: torch.dtype | None) -> torch.dtype:
    """Dtype of the forward pass; `auto` is the checkpoint's on a GPU and float32 on a CPU.

    A CPU without bf16 instructions runs bf16 matrix products hundreds of times slower than fp32, and CPUs
    that report such instructions differ widely, so a CPU gets bf16 only where the name is given.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu" or checkpoint_dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return torch.float32
    is_here = device.type == "cuda" and torch.cuda.is_available()
    if checkpoint_dtype == torch.bfloat16 and is_here and not torch.cuda.is_bf16_supported():
        return torch.float32
    return checkpoint_dtype


_simulated_type: ContextVar[str | None] = ContextVar("simulated_type", default=None)


@contextmanager
def simulate_device_type(device_type: str) -> Iterator[None]:
    """While open, `planning_device_type` returns this type for every device: to count or test on a CPU what
    another device would hold.
    """
    token = _simulated_type.set(device_type)
    try:
        yield
    finally:
        _simulated_type.reset(token)


def planning_device_type(device: torch.device) -> str:
    """The type of a device, which decides sizes and ways to compute."""
    return _simulated_type.get() or device.type


def autocast(
    device: torch.device, precision: str, *, keeps_copies: bool = False
) -> AbstractContextManager[object]:
    """Mixed precision where `precision` is bf16-mixed.

    The bf16 copy of a weight is freed after its use, for a pass uses each weight once. With `keeps_copies`
    the copies stay to the end, for generation, which would make them again for each token; they take half the
    memory of the fp32 weights.
    """
    return (
        torch.autocast(device.type, torch.bfloat16, cache_enabled=keeps_copies)
        if precision == "bf16-mixed"
        else nullcontext()
    )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Dtype in which mixed precision multiplies at present; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def to_device(values: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """The values on the device. The host waits for no copy to a CUDA device: it comes from pinned memory,
    which torch keeps until the copy is done.
    """
    tensor = values if isinstance(values, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(values))
    if device.type != "cuda":
        return tensor.to(device)
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor).to(device, non_blocking=True)


def sum_dtype(device: torch.device) -> torch.dtype:
    """Dtype in which log-probs are summed: float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


@contextmanager
def deterministic_algorithms(is_on: bool) -> Iterator[None]:
    """While open, torch uses algorithms that give the same bits each time, or fails where it has none."""
    if not is_on:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    had_variable = CUBLAS_VARIABLE in os.environ
    os.environ.setdefault(CUBLAS_VARIABLE, ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warned)
        if not had_variable:
            os.environ.pop(CUBLAS_VARIABLE, None)


def release_free_bytes(device: torch.device) -> None:
    """Return memory that is free, but still resident in this process, to the system.

    The heap keeps free blocks of passes of other sizes between blocks in use: up to a third of its size.
    Works on a CPU with glibc; elsewhere it does nothing. Using the memory again costs page faults: some 4
    microseconds for each 4 KiB.
    """
    if device.type == "cpu" and (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # Windows, macOS, musl
        return None


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: of the CUDA allocator, else resident in this process."""
    is_cuda = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.max_memory_allocated(device) if is_cuda else peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Peak memory that was resident in this process so far."""
    try:
        # on Linux, ru_maxrss may be inherited from the parent process
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
