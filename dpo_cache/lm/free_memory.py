"""How much memory a device and the host have, and how much of it is free."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")  # limits of a container; version 2 of the interface, then version 1
LIMITS = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


def free_bytes(device: torch.device) -> int:
    """Memory that a new model may have on the device; on a CPU, that of the host."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return free_host_bytes()


def total_host_bytes(cgroup: Path = CGROUP) -> int:
    """Memory of the host; at most a container's limit."""
    total = psutil.virtual_memory().total
    for limit, _, _ in LIMITS:
        try:
            total = min(total, int((cgroup / limit).read_text()))
        except (OSError, ValueError):  # no such interface, or "max": no limit
            continue
    return total


def free_host_bytes(cgroup: Path = CGROUP) -> int:
    """Memory of the host that is free or can be freed; at most what a container's limit leaves."""
    available = psutil.virtual_memory().available
    for limit, usage, stat in LIMITS:
        try:
            most, used = int((cgroup / limit).read_text()), int((cgroup / usage).read_text())
            entries = dict(line.split() for line in (cgroup / stat).read_text().splitlines())
        except (OSError, ValueError):  # no such interface, or "max": no limit
            continue
        cached = int(entries.get("inactive_file", 0))  # cached files: freed when memory is needed
        available = min(available, max(0, most - used + cached))
    return available
