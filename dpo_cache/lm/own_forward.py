"""Token log-probs from the model's own `forward` on one plain row: the answer that any other way must give.

No forest, no padding, no split into decoder and head, none of the faster kernels, and the model's original
attention. T tokens of a completion, N of them measured, L row length, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import psutil
import torch
from transformers import PreTrainedModel

from dpo_cache.lm.forest.attention import FOREST_ATTENTION, set_attention, use_forest_attention
from dpo_cache.lm.patches import without_patches
from dpo_cache.types import Completion

MOST_LOGITS = {"cpu": 2**25, "cuda": 2**27, "mps": 2**26}  # most logits that one run returns: 128 MB on a CPU
EAGER_COPIES = 4  # copies of a layer's attention scores in memory, in float32
CHUNK_TOKENS = 64  # whose logits are copied to float32 at once


def own_logps(model: PreTrainedModel, completion: Completion, *, original: str | None = None) -> torch.Tensor:
    """Log-probability, in nats, of each completion token under the model's own forward: float32 [T], on the
    CPU.

    Equals `log_softmax(model(input_ids=row[None]).logits.float(), -1)` gathered at the completion's tokens.
    Logits of prompt tokens are not computed where the model's code takes `logits_to_keep`; a completion with
    more logits than `MOST_LOGITS` is run several times. `original` is the attention to run with instead of
    the forest's, see `AttentionChoice.original`.
    """
    size = most_places(model)
    parts = [
        own_logps_at(model, completion, np.arange(start, min(start + size, completion.num_tokens)), original)
        for start in range(0, completion.num_tokens, size)
    ]
    return torch.cat(parts)


@torch.no_grad()
def own_logps_at(
    model: PreTrainedModel, completion: Completion, places_N: np.ndarray, original: str | None = None
) -> torch.Tensor:
    """The same for some of the completion's tokens, by one run: float32 [N]; `places_N` ascend."""
    ids_L = torch.from_numpy(completion.sequence_ids.astype(np.int64))
    with original_attention(model, original), without_patches(model):
        _, logits_NV = own_logits(model, ids_L.to(model.device), len(completion.prompt_ids) - 1 + places_N)
    return gather_logps(logits_NV, completion.completion_ids[places_N])


def most_places(model: PreTrainedModel) -> int:
    """The number of tokens whose logits one run may return."""
    return max(16, MOST_LOGITS.get(model.device.type, 2**25) // model.config.get_text_config().vocab_size)


@contextmanager
def original_attention(model: PreTrainedModel, original: str | None) -> Iterator[None]:
    """The model with its original attention, if it was switched to the forest's."""
    has_forest = model.config._attn_implementation == FOREST_ATTENTION
    if has_forest:
        assert original is not None, "a model that was switched to the forest has an original attention"
        set_attention(model, original)
    try:
        yield
    finally:
        if has_forest:
            use_forest_attention(model)


def fits_into_memory(model: PreTrainedModel, length: int, original: str | None = None) -> bool:
    """Return whether a row of so many tokens can be run on a CPU, where running out of memory ends the
    process.

    Eager attention holds the scores of all pairs of tokens; other attention functions do not.
    """
    attention = original or model.config._attn_implementation
    if model.device.type != "cpu" or attention != "eager":
        return True
    config = model.config.get_text_config()
    scores = getattr(config, "num_attention_heads", 1) * length**2
    return EAGER_COPIES * 4 * scores < psutil.virtual_memory().available / 2


def own_logits(
    model: PreTrainedModel, ids_L: torch.Tensor, predictors_N: np.ndarray, **arguments: Any
) -> tuple[Any, torch.Tensor]:
    """The output of the model's own forward on a row, and its logits [N, V] at the places that predict, which
    ascend; further arguments are the model's.
    """
    outputs = model(**own_arguments(model, ids_L, predictors_N, **arguments))
    return outputs, read_own_logits(outputs, len(ids_L), predictors_N)


def own_arguments(
    model: PreTrainedModel, ids_L: torch.Tensor, predictors_N: np.ndarray, **arguments: Any
) -> dict[str, Any]:
    """The arguments of the model's own forward on a row, of whose logits some are needed."""
    accepted = inspect.signature(type(model).forward).parameters
    if "use_cache" in accepted:
        arguments["use_cache"] = False
    if "logits_to_keep" in accepted:
        kept = len(ids_L) - int(predictors_N[0])  # all from the first on
        is_end = kept <= len(predictors_N) + 1
        arguments["logits_to_keep"] = kept if is_end else torch.from_numpy(predictors_N).to(ids_L.device)
    return {"input_ids": ids_L[None], **arguments}


def read_own_logits(outputs: Any, length: int, predictors_N: np.ndarray) -> torch.Tensor:
    """The logits [N, V] at the places that predict, of a row of this length."""
    logits_NV = outputs.logits[0]
    if len(logits_NV) == length:  # a family may ignore what is to be kept
        return logits_NV[torch.from_numpy(predictors_N).to(logits_NV.device)]
    return logits_NV[: len(predictors_N)]


def gather_logps(logits_NV: torch.Tensor, targets_N: np.ndarray) -> torch.Tensor:
    """Log-probability, in nats, of each target token: float32 [N], on the CPU."""
    targets = torch.from_numpy(targets_N.astype(np.int64)).to(logits_NV.device)
    parts = [
        logits.float().gather(1, some[:, None])[:, 0] - logits.float().logsumexp(-1)
        for logits, some in zip(logits_NV.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
    ]
    return torch.cat(parts).cpu()
