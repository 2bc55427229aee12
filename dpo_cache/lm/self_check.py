"""Choose the way that a model is run, and check it on the model before anything is stored.

Of the model families in transformers, most are exact under forest attention, some refuse it, and a few
accept it and are silently wrong; padding changes the results of some; and a model's `forward` may do more
than its decoder and head. So some rows are run by the model's own forward, one at a time and without padding,
and then in each way, fastest first, until one gives the same log-probs:

    forest        every distinct prefix once
    rows          padded rows
    one row       one row at a time, by decoder and head
    own forward   one row at a time, by the model's own `forward`: true by definition

`check_rows.py` chooses these rows and counts their cost; `config_limits.py` lists the lengths they pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from dpo_cache.errors import ModelError
from dpo_cache.lm.budget import SIZES, Budget, is_out_of_memory
from dpo_cache.lm.check_logps import (
    FOREST,
    STREAM,
    check_causality,
    depends_on_length,
    expect,
    forest_problem,
    other_end,
    rows_problems,
)
from dpo_cache.lm.check_rows import CheckRows, Run, plan_rows
from dpo_cache.lm.config_limits import TOP_K, Limit, limits_of, rope_limit
from dpo_cache.lm.device import SPREAD, check_one_device
from dpo_cache.lm.forest.attention import FOREST_ATTENTION, set_attention, use_forest_attention
from dpo_cache.lm.forest.kernels import SEGMENTS, kernels_of
from dpo_cache.lm.layerwise.ends import Rewritten
from dpo_cache.lm.layerwise.windows import LayerMajor
from dpo_cache.lm.model.parts import has_plain_head
from dpo_cache.lm.own_forward import fits_into_memory
from dpo_cache.lm.patches import is_patched
from dpo_cache.lm.positions import most_positions
from dpo_cache.lm.progress import ScoringStep
from dpo_cache.lm.rows import score_rows
from dpo_cache.lm.scoring import score_forest
from dpo_cache.log import phase
from dpo_cache.types import Completion


@dataclass(frozen=True)
class AttentionChoice:
    """How a model is run, and why."""

    name: str  # forest or rows
    reason: str
    gap: float = 0.0  # largest difference to the model's own forward in the self-check, nats per token
    max_rows: int | None = None  # in a batch; None: any number
    # the LM head is one matrix product, whose gradients are computed slice by slice
    has_plain_head: bool = False
    kernel: str = SEGMENTS  # the kernel of the forest's attention: see `forest/kernels.py`
    original: str | None = None  # the model's own attention, if it was switched to the forest
    max_tokens: int | None = None  # most tokens of a chunk or a forest; None: any number
    limited_by: str = ""  # why chunks are smaller than the run's, if they are
    slowed_by: str = ""  # why no kernel takes all segments in one call, if the device has such kernels
    is_whole: bool = False  # rows are run by the model's own forward, not by its decoder and head

    def remark(self, model: PreTrainedModel, verb: str = "run", *, is_requested: bool = False) -> str | None:
        """One line for the log, where the model runs slower than in the forest; padded rows may be
        requested.
        """
        what = f"{type(model).__name__} is {verb}"
        if self.name == "forest":
            found = []
            if self.slowed_by:
                found.append(f"one attention call for each segment, which is slower: {self.slowed_by}")
            if self.limited_by:
                found.append(f"smaller chunks: {self.limited_by}")
            return f"{what} with {', and with '.join(found)}." if found else None
        if self.max_rows == 1:
            return f"{what} as plain rows, which is slower: {self.reason}."
        return None if is_requested else f"{what} as plain padded rows, which is slower: {self.reason}."


@phase("self-check: comparing ways to run the model")
def choose_attention(
    model: PreTrainedModel,
    requested: str = "auto",
    *,
    max_length: int,
    chunk_tokens: int | None = None,
    run_tokens: int | None = None,
    ways: Sequence[str] = (STREAM, FOREST),
    layer_major: LayerMajor | None = None,
    may_retry: bool = True,
) -> AttentionChoice:
    """Switch the model to the forest if it is exact there for sequences up to `max_length`; else to plain
    rows.

    `chunk_tokens` are the most that the run has in a chunk or a forest, `run_tokens` those of the whole run,
    which limit the cost of the check (see `check_rows.py`), and `ways` how it uses the forest. Lengths that
    the config names and no row of the check reaches are in the reason; such a model is run one row at a time.
    With `layer_major`, which runs the model's layers, the rows of each way go through them together. With
    `may_retry`, a check that runs out of memory is repeated on shorter rows.
    Raises `ModelError` for a model that is not causal, that fails on a plain row or is not on one device, and
    where `requested` is `forest` but it is not exact.
    """
    check_one_device(model)
    original = model.config._attn_implementation
    assert original != FOREST_ATTENTION, "a model's attention is chosen once"
    longest = min(max_length, most_positions(model.config) or max_length)
    chunk = chunk_tokens or SIZES.get(model.device.type, SIZES["cpu"])[-1]
    run, most_length = Run(longest, chunk, run_tokens, len(ways)), longest
    while True:
        rows = _plan(model, run, most_length)
        try:
            return _choose(model, requested, _Check(rows, run, ways, _limits(model), original, layer_major))
        except RuntimeError as error:
            if not may_retry or not is_out_of_memory(error, model.device):
                raise
            if not rows.long and not rows.filler:
                raise ModelError(
                    "out of memory on a few short sequences, before anything was scored.\n"
                    "Use `dtype` bfloat16, or a device with more memory."
                ) from error
            most_length, run = rows.longest // 2, replace(run, chunk_tokens=max(1, run.chunk_tokens // 2))


def score_completions(
    model: PreTrainedModel, completions: Sequence[Completion], attention: AttentionChoice, budget: Budget
) -> Iterator[ScoringStep]:
    """Scores as they are computed, about `budget` tokens at a time."""
    if attention.name == "forest":
        budget.keep_below(attention.max_tokens)
        return score_forest(model, completions, budget, attention.kernel)
    return score_rows(model, completions, budget, attention.max_rows, is_whole=attention.is_whole)


@dataclass(frozen=True)
class _Check:
    """The subject of a check, and its run."""

    rows: CheckRows
    run: Run
    ways: Sequence[str]
    limits: Sequence[Limit]
    original: str  # attention
    layer_major: LayerMajor | None = None


def _plan(model: PreTrainedModel, run: Run, most_length: int) -> CheckRows:
    """The rows of the check; none is so long that the model's own forward would not fit into memory."""
    while most_length > 1 and not fits_into_memory(model, most_length):
        most_length //= 2
    return plan_rows(
        model.config.get_text_config().vocab_size,
        _limits(model),
        run,
        is_known_code=_is_known_code(model),
        most_length=most_length,
    )


@torch.no_grad()
def _choose(model: PreTrainedModel, requested: str, check: _Check) -> AttentionChoice:
    first, layer_major = check.rows.short[0], check.layer_major
    changed = other_end(first)
    expected = expect(model, [*check.rows.compared, *([changed] if changed else [])], layer_major)
    if changed:
        check_causality(model, first, expected[0], expected.pop(), layer_major)
    one_row = _why_one_row(model, check, expected)
    problem = "requested" if requested == "rows" else one_row
    if not problem:
        found = _try_forest(model, check, expected)
        if isinstance(found, AttentionChoice):
            return found
        problem = found
    if requested == "forest":
        raise ModelError(
            f"{type(model).__name__} cannot use forest attention: {problem}.\nUse `attention` auto or rows."
        )
    return _choose_rows(model, check, expected, problem, one_row)


def _why_one_row(model: PreTrainedModel, check: _Check, expected: Sequence[torch.Tensor]) -> str:
    """Why rows cannot be run with others, whatever the way (empty if they may): their log-probs depend on
    their own length, or are not checked at the lengths of the data.
    """
    rope = rope_limit(model.config)
    if rope is not None and check.run.longest > rope.tokens:
        return "its rotary embedding depends on the length of the row"
    if unreached := check.rows.unreached:
        names = ", ".join(map(str, unreached))
        return (
            f"rows of the data are longer than {names}, and a check of such rows would take too long, or "
            "not fit into memory"
        )
    if depends_on_length(model, check.rows.short, expected[: len(check.rows.short)]):
        named = [str(limit) for limit in check.limits if limit.kind == TOP_K]
        because = f" (its config names {', '.join(named)})" if named else ""
        return f"the log-prob of a token changes with the length of its row{because}"
    return ""


def _try_forest(
    model: PreTrainedModel, check: _Check, expected: Sequence[torch.Tensor]
) -> AttentionChoice | str:
    """The forest with the largest chunks in which it is exact, or why it is not. Then the model has its own
    attention again.
    """
    problems: dict[str, str] = {}  # by kernel
    limits, longest = check.limits, check.run.longest
    largest = check.rows.chunk_tokens
    # no chunk passes a length that the config names, and no row does
    below = [limit.tokens - 1 for limit in limits if longest < limit.tokens <= largest]
    is_chosen = False
    try:
        if not use_forest_attention(model):
            return "its code does not take another attention function"
        for kernel in _kernels(model):
            for chunk in [largest, *below[:1]]:
                failed, gap = forest_problem(
                    model, check.rows, expected, check.ways, kernel, chunk, check.layer_major
                )
                if not failed:
                    is_chosen = True
                    found = _forest_choice(model, check, gap, kernel, chunk)
                    others = "; ".join(f"by {name}, {problem}" for name, problem in problems.items())
                    return replace(found, slowed_by=others if kernel == SEGMENTS else "")
                problems[kernel] = failed
        return problems[kernel]
    finally:
        if not is_chosen and model._can_set_attn_implementation():
            set_attention(model, check.original)


def _forest_choice(
    model: PreTrainedModel, check: _Check, gap: float, kernel: str, chunk: int
) -> AttentionChoice:
    """The forest, in chunks below each length that the config names and no chunk of the check passed."""
    beyond = next((limit for limit in check.limits if limit.tokens > chunk), None)
    max_tokens, cause = None, ""
    if not _is_known_code(model):
        max_tokens, cause = chunk, "its code is not that of transformers"
    elif beyond is not None:
        max_tokens, cause = beyond.tokens - 1, f"its config names {beyond}"
    is_limited = max_tokens is not None and max_tokens < check.run.chunk_tokens
    if is_limited:
        cause += f", and more than {max_tokens:,} tokens at once are not exact, or not checked"
    return AttentionChoice(
        "forest",
        f"agrees with plain rows within {gap:.1e} nats per token",
        gap,
        # training needs it, and the head's weights are here
        has_plain_head=check.layer_major is None and has_plain_head(model),
        kernel=kernel,
        original=check.original,
        max_tokens=max_tokens,
        limited_by=cause if is_limited else "",
    )


def _choose_rows(
    model: PreTrainedModel, check: _Check, expected: Sequence[torch.Tensor], problem: str, one_row: str
) -> AttentionChoice:
    """Padded rows, one row at a time, or the model's own forward: the first that is exact."""
    rows = check.rows.compared
    top_k = [str(limit) for limit in check.limits if limit.kind == TOP_K and limit.tokens < check.run.longest]
    if not one_row and top_k:
        one_row = f"{problem}; it attends to few keys of a row ({', '.join(top_k)}), which padding may change"
    if not one_row:
        batches = [[*range(len(check.rows.short))]]
        if check.rows.long:  # other rows padded to the longest
            batches.append([len(rows) - 1, 0, len(check.rows.short) - 1])
        if not any(rows_problems(model, rows, expected, batches, check.layer_major)):
            return AttentionChoice("rows", problem)
        one_row = f"{problem}; padding changes its results"
    single = [[index] for index in range(len(rows))]
    for failed in rows_problems(model, rows, expected, single, check.layer_major):
        if failed:
            reason = f"its forward is more than a decoder and a head: run as these two, {failed}"
            return AttentionChoice(
                "rows",
                f"{reason}; so its forward is run as a whole, one row at a time",
                max_rows=1,
                is_whole=True,
            )
    return AttentionChoice("rows", f"{one_row}, so one row at a time", max_rows=1)


def _kernels(model: PreTrainedModel) -> Sequence[str]:
    """The kernels to try; the plans of some are on one device."""
    runs_on_several = getattr(type(model), SPREAD, "") == "several devices"
    return (SEGMENTS,) if runs_on_several else kernels_of(model.device)


def _limits(model: PreTrainedModel) -> list[Limit]:
    return limits_of(model.config)


def _is_known_code(model: PreTrainedModel) -> bool:
    """Return whether the model and its parts are transformers' own classes, with their own `forward`."""
    modules = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    kinds = {type(module) for module in modules}
    places = {place for kind in kinds for place in (kind.__module__, kind.forward.__module__)}
    is_replaced = any(
        # not by this package, and not by accelerate, which calls the old one
        "forward" in module.__dict__
        and not is_patched(module)
        and not isinstance(module.forward, Rewritten)
        and not hasattr(module, "_hf_hook")
        for module in modules
    )
    return not is_replaced and all(place.startswith("transformers.") for place in places)
