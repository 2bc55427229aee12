"""A rough speed of scoring on a device that was not measured, for cutting units of about 20 s beforehand."""

from __future__ import annotations

import math

from dpo_cache.lm.model.adapter import locate_checkpoint
from dpo_cache.lm.model.checkpoint_files import checkpoint_files
from dpo_cache.lm.model.stored_tensors import StoredTensors

# Operations a second that a forward pass reaches, roughly: a multiplication and an addition are two. A unit
# takes half or twice the time where a device is twice or half as fast.
OPERATIONS_PER_S = {"cuda": 150e12, "mps": 5e12, "cpu": 40e9}  # for the CPU, per core


def nominal_tokens_per_s(location: str, revision: str | None, device_type: str, cores: float) -> float:
    """A rough number of tokens a second: the device's operations a second, divided by two operations for each
    weight in the model's files.
    """
    parts = locate_checkpoint(location, revision)
    stored = StoredTensors(checkpoint_files(parts.base, revision=parts.base_revision))
    num_weights = sum(math.prod(one.shape) for one in stored.tensors.values())
    stored.close()
    speed = OPERATIONS_PER_S[device_type] * (cores if device_type == "cpu" else 1)
    return speed / max(1, 2 * num_weights)
