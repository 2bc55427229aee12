"""store -> lm: score stored completions again, to check that the cache holds the log-probs of a model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from dpo_cache.errors import ModelError, NotInCacheError
from dpo_cache.files.locations import check_revision
from dpo_cache.lm.device import choose_device
from dpo_cache.lm.model.identity import identity_as_recorded
from dpo_cache.lm.model.load import load_config
from dpo_cache.lm.model.quantization import rounding_dtype_of
from dpo_cache.lm.model.unchanged import one_checkpoint
from dpo_cache.lm.runner import Runner, open_runner
from dpo_cache.lm.streaming import choose_streaming
from dpo_cache.log import Log, log_remark
from dpo_cache.store import Cache, PairSet, completion_key, open_cache
from dpo_cache.store.format.differing_fields import differing_fields
from dpo_cache.types import TOKEN_TOLERANCES, Completion, GapSums, Score, ScoredPair, quantization_name


@dataclass(frozen=True)
class RescoreReport:
    """Log-probs of the live model compared with those in the cache; gaps in nats a token."""

    reference: str
    completions: int
    tokens: int
    largest_gap: float
    mean_gap: float
    largest_allowed: float  # the largest gap that rounding explains, in the dtype of the reference
    mean_allowed: float
    worst: str  # key of the completion with the largest gap
    together: str = ""  # the difference over all tokens that rounding does not explain, if any

    @property
    def agrees(self) -> bool:
        is_near = self.largest_gap <= self.largest_allowed and self.mean_gap <= self.mean_allowed
        return is_near and not self.together


@one_checkpoint()
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
    """Score random completions of the pair sets with the live model. Returns a report for each matching
    reference.

    A model may be several references, one for each dtype and quantization. Raises `ModelError` with the
    fields that differ if it is none of them, and for a log-prob that is NaN or infinite.
    """
    location, opened, log = os.fspath(model), open_cache(cache), log or log_remark
    check_revision(location, revision)
    config = load_config(location, revision=revision, trust_remote_code=trust_remote_code)
    by_reference = _pair_sets_by_reference(opened)
    reports = []
    for reference_id in _matching(opened, list(by_reference), location, config, revision, trust_remote_code):
        identity = opened.read_reference(reference_id)["identity"]
        drawn = _draw(by_reference[reference_id], num_completions, np.random.default_rng(seed))
        loading: dict[str, Any] = {
            "dtype": getattr(torch, identity["dtype"]),
            "device": choose_device(device),
            "revision": revision,
            "quantize": quantization_name(identity),
        }
        streaming = choose_streaming("auto", location, config, **loading)
        if streaming:
            log(f"{streaming.reason}.")
        with open_runner(
            location,
            **loading,
            trust_remote_code=trust_remote_code,
            streaming=streaming,
            max_length=max(len(one.completion) for one in drawn),
            run_tokens=sum(len(one.completion) for one in drawn),
            log=log,
        ) as runner:
            found = _score(runner, drawn)
        reports.append(_report(reference_id, rounding_dtype_of(identity), drawn, found))
    return reports


@dataclass(frozen=True)
class _Drawn:
    """A completion of a pair set, its stored score, and its row."""

    completion: Completion
    stored: Score
    row: str


def _score(runner: Runner, drawn: list[_Drawn]) -> list[Score]:
    steps = runner.score([one.completion for one in drawn], rows_of=lambda index: [drawn[index].row])
    found = dict(entry for step in steps for entry in step.scores)
    return [found[index] for index in range(len(drawn))]


def _pair_sets_by_reference(cache: Cache) -> dict[str, list[PairSet]]:
    """Pair sets that are not empty. Only they hold token ids: score shards hold keys and log-probs."""
    by_reference: dict[str, list[PairSet]] = {}
    for name in cache.pair_sets():
        pairs = cache.pairs(name)
        if len(pairs):
            by_reference.setdefault(pairs.reference_id, []).append(pairs)
    if not by_reference:
        raise NotInCacheError(
            f"{cache}: no pair set, and only pair sets hold the token ids to score again.\n"
            "Run `dpo-cache precompute` first."
        )
    return by_reference


def _matching(
    cache: Cache,
    reference_ids: list[str],
    location: str,
    config: PreTrainedConfig,
    revision: str | None,
    trust_remote_code: bool,
) -> list[str]:
    """The references that the model matches. Raises `ModelError` with all differences if it matches none."""
    lines, matching = [], []
    is_saved_quantized = getattr(config, "quantization_config", None) is not None
    for reference_id in reference_ids:
        document = cache.read_reference(reference_id)
        stored, name = document["identity"], document["provenance"].get("model") or "unnamed"
        dtype = stored.get("dtype")
        quantize = "none" if is_saved_quantized else quantization_name(stored)
        live = identity_as_recorded(
            stored,
            location,
            config,
            getattr(torch, dtype if dtype in TOKEN_TOLERANCES else "float32"),
            revision=revision,
            quantize=quantize,
            trust_remote_code=trust_remote_code,
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


def _draw(pair_sets: list[PairSet], num_completions: int, generator: np.random.Generator) -> list[_Drawn]:
    """Distinct random completions with their stored scores: `num_completions`, or all if there are fewer."""
    blocks = [(pairs, block) for pairs in pair_sets for block in range(len(pairs.block_sizes))]
    ends = np.cumsum([2 * pairs.block_sizes[block] for pairs, block in blocks])
    drawn: dict[bytes, _Drawn] = {}
    places = generator.permutation(int(ends[-1]))
    for start in range(0, len(places), num_completions):  # more draws if pairs share completions
        batch = places[start : start + num_completions]
        for number in np.unique(np.searchsorted(ends, batch, side="right")):
            pairs, block = blocks[number]
            sides = [side for scored in pairs.read_block(block) for side in _sides(scored, pairs.name)]
            first = int(ends[number]) - len(sides)
            for place in batch[(batch >= first) & (batch < ends[number])] - first:
                if len(drawn) < num_completions:
                    drawn[completion_key(sides[place].completion)] = sides[place]
        if len(drawn) >= num_completions:
            break
    return list(drawn.values())


def _sides(scored: ScoredPair, pair_set: str) -> list[_Drawn]:
    row = f"{scored.pair.row} of {pair_set}"
    return [
        _Drawn(scored.pair.chosen, scored.ref_chosen, row),
        _Drawn(scored.pair.rejected, scored.ref_rejected, row),
    ]


def _report(reference_id: str, dtype: str, drawn: list[_Drawn], found: list[Score]) -> RescoreReport:
    sums, sizes = GapSums(), []
    for one, other in zip(drawn, found, strict=True):
        gaps_N = one.stored.token_logps.astype(np.float64) - other.token_logps
        sums.add(gaps_N, other.token_logps)
        sizes.append(np.abs(gaps_N))
    worst = int(np.argmax([size.max() for size in sizes]))
    together = np.concatenate(sizes)
    largest_allowed, mean_allowed = TOKEN_TOLERANCES[dtype]
    return RescoreReport(
        reference=reference_id,
        completions=len(drawn),
        tokens=len(together),
        largest_gap=float(together.max()),
        mean_gap=float(together.mean()),
        largest_allowed=largest_allowed,
        mean_allowed=mean_allowed,
        worst=completion_key(drawn[worst].completion).hex(),
        together=sums.problem(dtype),
    )
