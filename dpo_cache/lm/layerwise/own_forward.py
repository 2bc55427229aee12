"""The model's own forward on plain rows, layer by layer: several rows for one reading of the weights.

All code is the model's: its `forward` from the embeddings to the first layer and from the last layer to the
logits, and its layers. The self-check compares a row with a plain call of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from transformers import PreTrainedModel

from dpo_cache.lm.layerwise.windows import LayerMajor, Pass
from dpo_cache.lm.own_forward import (
    gather_logps,
    most_places,
    original_attention,
    own_arguments,
    read_own_logits,
)
from dpo_cache.lm.patches import without_patches
from dpo_cache.types import Completion

Wanted = tuple[Completion, np.ndarray]  # and the places of the tokens whose log-probs are wanted, ascending


def own_logps_together(
    model: PreTrainedModel, wanted: Sequence[Wanted], layer_major: LayerMajor, original: str | None = None
) -> list[torch.Tensor]:
    """`own_logps_at` of each: float32 [N], on the CPU."""
    with own_code(model, original):
        passes = [own_pass(model, completion, places_N) for completion, places_N in wanted]
        return layer_major.around(model).results(passes)


def all_own_logps(
    model: PreTrainedModel,
    completions: Sequence[Completion],
    layer_major: LayerMajor,
    original: str | None = None,
) -> list[torch.Tensor]:
    """`own_logps` of each completion: float32 [T], on the CPU."""
    parts = [split_places(model, completion) for completion in completions]
    wanted = [
        (completion, part) for completion, some in zip(completions, parts, strict=True) for part in some
    ]
    logps = iter(own_logps_together(model, wanted, layer_major, original))
    return [torch.cat([next(logps) for _ in some]) for some in parts]


@contextmanager
def own_code(model: PreTrainedModel, original: str | None = None) -> Iterator[None]:
    """The model with its original attention, and without faster kernels."""
    with original_attention(model, original), without_patches(model):
        yield


def split_places(model: PreTrainedModel, completion: Completion) -> list[np.ndarray]:
    """The places of a completion's tokens, in parts whose logits one run may return."""
    size = most_places(model)
    return [
        np.arange(start, min(start + size, completion.num_tokens))
        for start in range(0, completion.num_tokens, size)
    ]


def own_pass(model: PreTrainedModel, completion: Completion, places_N: np.ndarray) -> Pass:
    """The pass of the whole model whose result is the log-probs [N] of some of the completion's tokens."""
    ids_L = torch.from_numpy(completion.sequence_ids.astype(np.int64)).to(model.device)
    predictors_N = len(completion.prompt_ids) - 1 + places_N
    return Pass(
        own_arguments(model, ids_L, predictors_N),
        lambda outputs: gather_logps(
            read_own_logits(outputs, len(ids_L), predictors_N), completion.completion_ids[places_N]
        ),
        len(ids_L),
    )
