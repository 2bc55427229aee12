"""The decision to keep a checkpoint's weights on the device or to read them for each window of scoring, and
its cost.

Nothing but the headers of the checkpoint's files is read, and a little of them to measure the speed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from dpo_cache.errors import OptionError, shown_bytes
from dpo_cache.lm.budget import now
from dpo_cache.lm.free_memory import free_bytes, free_host_bytes
from dpo_cache.lm.layerwise.meter import READINGS, WINDOW_S
from dpo_cache.lm.model.adapter import WEIGHTS_FILE, locate_checkpoint
from dpo_cache.lm.model.checkpoint_files import checkpoint_files
from dpo_cache.lm.model.stored_tensors import StoredTensor, StoredTensors

DISK, HOST = "disk", "host"
USABLE = 0.9  # share of a device's free memory: activations need the rest
HOST_SHARE = 0.7  # share of the host's free memory for weights that are kept there
WINDOW_SHARE = 0.25  # share of the remaining host memory for a window's states between two layers
STATES_PER_TOKEN = 1.5  # memory of a window's token, in hidden states
QUANTIZED_BYTES = {"4bit": 0.53, "8bit": 1.01}  # bytes of a weight, with its part of the scales
# readings of all weights by the self-check: a plain row, plain rows layer by layer, the forest
CHECK_READINGS = 3
FIRST_AUDIT_READINGS = 2  # scores and own forward of the longest completion and a sample
PROBE_BYTES, PROBE_S = 2**28, 0.5  # read to measure the speed, at most
PROBE_TURNS = 5
PRODUCT_S = 0.02  # shortest product that measures the device's speed
EFFICIENCY = 0.7  # speed of a model, compared with one product


@dataclass(frozen=True)
class Streaming:
    """Weights that are read from `place`, disk or host, for each window of scoring."""

    place: str
    is_required: bool  # otherwise the weights of a model that cannot be streamed are kept on the device
    read_bytes: int  # bytes of one reading
    resident_bytes: int  # bytes of all weights, if they were on the device
    free_bytes: int  # free memory of the device
    window_bytes: int  # memory for what a window keeps between two layers
    bytes_per_token: int  # of that
    num_weights: int  # approximate number of weights that a token is multiplied by
    files: tuple[Path, ...]

    @property
    def reason(self) -> str:
        """Why the weights are streamed."""
        if self.is_required:
            return "the weights are read layer by layer"
        sizes = f"{shown_bytes(self.resident_bytes)}, and {shown_bytes(self.free_bytes)} are free"
        return f"the weights would take {sizes}; they are read layer by layer"

    @property
    def embedding(self) -> str:
        """Where the table of embeddings and the LM head are kept, see `load_streamed`."""
        return HOST if self.place == HOST else "device"


@dataclass(frozen=True)
class Readings:
    """How often the weights will be read, about, and what that costs."""

    place: str
    count: int
    num_bytes: int
    bytes_per_s: float  # measured

    @property
    def elapsed_s(self) -> float:
        return self.num_bytes / self.bytes_per_s

    def __str__(self) -> str:
        return (
            f"about {self.count:,} times from {self.place}, {shown_bytes(self.num_bytes)} in all: "
            f"{self.elapsed_s:,.0f} s at {shown_bytes(self.bytes_per_s)}/s, mostly while the model computes"
        )


def choose_streaming(
    option: str,
    location: str,
    config: PreTrainedConfig,
    *,
    revision: str | None,
    dtype: torch.dtype,
    device: torch.device,
    quantize: str = "none",
) -> Streaming | None:
    """How the weights are read; None: they are kept on the device.

    `option` is on, off or auto: on where the weights are larger than the device's free memory. Raises
    `OptionError` where they cannot be anywhere else, and `ModelError` for files that are no weights.
    """
    if option == "off":
        return None
    is_packed = quantize != "none" or getattr(config, "quantization_config", None) is not None
    if is_packed and device.type != "cuda":
        if option == "auto":
            return None
        raise OptionError(
            f"`stream_weights` on: quantized weights are kept in host memory; {device.type} has no "
            "memory apart from it.\nLeave `stream_weights` out, or give a model that is not quantized."
        )
    files, tensors = _stored(location, revision, config)
    vocab_size = config.get_text_config().vocab_size
    in_layers = [one for one in tensors if vocab_size not in one.shape]
    size = _resident_size(dtype, quantize, vocab_size, is_packed=is_packed)
    resident, free, on_host = sum(map(size, tensors)), free_bytes(device), free_host_bytes()
    if option == "auto" and resident <= USABLE * free:
        return None
    place = HOST if device.type == "cuda" and (is_packed or resident <= HOST_SHARE * on_host) else DISK
    left = on_host - resident if place == HOST else on_host
    return Streaming(
        place,
        option == "on",
        sum(size(one) if place == HOST else one.num_bytes for one in in_layers),
        resident,
        free,
        max(0, int(WINDOW_SHARE * left)),
        int(STATES_PER_TOKEN * config.get_text_config().hidden_size * dtype.itemsize),
        sum(math.prod(one.shape) for one in in_layers),
        files,
    )


def count_readings(
    streaming: Streaming,
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_tokens: int,
    num_completions: int,
    audit_interval: int | None,
) -> Readings:
    """How often a run over so many tokens reads the weights; the speeds of reading and of the device are
    measured.
    """
    speed = _bytes_per_s(streaming, device)
    tokens_per_s = EFFICIENCY * _products_per_s(device, dtype) / max(1, 2 * streaming.num_weights)
    window_s = max(WINDOW_S, READINGS * streaming.read_bytes / speed)
    window_tokens = min(streaming.window_bytes / streaming.bytes_per_token, tokens_per_s * window_s)
    count = windows = math.ceil(num_tokens / max(1, window_tokens))
    if count:
        count += CHECK_READINGS
    if count and audit_interval is not None:
        count += FIRST_AUDIT_READINGS + min(windows, num_completions // audit_interval)
    return Readings(streaming.place, count, count * streaming.read_bytes, speed)


def _stored(
    location: str, revision: str | None, config: PreTrainedConfig
) -> tuple[tuple[Path, ...], list[StoredTensor]]:
    """The files with the weights of a model and its adapter, and the tensors in them."""
    parts = locate_checkpoint(location, revision)
    files = checkpoint_files(
        parts.base,
        revision=parts.base_revision,
        weights_file=getattr(config, "transformers_weights", None),
    )
    if parts.adapter is not None:
        files = [*files, Path(parts.adapter, WEIGHTS_FILE)]
    stored = StoredTensors(files)
    stored.close()
    return tuple(files), [*stored.tensors.values()]


def _resident_size(
    dtype: torch.dtype, quantize: str, vocab_size: int, *, is_packed: bool
) -> Callable[[StoredTensor], int]:
    """The memory of a tensor of the files in the loaded model."""

    def size(tensor: StoredTensor) -> int:
        num_values = math.prod(tensor.shape)
        is_matrix = len(tensor.shape) >= 2 and vocab_size not in tensor.shape
        if quantize != "none" and is_matrix:
            return int(QUANTIZED_BYTES[quantize] * num_values)
        is_cast = tensor.dtype.is_floating_point and not (is_packed and quantize == "none")
        return num_values * dtype.itemsize if is_cast else tensor.num_bytes

    return size


def _bytes_per_s(streaming: Streaming, device: torch.device) -> float:
    """The speed of reading from the files, or of copies from the host to the device."""
    if streaming.place == HOST:
        pinned = torch.empty(2**26, dtype=torch.uint8, pin_memory=True)
        return pinned.numel() / _seconds(lambda: pinned.to(device), device)
    buffer, num_read, started = bytearray(2**23), 0, time.perf_counter()
    with open(max(streaming.files, key=lambda path: path.stat().st_size), "rb", buffering=0) as file:
        while num_read < PROBE_BYTES and time.perf_counter() - started < PROBE_S:
            found = file.readinto(buffer)
            num_read += found
            if not found:
                break
    return max(1, num_read) / (time.perf_counter() - started)


def _products_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second in matrix products; a multiplication and an addition are two."""
    size, rows = 1024, 32
    right = torch.ones(size, size, dtype=dtype, device=device)
    while True:
        elapsed_s = _seconds(partial(torch.mm, right.new_ones(rows, size), right), device)
        if elapsed_s >= PRODUCT_S or rows >= 2**16:
            return 2 * rows * size**2 / elapsed_s
        rows *= 4


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The shortest time of a few."""
    times: list[float] = []
    while len(times) < 2 or (len(times) < PROBE_TURNS and sum(times) < PROBE_S):
        started = now(device, waits=True)
        run()
        times.append(now(device, waits=True) - started)
    return min(times)
