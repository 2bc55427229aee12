"""Products of a mixture's experts on tensors without values.

torch multiplies all experts by one operator, which has shapes for tensors without values only in bfloat16.
transformers has another operator with the same inputs and output for machines that lack this one.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake


@cache
def use_counted_experts() -> None:
    """From now on, let transformers multiply experts without values by its own operator, unless they are in
    bfloat16.
    """
    from transformers.integrations import moe

    module: Any = moe
    original = getattr(module, "_can_use_grouped_mm", None)
    if original is None:  # of another version, which may not need it
        return

    def can_use(inputs: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> bool:
        has_shapes = not is_fake(weight) or weight.dtype == torch.bfloat16
        return has_shapes and original(inputs, weight, offsets)

    module._can_use_grouped_mm = can_use
