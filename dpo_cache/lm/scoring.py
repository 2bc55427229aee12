"""Completions -> scores, in one pass over a stream of tokens.

The sorted completions are one long forest, cut into equal chunks wherever the budget falls. Keys, values
and last hidden states of the open path are carried into the next chunk, so every distinct prefix is
computed once, and memory depends on the chunk and the longest path, on nothing else.

`rows` is the plain way, for models that cannot take a forest: padded rows with the model's own attention.

L tokens of the stream, C tokens of a chunk, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from dpo_cache.errors import ModelError
from dpo_cache.lm.attention import PathPlan, Segment
from dpo_cache.lm.forest import Forest, build_forest
from dpo_cache.lm.logprobs import decoder_of, head_of, token_logps
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
    forest = build_forest(completions)
    stream = _Stream(model, forest)
    logps_L = np.full(len(forest), np.nan, np.float32)
    last_L = np.array([target[-1] for target in forest.targets])
    by_end = np.argsort(last_L, kind="stable")
    done = 0
    for start in range(0, len(forest), budget_tokens):
        end = min(start + budget_tokens, len(forest))
        stream.run_chunk(start, end, logps_L)
        finished = int(np.searchsorted(last_L[by_end], end))
        scores = [(int(index), Score(logps_L[forest.targets[index]])) for index in by_end[done:finished]]
        done = finished
        yield Progress(end - start, len(forest), _checked(scores))


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


class _Stream:
    """The state that is carried from chunk to chunk: keys, values and last hidden states of the open path."""

    def __init__(self, model: PreTrainedModel, forest: Forest):
        self.model, self.forest = model, forest
        self.decoder, self.head = decoder_of(model), head_of(model)
        self.vocab_size = model.config.get_text_config().vocab_size
        self.is_target_L = forest.is_target_L()
        self.paths: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.path_hidden: torch.Tensor | None = None  # [max_depth, D], by depth
        self.path_at = np.zeros(forest.max_depth, np.int64)  # which token of the stream stands at each depth

    def run_chunk(self, start: int, end: int, logps_L: np.ndarray) -> None:
        """Run tokens [start, end) and fill in the log-probs of those that are targets."""
        device, depths_C = self.model.device, self.forest.depths_L[start:end]
        plan = PathPlan(self._segments(start, end), self.forest.max_depth, self.paths)
        hidden_CD = self.decoder(
            input_ids=_to(self.forest.tokens_L[start:end], device)[None],
            position_ids=_to(depths_C, device)[None],
            use_cache=False,
            forest_plan=plan,
        )[0][0]
        targets = start + np.flatnonzero(self.is_target_L[start:end])
        if len(targets):
            predictors = self._predictors(hidden_CD, start, targets)
            logps = token_logps(predictors, self.head, _to(self.forest.tokens_L[targets], device), self.vocab_size)
            logps_L[targets] = logps.cpu().numpy()
        self._carry(hidden_CD, start, end)

    def _segments(self, start: int, end: int) -> list[Segment]:
        """The segments of the chunk, the first being what is left of one that began before it."""
        inner = self.forest.starts[np.searchsorted(self.forest.starts, start, side="right") : np.searchsorted(self.forest.starts, end)]
        cuts = [start, *inner.tolist(), end]
        depths = self.forest.depths_L[cuts[:-1]].tolist()
        return [Segment(first - start, last - start, depth) for first, last, depth in zip(cuts, cuts[1:], depths, strict=False)]

    def _predictors(self, hidden_CD: torch.Tensor, start: int, targets: np.ndarray) -> torch.Tensor:
        """Hidden states [T, D] of the tokens that predict the targets, from this chunk or the carried path."""
        parents = self.forest.parents_L[targets]
        inside = parents >= start
        if inside.all():
            return hidden_CD[_to(parents - start, hidden_CD.device)]
        assert self.path_hidden is not None
        predictors = hidden_CD.new_empty(len(targets), hidden_CD.shape[1])
        predictors[_to(inside, hidden_CD.device)] = hidden_CD[_to(parents[inside] - start, hidden_CD.device)]
        carried_depths = self.forest.depths_L[targets[~inside]] - 1
        predictors[_to(~inside, hidden_CD.device)] = self.path_hidden[_to(carried_depths, hidden_CD.device)]
        return predictors

    def _carry(self, hidden_CD: torch.Tensor, start: int, end: int) -> None:
        """Keep the last hidden states by depth; of several tokens at one depth the last is on the open path."""
        if self.path_hidden is None:
            self.path_hidden = hidden_CD.new_empty(self.forest.max_depth, hidden_CD.shape[1])
        depths_C = self.forest.depths_L[start:end]
        self.path_at[depths_C] = np.arange(start, end)  # numpy keeps the last of repeated places
        depths = np.unique(depths_C)
        self.path_hidden[_to(depths, hidden_CD.device)] = hidden_CD[_to(self.path_at[depths] - start, hidden_CD.device)]


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
