"""The completions of a batch that TRL has collated, and their keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_cache.store import completion_key
from dpo_cache.store.format.keys import KEY_BYTES, key_array
from dpo_cache.types import Completion, Score

NOTHING = Score(np.zeros(0, np.float32))  # score of a completion that the truncation removed


def keys_of(completions: Sequence[Completion | None]) -> tuple[np.ndarray, np.ndarray]:
    """The key of each completion (dtype S16), and a mask of the places that have one: bool."""
    keys = [bytes(KEY_BYTES) if one is None else completion_key(one) for one in completions]
    return key_array(keys), np.array([one is not None for one in completions])


def completions_in(batch: dict[str, Any]) -> list[Completion | None]:
    """The completions of a collated batch: all chosen, then all rejected ones; None for one without tokens.

    TRL sums the log-probs of the tokens under `completion_mask`, except for a row's first token, which
    no token predicts.
    """
    found: list[Completion | None] = []
    for ids, attention, mask in zip(
        *(batch[name].cpu().numpy() for name in ("input_ids", "attention_mask", "completion_mask")),
        strict=True,
    ):
        ids, mask = ids[attention == 1].astype(np.uint32), mask[attention == 1]
        start = max(1, len(mask) - int(mask.sum()))
        found.append(Completion(ids[:start], ids[start:]) if start < len(ids) else None)
    return found
