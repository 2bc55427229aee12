"""Completions -> scores, layer by layer: those of `score_completions`, to the bit in the same chunks.

A stream's chunks, batches of padded rows, or rows of the model's own forward are the passes of `windows.py`.
The keys and values of a stream's open path are on the device for one layer at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from dpo_cache.lm.budget import Budget, is_out_of_memory
from dpo_cache.lm.forest.layout import build_forest, count_forest_tokens, split_by_tokens
from dpo_cache.lm.forest.stream import Chunk, Stream
from dpo_cache.lm.kernels.head import token_logps
from dpo_cache.lm.layerwise.own_forward import own_code, own_pass, split_places
from dpo_cache.lm.layerwise.paths import CarriedPaths
from dpo_cache.lm.layerwise.windows import LayerMajor, Pass
from dpo_cache.lm.model.parts import head_of
from dpo_cache.lm.progress import ScoringStep
from dpo_cache.lm.rows import logps_of_rows, rows_pass
from dpo_cache.lm.scoring import ChunkRunner, Collector, forest_arguments
from dpo_cache.types import Completion, Score

if TYPE_CHECKING:
    from dpo_cache.lm.self_check import AttentionChoice

Found = list[tuple[int, Score]]  # position of a completion, score


@dataclass(frozen=True)
class Work:
    """The passes of some completions, and what makes scores of their results, which come in order."""

    num_tokens: int
    passes: Iterator[Pass]
    collect: Callable[[Any], Found]


@torch.no_grad()
def score_layer_major(
    model: PreTrainedModel,
    completions: Sequence[Completion],
    attention: AttentionChoice,
    budget: Budget,
    layer_major: LayerMajor,
) -> Iterator[ScoringStep]:
    """Yield a step without scores for each layer that a window has passed, then those with its scores.

    Where memory runs out, the completions that are left are laid out again, in smaller chunks.
    """
    if attention.name == "forest":
        budget.keep_below(attention.max_tokens)
    budget.has_stopped = True  # passes of a window are not timed one by one
    run = layer_major.around(model) if attention.is_whole else layer_major
    waiting, num_run = list(range(len(completions))), 0
    while waiting:
        work = _work(model, [completions[index] for index in waiting], attention, budget)
        left, total_tokens = set(waiting), num_run + work.num_tokens
        try:
            with own_code(model) if attention.is_whole else nullcontext():
                for done in run.run(work.passes):
                    found = [] if done.place is None else work.collect(done.result)
                    scores = [(waiting[place], score) for place, score in found]
                    num_run += done.num_tokens
                    left -= dict(scores).keys()
                    is_followed = done.place is not None and not done.ends_window
                    yield ScoringStep(done.num_tokens, total_tokens, scores, is_followed)
        except RuntimeError as error:
            if not is_out_of_memory(error, model.device):
                raise
            budget.halve(error)
        waiting = sorted(left)


def _work(
    model: PreTrainedModel, completions: list[Completion], attention: AttentionChoice, budget: Budget
) -> Work:
    if attention.is_whole:
        return whole_work(model, completions)
    if attention.name == "rows":
        return rows_work(model, completions, budget.tokens, attention.max_rows)
    return stream_work(model, completions, budget.tokens, attention.kernel)


def stream_work(
    model: PreTrainedModel, completions: Sequence[Completion], chunk_tokens: int, kernel: str
) -> Work:
    """The chunks of a stream."""
    stream, paths = Stream(completions), CarriedPaths(model.device)
    runner, collector = ChunkRunner(model, stream, kernel, paths.current), Collector(stream)
    waiting: deque[Chunk] = deque()

    def passes() -> Iterator[Pass]:
        for chunk in stream.chunks(lambda: chunk_tokens):
            waiting.append(chunk)
            yield _chunk_pass(runner, chunk, paths)

    def collect(logps_T: torch.Tensor) -> Found:
        return collector.collect(waiting.popleft(), logps_T.cpu().numpy())

    return Work(len(stream), passes(), collect)


def _chunk_pass(runner: ChunkRunner, chunk: Chunk, paths: CarriedPaths) -> Pass:
    if not len(chunk):  # completions that end in an earlier one's tokens
        return Pass(None, lambda _: torch.empty(0), 0)
    return Pass(
        runner.arguments(chunk),
        lambda outputs: runner.logps(chunk, outputs[0][0]),
        len(chunk),
        paths,
        int(chunk.depths_C[0]),
    )


def rows_work(
    model: PreTrainedModel, completions: Sequence[Completion], batch_tokens: int, max_rows: int | None
) -> Work:
    """Batches of padded rows, longest first, each with at most `batch_tokens` or one row."""
    order = sorted(range(len(completions)), key=lambda index: -len(completions[index]))
    batches: deque[list[int]] = deque()
    while order:
        size = min(max(1, batch_tokens // len(completions[order[0]])), max_rows or len(order))
        batches.append(order[:size])
        order = order[size:]
    num_tokens = sum(len(batch) * len(completions[batch[0]]) for batch in batches)
    passes = (batch_pass(model, [completions[index] for index in batch]) for batch in [*batches])

    def collect(logps: list[torch.Tensor]) -> Found:
        return [
            (index, Score(values.cpu().numpy()))
            for index, values in zip(batches.popleft(), logps, strict=True)
        ]

    return Work(num_tokens, passes, collect)


def whole_work(model: PreTrainedModel, completions: Sequence[Completion]) -> Work:
    """Rows of the model's own forward, one at a time; passes of the whole model."""
    parts = [(place, part) for place, one in enumerate(completions) for part in split_places(model, one)]
    waiting = deque(parts)
    found: list[torch.Tensor] = []

    def collect(logps: torch.Tensor) -> Found:
        place, _ = waiting.popleft()
        found.append(logps)
        if waiting and waiting[0][0] == place:
            return []
        score = Score(torch.cat(found).numpy())
        found.clear()
        return [(place, score)]

    passes = (own_pass(model, completions[place], part) for place, part in parts)
    return Work(sum(len(completions[place]) for place, _ in parts), passes, collect)


def forest_work(
    model: PreTrainedModel, completions: Sequence[Completion], most_tokens: int, kernel: str
) -> Work:
    """Whole forests of at most so many tokens, each in one row."""
    parts = deque(split_by_tokens([*completions], most_tokens))
    passes = (forest_pass(model, part, kernel) for part in [*parts])
    first = 0

    def collect(logps: list[torch.Tensor]) -> Found:
        nonlocal first
        start, first = first, first + len(logps)
        return [(start + place, Score(values.cpu().numpy())) for place, values in enumerate(logps)]

    return Work(sum(map(count_forest_tokens, parts)), passes, collect)


def batch_pass(model: PreTrainedModel, completions: Sequence[Completion]) -> Pass:
    """A batch of padded rows; the result is the log-probs float32 [T] of each completion."""
    rows = rows_pass(model, completions)
    return Pass(
        rows.arguments,
        lambda outputs: logps_of_rows(model, completions, rows.read(outputs)),
        rows.arguments["input_ids"].numel(),
    )


def forest_pass(model: PreTrainedModel, completions: Sequence[Completion], kernel: str) -> Pass:
    """A whole forest in one row; the result is the log-probs float32 [T] of each completion."""
    forest = build_forest(completions)

    def read(outputs: Any) -> list[torch.Tensor]:
        hidden_LD, head = outputs[0][0], head_of(model)
        vocab_size = model.config.get_text_config().vocab_size
        logps = []
        for target in forest.targets:
            targets_T = torch.from_numpy(forest.tokens_L[target]).to(model.device)
            logps.append(token_logps(hidden_LD[forest.parents_L[target]], head, targets_T, vocab_size))
        return logps

    return Pass(forest_arguments(model, forest, kernel), read, len(forest))
