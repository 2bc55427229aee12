"""store -> lm: do stored log-probs come out again? The proof that a cache is of the model it names."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedConfig

from dpo_cache.errors import ModelError, NotInCacheError
from dpo_cache.lm.budget import Budget
from dpo_cache.lm.device import choose_device
from dpo_cache.lm.kernels.onednn_linear import use_fast_linear
from dpo_cache.lm.model.identity import reference_identity
from dpo_cache.lm.model.load import load_config, load_model
from dpo_cache.lm.model.quantization import rounding_dtype_of
from dpo_cache.lm.self_check import choose_attention, score_completions
from dpo_cache.log import Log
from dpo_cache.store import Cache, PairSet, completion_key, open_cache
from dpo_cache.store.format.differing_fields import differing_fields
from dpo_cache.types import TOKEN_TOLERANCES, Completion, Score, ScoredPair, quantization_name


@dataclass(frozen=True)
class RescoreReport:
    """What the live model gives, beside what the cache has; gaps in nats a token."""

    reference: str
    completions: int
    tokens: int
    largest_gap: float
    mean_gap: float
    largest_allowed: float  # by rounding, for the dtype of the reference
    mean_allowed: float
    worst: str  # key of the completion with the largest gap

    @property
    def agrees(self) -> bool:
        return self.largest_gap <= self.largest_allowed and self.mean_gap <= self.mean_allowed


def rescore(
    cache: str | os.PathLike[str],
    model: str | os.PathLike[str],
    num_completions: int,
    *,
    revision: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    seed: int | None = None,
    log: Log | None = None,
) -> list[RescoreReport]:
    """Score random completions of the pair sets with the live model, one report a reference that the model
    is.

    A model may be several references, one a dtype and quantization. Raises `ModelError`, with the fields that
    differ, where it is none.
    """
    location, opened = os.fspath(model), open_cache(cache)
    config = load_config(location, revision=revision, trust_remote_code=trust_remote_code)
    place = choose_device(device)
    by_reference = _pair_sets_by_reference(opened)
    reports = []
    for reference_id in _matching(opened, list(by_reference), location, config, revision):
        identity = opened.read_reference(reference_id)["identity"]
        dtype = getattr(torch, identity["dtype"])
        completions, stored = _draw(by_reference[reference_id], num_completions, np.random.default_rng(seed))
        loaded = load_model(
            location,
            dtype=dtype,
            device=place,
            revision=revision,
            trust_remote_code=trust_remote_code,
            quantize=quantization_name(identity),
        )
        use_fast_linear(loaded)
        attention = choose_attention(loaded, "auto", max_length=max(map(len, completions)))
        budget = Budget(None, place, log or (lambda _: None))
        found = dict(
            entry
            for progress in score_completions(loaded, completions, attention, budget)
            for entry in progress.scores
        )
        reports.append(
            _report(
                reference_id,
                rounding_dtype_of(identity),
                completions,
                stored,
                [found[index] for index in range(len(completions))],
            )
        )
    return reports


def _pair_sets_by_reference(cache: Cache) -> dict[str, list[PairSet]]:
    """Scores alone do not hold the token ids that they are of: pair sets do."""
    by_reference: dict[str, list[PairSet]] = {}
    for name in cache.pair_sets():
        pairs = cache.pairs(name)
        if not len(pairs):
            continue
        by_reference.setdefault(pairs.reference_id, []).append(pairs)
    if not by_reference:
        raise NotInCacheError(
            f"{cache}: no pair set, and only pair sets hold the token ids to score again.\n"
            "Run `dpo-cache precompute` first."
        )
    return by_reference


def _matching(
    cache: Cache, reference_ids: list[str], location: str, config: PreTrainedConfig, revision: str | None
) -> list[str]:
    """The references that the model is; `ModelError` says what differs from each where it is none."""
    lines, matching = [], []
    is_saved_quantized = getattr(config, "quantization_config", None) is not None
    for reference_id in reference_ids:
        document = cache.read_reference(reference_id)
        stored, name = document["identity"], document["provenance"].get("model", "unnamed")
        dtype = stored.get("dtype")
        quantize = "none" if is_saved_quantized else quantization_name(stored)
        live = reference_identity(
            location,
            config,
            getattr(torch, dtype if dtype in TOKEN_TOLERANCES else "float32"),
            revision=revision,
            quantize=quantize,
        )
        if differing := differing_fields(stored, live):
            lines.append(
                f"  reference {reference_id[:12]} ({name}) and the model differ in\n"
                + "".join(f"    {line}\n" for line in differing)
            )
        else:
            matching.append(reference_id)
    if not matching:
        raise ModelError(
            f"{location} is no reference of {cache}:\n"
            f"{''.join(lines)}Give the model that scored it, in the same quantization."
        )
    return matching


def _draw(
    pair_sets: list[PairSet], num_completions: int, generator: np.random.Generator
) -> tuple[list[Completion], list[Score]]:
    """Distinct random completions with their stored scores: as many as asked for, or all there are."""
    blocks = [(pairs, block) for pairs in pair_sets for block in range(len(pairs.block_sizes))]
    ends = np.cumsum([2 * pairs.block_sizes[block] for pairs, block in blocks])
    drawn: dict[bytes, tuple[Completion, Score]] = {}
    places = generator.permutation(int(ends[-1]))
    for start in range(0, len(places), num_completions):  # again where what was drawn stands in several pairs
        batch = places[start : start + num_completions]
        for number in np.unique(np.searchsorted(ends, batch, side="right")):
            pairs, block = blocks[number]
            sides = [side for scored in pairs.read_block(block) for side in _sides(scored)]
            first = int(ends[number]) - len(sides)
            for place in batch[(batch >= first) & (batch < ends[number])] - first:
                if len(drawn) < num_completions:
                    drawn[completion_key(sides[place][0])] = sides[place]
        if len(drawn) >= num_completions:
            break
    return [completion for completion, _ in drawn.values()], [score for _, score in drawn.values()]


def _sides(scored: ScoredPair) -> list[tuple[Completion, Score]]:
    return [(scored.pair.chosen, scored.ref_chosen), (scored.pair.rejected, scored.ref_rejected)]


def _report(
    reference_id: str, dtype: str, completions: list[Completion], stored: list[Score], found: list[Score]
) -> RescoreReport:
    gaps = [
        np.abs(one.token_logps.astype(np.float64) - other.token_logps)
        for one, other in zip(stored, found, strict=True)
    ]
    worst = int(np.argmax([gap.max() for gap in gaps]))
    together = np.concatenate(gaps)
    largest_allowed, mean_allowed = TOKEN_TOLERANCES[dtype]
    return RescoreReport(
        reference=reference_id,
        completions=len(completions),
        tokens=len(together),
        largest_gap=float(together.max()),
        mean_gap=float(together.mean()),
        largest_allowed=largest_allowed,
        mean_allowed=mean_allowed,
        worst=completion_key(completions[worst]).hex(),
    )
