"""The machine that this process runs on."""

from __future__ import annotations

import os
import platform
import uuid
from contextlib import suppress
from functools import cache
from pathlib import Path


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def running_kernel() -> str:
    """An id of this running kernel: containers of one kernel share its locks and processes."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{platform.node()} {uuid.getnode():x}"
