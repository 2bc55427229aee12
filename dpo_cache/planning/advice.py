"""Advice for runs that are out of memory: the next preset, and the bytes that it keeps on the device."""

from __future__ import annotations

from transformers import PreTrainedConfig

from dpo_cache.errors import shown_bytes
from dpo_cache.lm.layerwise.layer_io import NotLayerMajorError
from dpo_cache.lm.model.tensor_names import FAILURES
from dpo_cache.options.placement import Placement, next_preset, placement_of
from dpo_cache.planning.choose import staying_bytes
from dpo_cache.planning.parts import Method
from dpo_cache.planning.placed import measure_model


def less_memory(config: PreTrainedConfig, method: Method, placement: Placement) -> str:
    """The next preset, as in ``memory` small (16.1 GB of weights and buffers on the device)`; empty if there
    is none.
    """
    name = next_preset(placement)
    following = placement_of(name, is_adapted=method.lora_r is not None) if name else None
    if following is None:
        return ""
    try:
        kept = staying_bytes(measure_model(config, method), following)
    except (*FAILURES, NotLayerMajorError):
        return f"`memory` {name}"
    return f"`memory` {name} ({shown_bytes(kept)} of weights and buffers on the device)"
