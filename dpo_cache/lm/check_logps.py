"""Log-probs of the self-check's rows: by the model's own forward, in each other way, and how they differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
import torch
from transformers import PreTrainedModel

from dpo_cache.errors import ModelError, first_line
from dpo_cache.lm.budget import Budget, is_out_of_memory
from dpo_cache.lm.check_rows import CheckRows
from dpo_cache.lm.forest.attention import PlanLostError
from dpo_cache.lm.forest.kernels import SEGMENTS
from dpo_cache.lm.forest.layout import build_forest, shared_prefix, split_by_tokens
from dpo_cache.lm.kernels.head import token_logps
from dpo_cache.lm.layerwise.check import logps_together
from dpo_cache.lm.layerwise.own_forward import all_own_logps
from dpo_cache.lm.layerwise.record import NotLayerMajorError
from dpo_cache.lm.layerwise.scoring import batch_pass, forest_work, stream_work
from dpo_cache.lm.layerwise.windows import LayerMajor
from dpo_cache.lm.model.parts import head_of
from dpo_cache.lm.model.quantization import rounding_dtype
from dpo_cache.lm.own_forward import own_logps
from dpo_cache.lm.rows import row_logps
from dpo_cache.lm.scoring import run_forest, score_forest
from dpo_cache.types import TOKEN_TOLERANCES, Completion, GapSums

# between the model's own forward and any other way
TOLERANCES = {getattr(torch, name): gaps for name, gaps in TOKEN_TOLERANCES.items()}

STREAM, FOREST = "stream", "forest"  # how a run uses the forest: in chunks to score, in one row to train
SMALL_CHUNK, MEDIUM_CHUNK = 23, 97  # tokens: short rows are cut into several chunks
NEAR_TOKENS = 256  # rows up to this length, too

# A model's code may raise these on an attention, a mask or a shape that it does not know; a lack of memory is
# a `RuntimeError`, too.
FAILURES = (LookupError, AttributeError, TypeError, ValueError, RuntimeError, AssertionError)

Problem = tuple[str, float]  # why a way cannot be used (empty if it can), and the largest gap, nats a token


def expect(
    model: PreTrainedModel, completions: Sequence[Completion], layer_major: LayerMajor | None = None
) -> list[torch.Tensor]:
    """Token log-probs of each completion by the model's own forward, one plain row each. Raises
    `ModelError`.
    """
    try:
        if layer_major is not None:
            logps = _expect_together(model, completions, layer_major)
        else:
            logps = [own_logps(model, completion) for completion in completions]
    except FAILURES as error:
        raise_out_of_memory(error, model)
        raise ModelError(
            f"{type(model).__name__} fails on a row of plain tokens ({type(error).__name__}: "
            f"{first_line(error)}).\nGive a text-only causal LM of another family."
        ) from error
    if not torch.cat(logps).isfinite().all():
        raise ModelError(
            f"{type(model).__name__} gives log-probs that are NaN or infinite.\n"
            "Its weights may be damaged, or the dtype too small for it: try `dtype` float32."
        )
    return logps


def _expect_together(
    model: PreTrainedModel, completions: Sequence[Completion], layer_major: LayerMajor
) -> list[torch.Tensor]:
    """Layer by layer. Raises `NotLayerMajorError` unless a row has the log-probs of a plain call."""
    if layer_major.witness is None:
        return all_own_logps(model, completions, layer_major)
    row, logps_T = layer_major.witness
    *logps, found_T = all_own_logps(model, [*completions, row], layer_major)
    if problem := compare([found_T], [logps_T], model)[0]:
        raise NotLayerMajorError(f"layer by layer, {problem}")
    return logps


def other_end(completion: Completion) -> Completion | None:
    """The same row with other tokens at the end of its answer; None for an answer of one token."""
    kept = _num_kept(completion)
    if not kept:
        return None
    others = np.concatenate([completion.completion_ids[:kept], completion.completion_ids[kept:][::-1]])
    others[-1] = completion.prompt_ids[0]
    return Completion(completion.prompt_ids, others)


def check_causality(
    model: PreTrainedModel,
    completion: Completion,
    expected: torch.Tensor,
    changed: torch.Tensor,
    layer_major: LayerMajor | None = None,
) -> None:
    """Raise `ModelError` where log-probs at the start of its answer differ from those of its `other_end`. The
    length of the row stays the same: see `depends_on_length`.
    """
    kept = _num_kept(completion)
    if not compare([changed[:kept]], [expected[:kept]], model)[0]:
        return
    if compare(expect(model, [completion], layer_major), [expected], model)[0]:
        raise ModelError(
            f"{type(model).__name__} gives other log-probs when the same row is run again.\n"
            "Its forward draws random numbers, or rows before it have changed the model, as BigBird's "
            "block-sparse attention does. Set a seed or another attention in the config, or give another "
            "model."
        )
    raise ModelError(
        f"{type(model).__name__} is not causal: the log-prob of a token changes with the tokens after it.\n"
        "Give a decoder-only model (for BERT-like checkpoints, one with is_decoder=true)."
    )


def _num_kept(completion: Completion) -> int:
    return min(4, completion.num_tokens - 1)


def depends_on_length(
    model: PreTrainedModel, rows: Sequence[Completion], expected: Sequence[torch.Tensor]
) -> bool:
    """Return whether rows that begin alike, and are longer or shorter, have other log-probs at the same
    tokens.
    """
    for (one, one_logps), (other, other_logps) in combinations(zip(rows, expected, strict=True), 2):
        starts = len(one.prompt_ids), len(other.prompt_ids)
        first, end = max(starts), shared_prefix(one.sequence_ids, other.sequence_ids)
        if first < end and len(one) != len(other):
            both = (
                [one_logps[first - starts[0] : end - starts[0]]],
                [other_logps[first - starts[1] : end - starts[1]]],
            )
            if compare(*both, model)[0]:
                return True
    return False


@torch.no_grad()
def forest_problem(
    model: PreTrainedModel,
    rows: CheckRows,
    expected: Sequence[torch.Tensor],
    ways: Sequence[str],
    kernel: str,
    chunk_tokens: int,
    layer_major: LayerMajor | None = None,
) -> Problem:
    """Why a model that is switched to forest attention cannot be run with it, in chunks up to this size."""
    largest = 0.0
    try:
        for logps in _forest_logps(model, rows, ways, kernel, chunk_tokens, layer_major):
            problem, gap = compare(logps, expected[: len(logps)], model)
            largest = max(largest, gap)
            if problem:
                return problem, largest
        return "", largest
    except PlanLostError:
        return "its code does not pass the plan of the forest to its attention", largest
    except NotLayerMajorError as error:
        return f"in the forest {error}", largest
    except FAILURES as error:
        raise_out_of_memory(error, model)
        if kernel != SEGMENTS:
            return f"it fails ({first_line(error)})", largest
        return f"its code does not take forest attention ({type(error).__name__})", largest


@torch.no_grad()
def rows_problems(
    model: PreTrainedModel,
    rows: Sequence[Completion],
    expected: Sequence[torch.Tensor],
    batches: Sequence[Sequence[int]],
    layer_major: LayerMajor | None = None,
) -> Iterator[str]:
    """Yield for each batch why the decoder and the head cannot run it as padded rows; empty if they can.

    Layer by layer, all are run together before the first is yielded.
    """
    several = [[rows[index] for index in batch] for batch in batches]
    together: Iterator[list[torch.Tensor]] | None = None
    for batch, completions in zip(batches, several, strict=True):
        try:
            if layer_major is not None:
                if together is None:
                    together = iter(layer_major.results([batch_pass(model, one) for one in several]))
                found = next(together)
            else:
                found = row_logps(model, completions)
        except (*FAILURES, ModelError) as error:
            raise_out_of_memory(error, model)
            yield f"it cannot be run as a decoder and a head ({first_line(error)})"
        else:
            yield compare(found, [expected[index] for index in batch], model)[0]


def compare(
    found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], model: PreTrainedModel
) -> Problem:
    """How they differ beyond the model's rounding: in a token, on average, or in all tokens together."""
    signed = torch.cat([one.cpu() - other for one, other in zip(found, expected, strict=True)])
    gaps, dtype = signed.abs(), rounding_dtype(model)
    largest_allowed, mean_allowed = TOLERANCES[dtype]
    largest, mean = float(gaps.max()), float(gaps.mean())
    if not (largest <= largest_allowed and mean <= mean_allowed):  # true for NaN
        return f"it differs from plain rows by up to {largest:.2g} nats per token", largest
    sums = GapSums()
    sums.add(signed.numpy(), torch.cat(list(expected)).numpy())
    together = sums.problem(str(dtype).removeprefix("torch."))
    return f"it differs from plain rows by {together}" if together else "", largest


def raise_out_of_memory(error: BaseException, model: PreTrainedModel) -> None:
    """Raise the error again if it is a lack of memory, which is no sign of a fault in the model's code."""
    if is_out_of_memory(error, model.device):
        raise error


def _forest_logps(
    model: PreTrainedModel,
    rows: CheckRows,
    ways: Sequence[str],
    kernel: str,
    chunk_tokens: int,
    layer_major: LayerMajor | None,
) -> Iterator[list[torch.Tensor]]:
    """Token log-probs of the first rows of the check: streamed in small chunks, in chunks as large as the
    run's, and as whole forests of that size. Long rows are run only in the ways that the run uses.
    """
    near = [*rows.short, *(row for row in rows.long if len(row) <= NEAR_TOKENS)]
    small = SMALL_CHUNK if sum(map(len, near)) < 4 * MEDIUM_CHUNK else MEDIUM_CHUNK
    runs = [(STREAM, near, small, 0)]
    for way in (STREAM, FOREST):
        front, compared = (rows.filler, rows.compared) if way in ways else ([], near)
        runs.append((way, [*front, *compared], chunk_tokens, len(front)))
    if layer_major is None:
        for way, completions, size, num_front in runs:
            run = _streamed if way == STREAM else _as_forests
            yield run(model, completions, size, kernel=kernel)[num_front:]
        return
    make = {STREAM: stream_work, FOREST: forest_work}
    works = [make[way](model, completions, size, kernel) for way, completions, size, _ in runs]
    for logps, (*_, num_front) in zip(logps_together(works, layer_major), runs, strict=True):
        yield logps[num_front:]


def _streamed(
    model: PreTrainedModel, completions: list[Completion], chunk_tokens: int, *, kernel: str
) -> list[torch.Tensor]:
    steps = score_forest(model, completions, Budget(chunk_tokens, model.device, lambda _: None), kernel)
    found = dict(entry for step in steps for entry in step.scores)
    return [torch.from_numpy(found[index].token_logps) for index in range(len(completions))]


def _as_forests(
    model: PreTrainedModel, completions: list[Completion], most_tokens: int, *, kernel: str
) -> list[torch.Tensor]:
    head, vocab_size = head_of(model), model.config.get_text_config().vocab_size
    logps = []
    for part in split_by_tokens(completions, most_tokens):
        forest = build_forest(part)
        hidden_LD = run_forest(model, forest, kernel)[0][0]
        for target in forest.targets:
            targets_T = torch.from_numpy(forest.tokens_L[target]).to(model.device)
            logps.append(token_logps(hidden_LD[forest.parents_L[target]], head, targets_T, vocab_size))
    return logps
