"""Completions -> scores, in one pass over a stream of tokens.

The sorted completions are one long forest, cut into equal chunks of the budget's tokens. Keys, values and
last hidden states of the open path are carried into the next chunk, so every distinct prefix is computed
once, and memory depends only on the chunk and the longest path.

C tokens of a chunk, T of them targets, D hidden size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from dpo_cache.lm.budget import Budget, is_out_of_memory, now
from dpo_cache.lm.device import to_device
from dpo_cache.lm.forest.kernels import Paths, plan_chunk, plan_forest
from dpo_cache.lm.forest.layout import Forest
from dpo_cache.lm.forest.segments import Segment, last_at_each_depth
from dpo_cache.lm.forest.stream import Chunk, Stream
from dpo_cache.lm.kernels.head import token_logps
from dpo_cache.lm.model.parts import decoder_of, head_of
from dpo_cache.lm.progress import ScoringStep
from dpo_cache.types import Completion, Score


@torch.no_grad()
def score_forest(
    model: PreTrainedModel, completions: Sequence[Completion], budget: Budget, kernel: str = "segments"
) -> Iterator[ScoringStep]:
    """Score with forest attention, to which the model must be set, in chunks of the budget's tokens.

    Where memory runs out, the completions that are left are laid out again, in smaller chunks.
    """
    waiting, num_run = list(range(len(completions))), 0
    while waiting:
        stream, left = Stream([completions[index] for index in waiting]), set(waiting)
        total_tokens = num_run + len(stream)
        try:
            for num_tokens, found in _run_stream(ChunkRunner(model, stream, kernel), budget):
                scores = [(waiting[place], score) for place, score in found]
                num_run += num_tokens
                left -= dict(scores).keys()
                yield ScoringStep(num_tokens, total_tokens, scores, trial_tokens=budget.trial_tokens)
        except RuntimeError as error:
            if not is_out_of_memory(error, model.device):
                raise
            budget.halve(error)
        waiting = sorted(left)


def run_forest(model: PreTrainedModel, forest: Forest, kernel: str, **arguments: Any) -> Any:
    """The decoder's output for a whole forest in one row, hidden states first; further arguments are the
    model's, which must be set to forest attention.
    """
    return decoder_of(model)(**forest_arguments(model, forest, kernel, **arguments))


def forest_arguments(model: PreTrainedModel, forest: Forest, kernel: str, **arguments: Any) -> dict[str, Any]:
    """The decoder's arguments for a whole forest, whose attention this kernel computes."""
    return {
        "input_ids": to_device(forest.tokens_L, model.device)[None],
        "position_ids": to_device(forest.depths_L, model.device)[None],
        "use_cache": False,
        "forest_plan": plan_forest(forest, model.device, kernel),
        **arguments,
    }


def _run_stream(runner: ChunkRunner, budget: Budget) -> Iterator[tuple[int, list[tuple[int, Score]]]]:
    """Yield for each chunk its number of tokens and the completions that end in it. A GPU gets the next chunk
    before the scores of the last one are read.
    """
    collector, device = Collector(runner.stream), runner.model.device
    ahead = 1 if device.type == "cuda" else 0
    running: deque[tuple[Chunk, Callable[[], np.ndarray]]] = deque()
    for chunk in runner.stream.chunks(lambda: budget.tokens):
        searches = not budget.has_stopped
        started = now(device, waits=searches)
        running.append((chunk, _copy_to_host(runner.run(chunk) if len(chunk) else torch.empty(0))))
        budget.note(len(chunk), now(device, waits=searches) - started)
        if len(running) > ahead:
            first, wait = running.popleft()
            yield len(first), collector.collect(first, wait())
    for chunk, wait in running:
        yield len(chunk), collector.collect(chunk, wait())


def _copy_to_host(values: torch.Tensor) -> Callable[[], np.ndarray]:
    """Start to copy a tensor to the host; the returned function waits for the copy and returns it."""
    if values.device.type != "cuda":
        return values.cpu().numpy
    pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    pinned.copy_(values, non_blocking=True)
    event = torch.cuda.current_stream(values.device).record_event()

    def wait() -> np.ndarray:
        event.synchronize()
        return pinned.numpy()

    return wait


class ChunkRunner:
    """Runs chunks; carries keys, values and last hidden states of the open path from one to the next."""

    def __init__(self, model: PreTrainedModel, stream: Stream, kernel: str, paths: Paths | None = None):
        self.model, self.stream, self.kernel = model, stream, kernel
        self.decoder, self.head = decoder_of(model), head_of(model)
        self.vocab_size = model.config.get_text_config().vocab_size
        self.paths: Paths = {} if paths is None else paths
        self.path_hidden: torch.Tensor | None = None  # [max_depth, D], by depth

    def run(self, chunk: Chunk) -> torch.Tensor:
        """Log-probs [T] of the chunk's targets, on the device."""
        return self.logps(chunk, self.decoder(**self.arguments(chunk))[0][0])

    def arguments(self, chunk: Chunk) -> dict[str, Any]:
        """The decoder's arguments for a chunk."""
        place = partial(to_device, device=self.model.device)
        return {
            "input_ids": place(chunk.tokens_C)[None],
            "position_ids": place(chunk.depths_C)[None],
            "use_cache": False,
            "forest_plan": self._plan(_segments(chunk)),
        }

    def logps(self, chunk: Chunk, hidden_CD: torch.Tensor) -> torch.Tensor:
        """Log-probs [T] of the chunk's targets from its last hidden states; chunks come in order."""
        place = partial(to_device, device=self.model.device)
        if self.path_hidden is None:
            self.path_hidden = hidden_CD.new_empty(self.stream.max_depth, hidden_CD.shape[1])
        predictors_TD = hidden_CD[place(np.maximum(chunk.predictors_T, 0))]
        carried = np.flatnonzero(chunk.predictors_T < 0)  # predicted by the carried path
        if len(carried):
            depths = -1 - chunk.predictors_T[carried]
            predictors_TD[place(carried)] = self.path_hidden[place(depths)]
        depths, places = last_at_each_depth(chunk.depths_C)
        self.path_hidden[place(depths)] = hidden_CD[place(places)]
        targets_T = place(chunk.tokens_C[chunk.targets_T])
        return token_logps(predictors_TD, self.head, targets_T, self.vocab_size)

    def _plan(self, segments: list[Segment]) -> Any:
        return plan_chunk(segments, self.stream.max_depth, self.paths, self.model.device, self.kernel)


class Collector:
    """Joins the log-probs of chunks to those of completions."""

    def __init__(self, stream: Stream):
        self._completions = stream.completions
        # along the open path; NaN for prompt tokens
        self._path_logps = np.full(stream.max_depth, np.nan, np.float32)
        # One array for all scores: small arrays between the large tensors of each chunk would fragment the
        # heap.
        self._room = np.empty(sum(completion.num_tokens for completion in self._completions), np.float32)
        self._used = 0

    def collect(self, chunk: Chunk, logps_T: np.ndarray) -> list[tuple[int, Score]]:
        """The completions that end in this chunk."""
        logps_C = np.full(len(chunk), np.nan, np.float32)
        logps_C[chunk.targets_T] = logps_T
        scores = []
        for piece in chunk.pieces:
            self._path_logps[piece.depth : piece.end_depth] = logps_C[piece.start : piece.end]
            if piece.ends is not None:
                completion = self._completions[piece.ends]
                values = self._room[self._used : self._used + completion.num_tokens]
                values[:] = self._path_logps[len(completion.prompt_ids) : len(completion)]
                self._used += completion.num_tokens
                scores.append((piece.ends, Score(values)))
        return scores


def _segments(chunk: Chunk) -> list[Segment]:
    """The chunk's pieces, each joined to the one before if it continues that one."""
    segments: list[Segment] = []
    for piece in chunk.pieces:
        if segments and piece.depth == segments[-1].end_depth:
            segments[-1] = Segment(segments[-1].start, piece.end, segments[-1].depth)
        elif piece.end > piece.start:
            segments.append(Segment(piece.start, piece.end, piece.depth))
    return segments
