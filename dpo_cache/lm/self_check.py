"""Choose the attention that a model is run with, and check it on the model before anything is stored.

Of the model families in transformers, most are exact under forest attention, some refuse it, and a few
accept it and are silently wrong. So a small forest and the same sequences as plain rows are scored first,
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
    """How a model is run, and why."""

    name: str  # forest or rows
    reason: str
    gap: float = 0.0  # largest difference to plain rows in the self-check, nats per token
    max_rows: int | None = None  # in a batch; None: any number
    # the LM head is one matrix product, whose gradients are computed slice by slice
    has_plain_head: bool = False
    kernel: str = "segments"  # of the forest's attention: segments, or flex for FlexAttention
    original: str | None = None  # the model's own attention, if it was switched to the forest


@torch.no_grad()
def choose_attention(model: PreTrainedModel, requested: str = "auto", *, max_length: int) -> AttentionChoice:
    """Switch the model to the forest if it is exact there for sequences up to `max_length`; else to plain
    rows.

    Raises `ModelError` for a model that is not causal, and where `requested` is `forest` but it is not exact.
    """
    original = model.config._attn_implementation
    assert original != FOREST_ATTENTION, "a model's attention is chosen once"
    completions = _check_completions(model, max_length)
    expected = _plain_logps(model, completions)
    length_problem = _length_dependent(model, max_length)
    if not length_problem:
        _check_causality(expected, model)
    problem = "requested" if requested == "rows" else length_problem
    if not problem:
        for kernel in ("flex", "segments") if model.device.type == "cuda" else ("segments",):
            problem, gap = _forest_problem(model, completions, expected, kernel)
            if not problem:
                return AttentionChoice(
                    "forest",
                    f"agrees with plain rows within {gap:.1e} nats per token",
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
    if _compare(row_logps(model, completions), expected, model)[0]:
        reason = f"{problem}; padding changes its results, so one row at a time"
        return AttentionChoice("rows", reason, max_rows=1)
    return AttentionChoice("rows", problem)


def score_completions(
    model: PreTrainedModel, completions: Sequence[Completion], attention: AttentionChoice, budget: Budget
) -> Iterator[ScoringStep]:
    """Scores as they come, about as many tokens at a time as the budget says."""
    if attention.name == "forest":
        return score_forest(model, completions, budget, attention.kernel)
    return score_rows(model, completions, budget, attention.max_rows)


def _plain_logps(model: PreTrainedModel, completions: list[Completion]) -> list[torch.Tensor]:
    """Token log-probs of each completion, run as one row by itself. Raises `ModelError`."""
    try:
        logps = [row_logps(model, [completion])[0].cpu() for completion in completions]
    except (KeyError, AttributeError, TypeError, NotImplementedError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be run as a decoder and a head ({first_line(error)}).\n"
            "Give a text-only causal LM of another family."
        ) from error
    if not torch.cat(logps).isfinite().all():
        raise ModelError(
            f"{type(model).__name__} gives log-probs that are NaN or infinite.\n"
            "Its weights may be damaged, or the dtype too small for it: try `dtype` float32."
        )
    return logps


def _forest_problem(
    model: PreTrainedModel, completions: list[Completion], expected: list[torch.Tensor], kernel: str
) -> tuple[str, float]:
    """Why the forest cannot be used (empty if it can), and the largest gap to the expected log-probs."""
    if not use_forest_attention(model):
        return "its code does not take another attention function", 0.0
    largest = 0.0
    try:
        for logps in _forest_logps(model, completions, kernel):
            problem, gap = _compare(logps, expected, model)
            largest = max(largest, gap)
            if problem:
                return problem, largest
        return "", largest
    except PlanLostError:
        return "its code does not pass the plan of the forest to its attention", largest
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        if is_out_of_memory(error, model.device):
            raise ModelError(
                "out of memory on a few short sequences, before anything was scored.\n"
                "Use `dtype` bfloat16, or a device with more memory."
            ) from error
        # a model's code may fail in any way on an attention it does not know; plain rows still work
        return f"its code does not take forest attention ({type(error).__name__})", largest


def _forest_logps(
    model: PreTrainedModel, completions: list[Completion], kernel: str
) -> Iterator[list[torch.Tensor]]:
    """Token log-probs of each completion: streamed in small chunks, in one chunk, and as one forest."""
    num_tokens = sum(map(len, completions))
    for size in (7 if num_tokens < 400 else 97, num_tokens):
        steps = score_forest(model, completions, Budget(size, model.device, lambda _: None), kernel)
        found = dict(entry for step in steps for entry in step.scores)
        yield [torch.from_numpy(found[index].token_logps) for index in range(len(completions))]
    forest = build_forest(completions)
    hidden = run_forest(model, forest)[0][0]
    head, vocab_size = head_of(model), model.config.get_text_config().vocab_size
    yield [
        token_logps(
            hidden[forest.parents_L[target]],
            head,
            torch.from_numpy(forest.tokens_L[target]).to(model.device),
            vocab_size,
        )
        for target in forest.targets
    ]


def _compare(
    found: list[torch.Tensor], expected: list[torch.Tensor], model: PreTrainedModel
) -> tuple[str, float]:
    """How they differ beyond the model's rounding (empty if they do not), and the largest gap."""
    gaps = torch.cat([(one.cpu() - other).abs() for one, other in zip(found, expected, strict=True)])
    largest_allowed, mean_allowed = TOLERANCES[rounding_dtype(model)]
    largest, mean = float(gaps.max()), float(gaps.mean())
    if largest <= largest_allowed and mean <= mean_allowed:  # false for NaN
        return "", largest
    return f"it differs from plain rows by up to {largest:.2g} nats per token", largest


def _check_causality(expected: list[torch.Tensor], model: PreTrainedModel) -> None:
    """Raise `ModelError` where the first two check completions, which share their first 4 tokens, have other
    log-probs there.
    """
    if _compare([expected[0][:4]], [expected[1][:4]], model)[0]:
        raise ModelError(
            f"{type(model).__name__} is not causal: the log-prob of a token changes with the tokens after "
            "it.\n"
            "Give a decoder-only model (for BERT-like checkpoints, one with is_decoder=true)."
        )


def _length_dependent(model: PreTrainedModel, max_length: int) -> str:
    """Why rows of other lengths have other log-probs (empty if they do not): the rotary embedding depends on
    the row's length.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    if not any(entry.get("rope_type") in ("dynamic", "longrope") for entry in by_layer_type):
        return ""
    trained = [entry.get("original_max_position_embeddings") for entry in by_layer_type] + [
        config.max_position_embeddings
    ]
    if max_length <= min(length for length in trained if length):
        return ""
    return "its rotary embedding depends on the length of the row"


def _check_completions(model: PreTrainedModel, max_length: int) -> list[Completion]:
    """A few random completions: shared prompts, a shared start of the answer, a tree of its own, one longer
    than the window.
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
    # the same cut for all, so that shared prefixes stay shared
    room = max(1, longest - max(completion.num_tokens for completion in completions))
    return [
        Completion(
            completion.prompt_ids[-room:],
            completion.completion_ids[: longest - min(room, len(completion.prompt_ids))],
        )
        for completion in completions
    ]
