"""The environments of workers on this machine: each has a GPU, or its share of the CPU cores."""

from __future__ import annotations

import os

import torch

from dpo_cache.errors import OptionError
from dpo_cache.files.machine import num_cores


def worker_environments(device: str, num_workers: int) -> list[dict[str, str]]:
    """The environment of each worker: its GPU, or its share of the cores. Raises `OptionError`."""
    shared = {**os.environ, "DPO_CACHE_PROGRESS": "off"}
    if device == "cpu":
        shared.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num_workers)))
        return [shared] * num_workers
    num_devices = torch.cuda.device_count() if device == "cuda" else 1
    if num_workers > num_devices:
        raise OptionError(
            f"`num_workers` {num_workers}: there are {num_devices} {device} devices here, and each worker "
            f"needs one.\nGive `num_workers` {num_devices}, or fewer."
        )
    visible = [one.strip() for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one.strip()]
    names = visible or [*map(str, range(num_devices))]
    return [{**shared, "CUDA_VISIBLE_DEVICES": names[number]} for number in range(num_workers)]
