"""Passes through the policy, of which every rank makes the same number.

FSDP2 gathers the weights for each run of a layer and adds up gradients in each backward pass, DDP in the last
one of a step. A rank with fewer passes than the others runs a filler: two tokens, whose log-prob is
multiplied by 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch

from dpo_cache.lm.policy import CompletionLogps, run_at_once
from dpo_cache.lm.self_check import AttentionChoice
from dpo_cache.types import Completion, ScoredPair

Piece = Sequence[Completion]


@dataclass(frozen=True)
class EqualPasses:
    """Passes through the policy, one a piece; a rank may have fewer pieces than passes."""

    policy: torch.nn.Module
    attention: AttentionChoice
    pieces: Sequence[Piece]  # pieces of this rank
    num_calls: Sequence[int]  # calls of the decoder in each pass, the same on every rank
    filler: Completion

    def __len__(self) -> int:
        return len(self.num_calls)

    def run(self, place: int) -> tuple[CompletionLogps | None, torch.Tensor]:
        """The log-probs of a piece, or None if this rank has none in the pass; and a tensor of value 0
        through which a gradient reaches the fillers.
        """
        pieces = list(self.pieces[place : place + 1])
        num_missing = self.num_calls[place] - sum(_count_calls(piece, self.attention) for piece in pieces)
        found = self.policy([*pieces, *[[self.filler]] * num_missing])
        fillers = found[len(pieces) :]
        nothing = sum((0.0 * filler.tokens_T.sum() for filler in fillers), found[0].tokens_T.new_zeros(()))
        return (found[0] if pieces else None), nothing

    def run_again(self, place: int, leaves: Sequence[CompletionLogps]) -> Callable[[], None]:
        """Run a pass again; returns the backward pass with the gradients that its leaf has collected."""
        logps, nothing = self.run(place)
        if logps is None:
            return nothing.backward
        joined = logps._replace(tokens_T=logps.tokens_T + nothing)
        return lambda: joined.backward(leaves[place])

    def run_all(self) -> Iterator[CompletionLogps]:
        """Yield the log-probs of this rank's pieces."""
        for place in range(len(self)):
            logps, _ = self.run(place)
            if logps is not None:
                yield logps


def plan_passes(
    policy: torch.nn.Module,
    attention: AttentionChoice,
    pieces: Sequence[Piece],
    pairs: Sequence[ScoredPair],
    exchange: Callable[[Any], list[Any]],
) -> EqualPasses:
    """The passes that suffice for the pieces of each rank, in a step with these pairs of all ranks.

    `exchange` returns the values of all ranks.
    """
    of_ranks = exchange([_count_calls(piece, attention) for piece in pieces])
    num_calls = [max(counts) for counts in zip_longest(*of_ranks, fillvalue=0)]
    return EqualPasses(policy, attention, pieces, num_calls, filler_of(pairs))


def filler_of(pairs: Sequence[ScoredPair]) -> Completion:
    """Two tokens of the first pair, one that predicts and one that is predicted."""
    first = pairs[0].pair.chosen
    return Completion(first.prompt_ids[-1:], first.completion_ids[:1])


def _count_calls(piece: Piece, attention: AttentionChoice) -> int:
    """The number of times that a run of the piece calls the decoder."""
    return len(run_at_once(piece, attention))
