"""The learning rate of each step: that of `transformers.get_scheduler` with as many warm-up steps."""

from __future__ import annotations

import math


def learning_rate(
    step: int,
    total_steps: int,
    *,
    peak: float,
    schedule: str,
    warmup_ratio: float,
    warmup_steps: int | None = None,
) -> float:
    """The rate of a step, numbered from 0: a linear rise from 0, then constant, linear or cosine decay to 0.

    The warm-up takes `warmup_steps` or, without them, a share of the steps. It ends before the last step, so
    that every run reaches the peak.
    """
    wanted = math.ceil(total_steps * warmup_ratio) if warmup_steps is None else warmup_steps
    warmup_steps = min(wanted, total_steps - 1)
    if step < warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return peak * max(0.0, 1 - progress)
    return peak * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
