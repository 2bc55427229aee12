"""The self-check of a model that runs layer by layer: its rows go through the layers together.

It reads the weights three times: for one row by a plain call of the model; for all rows by the model's own
forward, layer by layer; and for the forest. Each further way that is tried is one more reading.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedModel

from dpo_cache.lm.check_rows import short_rows
from dpo_cache.lm.free_memory import free_bytes
from dpo_cache.lm.layerwise.in_order import InOrder
from dpo_cache.lm.layerwise.own_forward import own_code, own_pass
from dpo_cache.lm.layerwise.record import watch_layers
from dpo_cache.lm.layerwise.scoring import Work
from dpo_cache.lm.layerwise.streamed import StreamedWeights
from dpo_cache.lm.layerwise.windows import LayerMajor, Pass
from dpo_cache.lm.model.parts import decoder_of

DEVICE_SHARE = 0.125  # share of the device's free memory for a window's states between two layers
WITNESS_TOKENS = 64  # its length at most


@torch.no_grad()
def find_layer_major(model: PreTrainedModel, weights: StreamedWeights, window_bytes: int) -> LayerMajor:
    """Build the `LayerMajor` that runs the model layer by layer. Its layers are found in one plain call of
    the model, and the call's log-probs are kept for the self-check.

    Raises `NotLayerMajorError` where the decoder cannot be taken apart at its layers.
    """
    completion = short_rows(model.config.get_text_config().vocab_size, WITNESS_TOKENS)[0]
    one = own_pass(model, completion, np.arange(completion.num_tokens))
    assert one.arguments is not None
    with own_code(model):
        layers, outputs = watch_layers(model, decoder_of(model), one.arguments)
        logps_T = one.read(outputs)
    layers = replace(layers, decoder=decoder_of(model))
    slots = [weights.layers.index(layer) for layer in layers.order]
    return LayerMajor(
        layers,
        InOrder(weights, slots),
        model.device,
        window_bytes,
        None if model.device.type == "cpu" else int(DEVICE_SHARE * free_bytes(model.device)),
        witness=(completion, logps_T),
        streamed=weights,
    )


@torch.no_grad()
def logps_together(works: Sequence[Work], layer_major: LayerMajor) -> list[list[torch.Tensor]]:
    """Token log-probs float32 [T] of the completions of each work, from one window if they fit into one."""
    owners: deque[int] = deque()
    found: list[dict[int, torch.Tensor]] = [{} for _ in works]

    def passes() -> Iterator[Pass]:
        for number, work in enumerate(works):
            for one in work.passes:
                owners.append(number)
                yield one

    for done in layer_major.run(passes()):
        if done.place is not None:
            number = owners.popleft()
            for index, score in works[number].collect(done.result):
                found[number][index] = torch.from_numpy(score.token_logps)
    return [[logps[index] for index in sorted(logps)] for logps in found]
