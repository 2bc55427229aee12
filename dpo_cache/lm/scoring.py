"""Completions -> scores, in one pass over a stream of tokens.

The sorted completions are one long forest, cut into equal chunks wherever the budget falls. Keys, values
and last hidden states of the open path are carried into the next chunk, so every distinct prefix is
computed once, and memory depends on the chunk and the longest path, on nothing else.

`rows` is the plain way, for models that cannot take a forest: padded rows with the model's own attention.

C tokens of a chunk, T of them targets, D hidden size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from dpo_cache.lm.budget import Budget, is_out_of_memory, timer
from dpo_cache.lm.device import planning_device_type
from dpo_cache.lm.forest.layout import Forest
from dpo_cache.lm.forest.plans import PathPlan, plan_tree
from dpo_cache.lm.forest.segments import Segment, group_segments, last_at_each_depth
from dpo_cache.lm.forest.stream import Chunk, Stream
from dpo_cache.lm.kernels.head import token_logps
from dpo_cache.lm.model.parts import decoder_of, head_of
from dpo_cache.lm.progress import ScoringStep
from dpo_cache.types import Completion, Score


@torch.no_grad()
def score_forest(
    model: PreTrainedModel, completions: Sequence[Completion], budget: Budget, kernel: str = "segments"
) -> Iterator[ScoringStep]:
    """Score through forest attention, to which the model must be set, chunk by chunk as the budget says.

    Where memory runs out, what is not scored yet is laid out again and goes on in smaller chunks.
    """
    waiting, run_before = list(range(len(completions))), 0
    while waiting:
        stream = Stream([completions[index] for index in waiting])
        done: set[int] = set()
        total_tokens = run_before + len(stream)
        try:
            for num_tokens, scores in _run_stream(_Runner(model, stream, kernel), budget):
                run_before += num_tokens
                done.update(place for place, _ in scores)
                yield ScoringStep(
                    num_tokens, total_tokens, [(waiting[place], score) for place, score in scores]
                )
        except RuntimeError as error:
            if not is_out_of_memory(error, model.device):
                raise
            budget.halve(error)
        waiting = [index for place, index in enumerate(waiting) if place not in done]


def run_forest(model: PreTrainedModel, forest: Forest, **arguments: Any) -> Any:
    """What the decoder gives for a whole forest in one row, hidden states first; further arguments go to the
    model, set to forest attention.
    """
    return decoder_of(model)(
        input_ids=torch.from_numpy(forest.tokens_L).to(model.device)[None],
        position_ids=torch.from_numpy(forest.depths_L).to(model.device)[None],
        use_cache=False,
        forest_plan=plan_tree(forest, planning_device_type(model.device)),
        **arguments,
    )


def _run_stream(runner: _Runner, budget: Budget) -> Iterator[tuple[int, list[tuple[int, Score]]]]:
    """Per chunk: its tokens, and the completions that end in it. A GPU is given the next chunk before the
    last one is read.
    """
    collector, device = _Collector(runner.stream), runner.model.device
    ahead = 1 if device.type == "cuda" else 0
    running: deque[tuple[Chunk, _Fetched]] = deque()
    for chunk in runner.stream.chunks(lambda: budget.tokens):
        clock = timer(device, waits=not budget.has_stopped)
        started = clock()
        running.append((chunk, _Fetched(runner.run(chunk) if len(chunk) else torch.empty(0))))
        budget.note(len(chunk), clock() - started)
        if len(running) > ahead:
            first, fetched = running.popleft()
            yield len(first), collector.collect(first, fetched.wait())
    for chunk, fetched in running:
        yield len(chunk), collector.collect(chunk, fetched.wait())


class _Fetched:
    """A tensor on its way to the host; on CUDA the copy is waited for when it is needed."""

    def __init__(self, values: torch.Tensor):
        self._event = None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = values.cpu()

    def wait(self) -> np.ndarray:
        if self._event is not None:
            self._event.synchronize()
        return self._values.numpy()


class _Runner:
    """Runs chunks; carries keys, values and last hidden states of the open path from one to the next."""

    def __init__(self, model: PreTrainedModel, stream: Stream, kernel: str):
        self.model, self.stream, self.kernel = model, stream, kernel
        self.decoder, self.head = decoder_of(model), head_of(model)
        self.vocab_size = model.config.get_text_config().vocab_size
        self.paths: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.path_hidden: torch.Tensor | None = None  # [max_depth, D], by depth

    def run(self, chunk: Chunk) -> torch.Tensor:
        """Log-probs [T] of the chunk's targets, on the device."""
        device = self.model.device
        plan = self._plan(_segments(chunk))
        hidden_CD = self.decoder(
            input_ids=_to(chunk.tokens_C, device)[None],
            position_ids=_to(chunk.depths_C, device)[None],
            use_cache=False,
            forest_plan=plan,
        )[0][0]
        if self.path_hidden is None:
            self.path_hidden = hidden_CD.new_empty(self.stream.max_depth, hidden_CD.shape[1])
        predictors = self._predictors(hidden_CD, chunk.predictors_T)
        self._carry(hidden_CD, chunk)
        return token_logps(
            predictors, self.head, _to(chunk.tokens_C[chunk.targets_T], device), self.vocab_size
        )

    def _plan(self, segments: list[Segment]) -> Any:
        if self.kernel == "flex":
            from dpo_cache.lm.forest.flex import FlexPlan

            return FlexPlan(segments, self.stream.max_depth, self.paths, self.model.device)
        return PathPlan(group_segments(segments), self.stream.max_depth, self.paths)

    def _predictors(self, hidden_CD: torch.Tensor, predictors_T: np.ndarray) -> torch.Tensor:
        """Hidden states [T, D] that predict the targets, from this chunk or the carried path."""
        carried = np.flatnonzero(predictors_T < 0)
        found = hidden_CD[_to(np.maximum(predictors_T, 0), hidden_CD.device)]
        if len(carried):
            assert self.path_hidden is not None
            found[_to(carried, hidden_CD.device)] = self.path_hidden[
                _to(-1 - predictors_T[carried], hidden_CD.device)
            ]
        return found

    def _carry(self, hidden_CD: torch.Tensor, chunk: Chunk) -> None:
        """Keep the last hidden states by depth."""
        assert self.path_hidden is not None
        depths, places = last_at_each_depth(chunk.depths_C)
        self.path_hidden[_to(depths, hidden_CD.device)] = hidden_CD[_to(places, hidden_CD.device)]


class _Collector:
    """Puts the log-probs of chunks together to those of completions."""

    def __init__(self, stream: Stream):
        self._completions = stream.completions
        # along the open path; NaN for prompt tokens
        self._path_logps = np.full(stream.max_depth, np.nan, np.float32)
        # One array for all scores: small ones between the large tensors of each chunk would scatter the heap,
        # which then grows.
        self._room = np.empty(sum(completion.num_tokens for completion in stream.completions), np.float32)
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
    """The chunk's pieces, those that continue the one before them joined to it."""
    segments: list[Segment] = []
    for piece in chunk.pieces:
        if segments and piece.depth == segments[-1].end_depth:
            segments[-1] = Segment(segments[-1].start, piece.end, segments[-1].depth)
        elif piece.end > piece.start:
            segments.append(Segment(piece.start, piece.end, piece.depth))
    return segments


def _to(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
