"""Which attention a model is run with, proved on the model itself before anything is stored.

Of the families that transformers ships, most are exact under forest attention, some refuse it, and a few
take it and are silently wrong. So a small forest and the same sequences as plain rows are scored first,
and the forest is used only where they agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from dpo_cache.errors import ModelError, first_line
from dpo_cache.lm.budget import Budget, is_out_of_memory
from dpo_cache.lm.forest.attention import FOREST_ATTENTION, PlanLostError, use_forest_attention
from dpo_cache.lm.forest.layout import build_forest
from dpo_cache.lm.kernels.head import token_logps
from dpo_cache.lm.model.parts import has_plain_head, head_of
from dpo_cache.lm.model.quantization import rounding_dtype
from dpo_cache.lm.progress import ScoringStep
from dpo_cache.lm.rows import row_logps, score_rows
from dpo_cache.lm.scoring import run_forest, score_forest
from dpo_cache.types import TOKEN_TOLERANCES, Completion

# between forest and rows
TOLERANCES = {getattr(torch, name): gaps for name, gaps in TOKEN_TOLERANCES.items()}


@dataclass(frozen=True)
class AttentionChoice:
    """The way a model is run: `forest` or `rows`, why, and how many rows fit in a batch (None: any
    number).
    """

    name: str
    reason: str
    gap: float = 0.0  # largest difference to plain rows in the self-check, nats per token
    max_rows: int | None = None
    has_plain_head: bool = (
        False  # the LM head is one matrix product, whose gradients are computed slice by slice
    )
    kernel: str = (
        "segments"  # how the forest's attention is computed: segment by segment, or by FlexAttention
    )
    original: str | None = None  # the attention that the model came with, where it was switched to the forest


@torch.no_grad()
def choose_attention(model: PreTrainedModel, requested: str = "auto", *, max_length: int) -> AttentionChoice:
    """Switch the model to the forest if it is exact there for sequences up to `max_length`; else to plain
    rows.

    Raises `ModelError` for a model that is not causal, and where `requested` is `forest` but it is not exact.
    """
    original = model.config._attn_implementation
    assert original != FOREST_ATTENTION, "a model's attention is chosen once"
    completions = _check_completions(model, max_length)
    try:
        expected = [row_logps(model, [completion])[0].cpu() for completion in completions]
    except (KeyError, AttributeError, TypeError, NotImplementedError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be run as a decoder and a head ({first_line(error)}).\n"
            "Give a text-only causal LM of another family."
        ) from error
    if not all(bool(logps.isfinite().all()) for logps in expected):
        raise ModelError(
            f"{type(model).__name__} gives log-probs that are NaN or infinite.\n"
            "Its weights may be damaged, or the dtype too small for it: try `dtype` float32."
        )
    length_problem = _length_dependent(model, max_length)
    if not length_problem:
        _check_causality(expected, model)
    problem: str | None = "asked for" if requested == "rows" else length_problem
    if problem is None:
        for kernel in ("flex", "segments") if model.device.type == "cuda" else ("segments",):
            problem, gap = _forest_problem(model, completions, expected, kernel)
            if problem is None:
                reason = f"agrees with plain rows within {gap:.1e} nats per token"
                return AttentionChoice(
                    "forest",
                    reason,
                    gap,
                    has_plain_head=has_plain_head(model),
                    kernel=kernel,
                    original=original,
                )
        if model._can_set_attn_implementation():
            model.set_attn_implementation(original)
    if requested == "forest":
        raise ModelError(
            f"{type(model).__name__} cannot use forest attention: {problem}.\nUse `attention` auto or rows."
        )
    if length_problem:
        return AttentionChoice("rows", f"{length_problem}, so one row at a time", max_rows=1)
    return _rows_attention(model, completions, expected, problem or "")


def score_completions(
    model: PreTrainedModel, completions: Sequence[Completion], attention: AttentionChoice, budget: Budget
) -> Iterator[ScoringStep]:
    """Scores as they come, about as many tokens at a time as the budget says."""
    if attention.name == "forest":
        return score_forest(model, completions, budget, attention.kernel)
    return score_rows(model, completions, budget, attention.max_rows)


def _rows_attention(
    model: PreTrainedModel, completions: list[Completion], expected: list[torch.Tensor], reason: str
) -> AttentionChoice:
    padded = row_logps(model, completions)
    if _gap_problem(padded, expected, rounding_dtype(model)) is None:
        return AttentionChoice("rows", reason)
    return AttentionChoice("rows", f"{reason}; padding changes its results, so one row at a time", max_rows=1)


def _forest_problem(
    model: PreTrainedModel, completions: list[Completion], expected: list[torch.Tensor], kernel: str
) -> tuple[str | None, float]:
    """Why the forest cannot be used (None if it can), and the largest gap seen."""
    if not use_forest_attention(model):
        return "its code does not take another attention function", 0.0
    num_tokens = sum(len(completion.sequence_ids) for completion in completions)
    largest = 0.0
    try:
        for size in (7, num_tokens) if num_tokens < 400 else (97, num_tokens):
            budget = Budget(size, model.device, lambda _: None)
            found = dict(
                entry
                for progress in score_forest(model, completions, budget, kernel)
                for entry in progress.scores
            )
            streamed = [torch.from_numpy(found[index].token_logps) for index in range(len(completions))]
            problem, gap = _compare(streamed, expected, rounding_dtype(model))
            largest = max(largest, gap)
            if problem:
                return problem, gap
        problem, gap = _compare(_tree_logps(model, completions), expected, rounding_dtype(model))
        return problem, max(largest, gap)
    except PlanLostError:
        return "its code does not hand the plan of the forest on to its attention", largest
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        if is_out_of_memory(error, model.device):
            raise ModelError(
                "out of memory on a few short sequences, before anything was scored.\n"
                "Use `dtype` bfloat16, or a device with more memory."
            ) from error
        # whatever a model's code makes of an attention it does not know, plain rows still serve it
        return f"its code does not take forest attention ({type(error).__name__})", largest


def _tree_logps(model: PreTrainedModel, completions: list[Completion]) -> list[torch.Tensor]:
    forest = build_forest(completions)
    hidden = run_forest(model, forest)[0][0]
    head, vocab_size = head_of(model), model.config.get_text_config().vocab_size
    return [
        token_logps(
            hidden[forest.parents_L[target]],
            head,
            torch.from_numpy(forest.tokens_L[target]).to(model.device),
            vocab_size,
        )
        for target in forest.targets
    ]


def _compare(
    found: list[torch.Tensor], expected: list[torch.Tensor], dtype: torch.dtype
) -> tuple[str | None, float]:
    gaps = torch.cat([(one.cpu() - other.cpu()).abs() for one, other in zip(found, expected, strict=True)])
    largest_allowed, mean_allowed = TOLERANCES[dtype]
    largest, mean = float(gaps.max()), float(gaps.mean())
    if largest <= largest_allowed and mean <= mean_allowed:  # false for NaN
        return None, largest
    return f"it differs from plain rows by up to {largest:.2g} nats per token", largest


def _gap_problem(found: list[torch.Tensor], expected: list[torch.Tensor], dtype: torch.dtype) -> str | None:
    return _compare(found, expected, dtype)[0]


def _check_causality(expected: list[torch.Tensor], model: PreTrainedModel) -> None:
    """The first two check completions begin alike: what follows must not change the log-probs of what is
    shared.
    """
    if _gap_problem([expected[0][:4]], [expected[1][:4]], rounding_dtype(model)):
        raise ModelError(
            f"{type(model).__name__} is not causal: the log-prob of a token changes with the tokens after "
            "it.\n"
            "Give a decoder-only model (for BERT-like checkpoints, one with is_decoder=true)."
        )


def _length_dependent(model: PreTrainedModel, max_length: int) -> str | None:
    """Rotary embeddings that change with the length of the row: a forest's row is not a sequence's row."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    if not any(entry.get("rope_type") in ("dynamic", "longrope") for entry in by_layer_type):
        return None
    trained = [entry.get("original_max_position_embeddings") for entry in by_layer_type] + [
        config.max_position_embeddings
    ]
    if max_length <= min(length for length in trained if length):
        return None
    return "its rotary embedding depends on the length of the row"


def _check_completions(model: PreTrainedModel, max_length: int) -> list[Completion]:
    """A few made-up completions: shared prompts, a shared start of the answer, a lone tree, one past the
    window.
    """
    config = model.config.get_text_config()
    generator = np.random.default_rng(0)
    ids = generator.integers(0, config.vocab_size, 4096 * 4).astype(np.uint32)
    prompt, answer, other, rest = ids[:20], ids[20:32], ids[40:49], ids[100:]
    longest = min(max_length, getattr(config, "max_position_embeddings", None) or max_length)
    completions = [
        Completion(prompt, answer),
        Completion(prompt, np.concatenate([answer[:4], other])),
        Completion(prompt[:9], rest[:15]),
        Completion(prompt[:15], np.concatenate([prompt[15:], answer[:2]])),
        Completion(rest[:3], rest[50:51]),
    ]
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    for window in (window for window in windows if isinstance(window, int) and window < longest):
        length = min(longest, window + 24)
        sequence = np.resize(rest, length)
        completions.append(Completion(sequence[: length - 20], sequence[length - 20 :]))
    # alike for all, so that they share what they shared
    room = max(1, longest - max(completion.num_tokens for completion in completions))
    return [
        Completion(
            completion.prompt_ids[-room:],
            completion.completion_ids[: longest - min(room, len(completion.prompt_ids))],
        )
        for completion in completions
    ]
