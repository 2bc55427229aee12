"""Completions -> scores, in one pass over a stream of tokens.

The sorted completions are one long forest, cut into equal chunks wherever the budget falls. Keys, values
and last hidden states of the open path are carried into the next chunk, so every distinct prefix is
computed once, and memory depends on the chunk and the longest path, on nothing else.

`rows` is the plain way, for models that cannot take a forest: padded rows with the model's own attention.

C tokens of a chunk, T of them targets, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from dpo_cache.errors import ModelError
from dpo_cache.lm.attention import PathPlan, Segment, group_segments
from dpo_cache.lm.logprobs import decoder_of, head_of, token_logps
from dpo_cache.lm.stream import Chunk, Stream
from dpo_cache.types import Completion, Score


@dataclass(frozen=True)
class Progress:
    """What one chunk or batch brought: tokens run through the model, of how many in all, and the completions it finished."""

    num_tokens: int
    total_tokens: int
    scores: list[tuple[int, Score]]  # position among the completions given, score


def default_budget(device: torch.device) -> int:
    """Tokens run at once: enough for matrix products at full speed, few enough to stay in a processor's caches."""
    return 512 if device.type == "cpu" else 8192


@torch.no_grad()
def score_forest(model: PreTrainedModel, completions: Sequence[Completion], budget_tokens: int) -> Iterator[Progress]:
    """Score through forest attention, `budget_tokens` at a time; the model must be set to it."""
    stream = Stream(completions)
    runner, collector = _Runner(model, stream), _Collector(stream)
    for chunk in stream.chunks(budget_tokens):
        logps_T = runner.run(chunk).cpu().numpy() if len(chunk) else np.empty(0, np.float32)
        yield Progress(len(chunk), len(stream), _checked(collector.collect(chunk, logps_T)))


@torch.no_grad()
def score_rows(model: PreTrainedModel, completions: Sequence[Completion], budget_tokens: int, max_rows: int | None = None) -> Iterator[Progress]:
    """Score as padded rows with the model's own attention, longest first, at most `budget_tokens` with padding at once."""
    sequences = [completion.sequence_ids for completion in completions]
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
    batches = []
    while order:
        num_rows = min(max(1, budget_tokens // len(sequences[order[0]])), max_rows or len(order))
        batches.append(order[:num_rows])
        order = order[num_rows:]
    padded_tokens = [len(sequences[batch[0]]) * len(batch) for batch in batches]
    for batch, num_tokens in zip(batches, padded_tokens, strict=True):
        logps = row_logps(model, [completions[index] for index in batch])
        scores = [(index, Score(values.cpu().numpy())) for index, values in zip(batch, logps, strict=True)]
        yield Progress(num_tokens, sum(padded_tokens), _checked(scores))


def row_logps(model: PreTrainedModel, completions: Sequence[Completion]) -> list[torch.Tensor]:
    """Token log-probs float32 [T] of each completion, as one batch of right-padded rows; with gradients if they are on."""
    sequences = [torch.from_numpy(completion.sequence_ids.astype(np.int64)) for completion in completions]
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(model.device)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(model.device)
    hidden = decoder_of(model)(input_ids=ids, attention_mask=mask, use_cache=False)[0]
    starts = [len(completion.prompt_ids) for completion in completions]
    spans = [(row, start, start + completion.num_tokens) for row, (start, completion) in enumerate(zip(starts, completions, strict=True))]
    predictors = torch.cat([hidden[row, start - 1 : end - 1] for row, start, end in spans])
    targets = torch.cat([ids[row, start:end] for row, start, end in spans])
    logps = token_logps(predictors, head_of(model), targets, model.config.get_text_config().vocab_size)
    return list(logps.split([end - start for _, start, end in spans]))


class _Runner:
    """Runs chunks; carries keys, values and last hidden states of the open path from one to the next."""

    def __init__(self, model: PreTrainedModel, stream: Stream):
        self.model, self.stream = model, stream
        self.decoder, self.head = decoder_of(model), head_of(model)
        self.vocab_size = model.config.get_text_config().vocab_size
        self.paths: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.path_hidden: torch.Tensor | None = None  # [max_depth, D], by depth

    def run(self, chunk: Chunk) -> torch.Tensor:
        """Log-probs [T] of the chunk's targets, on the device."""
        device = self.model.device
        plan = PathPlan(group_segments(_segments(chunk)), self.stream.max_depth, self.paths)
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
        return token_logps(predictors, self.head, _to(chunk.tokens_C[chunk.targets_T], device), self.vocab_size)

    def _predictors(self, hidden_CD: torch.Tensor, predictors_T: np.ndarray) -> torch.Tensor:
        """Hidden states [T, D] that predict the targets, from this chunk or the carried path."""
        carried = np.flatnonzero(predictors_T < 0)
        found = hidden_CD[_to(np.maximum(predictors_T, 0), hidden_CD.device)]
        if len(carried):
            assert self.path_hidden is not None
            found[_to(carried, hidden_CD.device)] = self.path_hidden[_to(-1 - predictors_T[carried], hidden_CD.device)]
        return found

    def _carry(self, hidden_CD: torch.Tensor, chunk: Chunk) -> None:
        """Keep the last hidden states by depth; of several tokens at one depth the last is on the open path."""
        assert self.path_hidden is not None
        depths, from_the_end = np.unique(chunk.depths_C[::-1], return_index=True)
        self.path_hidden[_to(depths, hidden_CD.device)] = hidden_CD[_to(len(chunk) - 1 - from_the_end, hidden_CD.device)]


class _Collector:
    """Puts the log-probs of chunks together to those of completions."""

    def __init__(self, stream: Stream):
        self._completions = stream.completions
        self._path_logps = np.full(stream.max_depth, np.nan, np.float32)  # along the open path; NaN for prompt tokens

    def collect(self, chunk: Chunk, logps_T: np.ndarray) -> list[tuple[int, Score]]:
        """The completions that end in this chunk."""
        logps_C = np.full(len(chunk), np.nan, np.float32)
        logps_C[chunk.targets_T] = logps_T
        scores = []
        for piece in chunk.pieces:
            self._path_logps[piece.depth : piece.depth + piece.end - piece.start] = logps_C[piece.start : piece.end]
            if piece.ends is not None:
                completion = self._completions[piece.ends]
                scores.append((piece.ends, Score(self._path_logps[len(completion.prompt_ids) : len(completion)].copy())))
        return scores


def _segments(chunk: Chunk) -> list[Segment]:
    """The chunk's pieces, those that continue the one before them joined to it."""
    segments: list[Segment] = []
    for piece in chunk.pieces:
        if segments and piece.depth == segments[-1].depth + segments[-1].end - segments[-1].start:
            segments[-1] = Segment(segments[-1].start, piece.end, segments[-1].depth)
        elif piece.end > piece.start:
            segments.append(Segment(piece.start, piece.end, piece.depth))
    return segments


def _checked(scores: list[tuple[int, Score]]) -> list[tuple[int, Score]]:
    for _, score in scores:
        if not np.isfinite(score.token_logps).all():
            raise ModelError(
                "a log-prob came out as NaN or infinite; nothing of this batch is stored.\n"
                "The weights may be damaged, or the dtype too small for this model: try --dtype float32."
            )
    return scores


def _to(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
