"""Plain rows with the model's own attention, for models that cannot take a forest.

B rows of L tokens, T completion tokens in all of them, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from dpo_cache.errors import ModelError
from dpo_cache.lm.budget import Budget, is_out_of_memory
from dpo_cache.lm.kernels.head import token_logps
from dpo_cache.lm.model.parts import decoder_of, head_of
from dpo_cache.lm.own_forward import own_logits, own_logps
from dpo_cache.lm.progress import ScoringStep
from dpo_cache.types import Completion, Score


@torch.no_grad()
def score_rows(
    model: PreTrainedModel,
    completions: Sequence[Completion],
    budget: Budget,
    max_rows: int | None = None,
    *,
    is_whole: bool = False,
) -> Iterator[ScoringStep]:
    """Score as padded rows with the model's own attention, longest first; with padding, a batch has at most
    the budget's tokens. With `is_whole`, the model's own forward runs each row.
    """
    waiting = sorted(range(len(completions)), key=lambda index: -len(completions[index]))
    tokens_left, num_run = sum(map(len, completions)), 0
    budget.has_stopped = True  # batches depend on the lengths of rows, so their times do not compare
    while waiting:
        length = len(completions[waiting[0]])
        batch = waiting[: min(max(1, budget.tokens // length), max_rows or len(waiting))]
        try:
            if is_whole:
                logps = [own_logps(model, completions[index]) for index in batch]
            else:
                logps = row_logps(model, [completions[index] for index in batch])
        except RuntimeError as error:
            if not is_out_of_memory(error, model.device):
                raise
            if len(batch) == 1:
                raise ModelError(
                    f"out of memory on a row of {length} tokens.\n"
                    "Run with a shorter `max_length`, or on a larger device."
                ) from error
            budget.halve(error)
            continue
        waiting = waiting[len(batch) :]
        tokens_left -= sum(len(completions[index]) for index in batch)
        num_run += length * len(batch)
        scores = [(index, Score(values.cpu().numpy())) for index, values in zip(batch, logps, strict=True)]
        tried = budget.trial_tokens
        yield ScoringStep(length * len(batch), num_run + tokens_left, scores, trial_tokens=tried)


@dataclass(frozen=True)
class RunOutput:
    """Completions that were run at once: T target tokens, and the hidden states that predict them."""

    router_logits: Any  # None for a model that returns none
    uses: torch.Tensor  # how many completions use each position that was run: 0 at padding
    predictors_TD: torch.Tensor  # in `run_whole`: logits
    targets_T: torch.Tensor
    places_T: torch.Tensor | None = None  # place of each completion token among the targets; None: in order


def row_logps(model: PreTrainedModel, completions: Sequence[Completion]) -> list[torch.Tensor]:
    """Token log-probs float32 [T] of each completion, from one batch of right-padded rows."""
    return logps_of_rows(model, completions, run_rows(model, completions))


def logps_of_rows(
    model: PreTrainedModel, completions: Sequence[Completion], rows: RunOutput
) -> list[torch.Tensor]:
    """The same from the output of the run."""
    logps = token_logps(
        rows.predictors_TD, head_of(model), rows.targets_T, model.config.get_text_config().vocab_size
    )
    return list(logps.split([completion.num_tokens for completion in completions]))


def run_whole(model: PreTrainedModel, completions: Sequence[Completion], **arguments: Any) -> RunOutput:
    """Run one completion by the model's own forward; its logits [T, V] take the place of hidden states.

    The model's head is then the identity.
    """
    (completion,) = completions
    ids_L = torch.from_numpy(completion.sequence_ids.astype(np.int64)).to(model.device)
    start, end = len(completion.prompt_ids), len(completion)
    outputs, logits_TV = own_logits(model, ids_L, np.arange(start - 1, end - 1), **arguments)
    return RunOutput(
        getattr(outputs, "router_logits", None), torch.ones_like(ids_L)[None], logits_TV, ids_L[start:end]
    )


@dataclass(frozen=True)
class DecoderPass:
    """One run of the decoder: its arguments, and what reads the completions' values from its output."""

    arguments: dict[str, Any]
    uses: torch.Tensor  # how many completions use each position, [L] or [B, L]
    read: Callable[[Any], RunOutput]


def run_rows(model: PreTrainedModel, completions: Sequence[Completion], **arguments: Any) -> RunOutput:
    """Run the completions as one batch of right-padded rows; further arguments are the model's."""
    rows = rows_pass(model, completions, **arguments)
    return rows.read(decoder_of(model)(**rows.arguments))


def rows_pass(model: PreTrainedModel, completions: Sequence[Completion], **arguments: Any) -> DecoderPass:
    """The decoder's run of the completions as one batch of right-padded rows."""
    sequences = [torch.from_numpy(completion.sequence_ids.astype(np.int64)) for completion in completions]
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(model.device)
    lengths = torch.tensor([*map(len, sequences)])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(model.device)
    spans = [(row, len(completion.prompt_ids), len(completion)) for row, completion in enumerate(completions)]

    def read(outputs: Any) -> RunOutput:
        predictors_TD = torch.cat([outputs[0][row, start - 1 : end - 1] for row, start, end in spans])
        targets_T = torch.cat([ids[row, start:end] for row, start, end in spans])
        return RunOutput(getattr(outputs, "router_logits", None), mask, predictors_TD, targets_T)

    return DecoderPass(
        {"input_ids": ids, "attention_mask": mask, "use_cache": False, **arguments}, mask, read
    )
