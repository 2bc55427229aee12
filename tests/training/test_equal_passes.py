"""All ranks run the policy equally often, and a filler changes no gradient."""

from typing import Any

import numpy as np
import pytest
import torch

from dpo_cache.lm.policy import PolicyModel
from dpo_cache.lm.self_check import AttentionChoice
from dpo_cache.training.equal_passes import EqualPasses, filler_of, plan_passes
from dpo_cache.types import Completion
from tests.conftest import make_llama
from tests.training.test_batches import make_pairs

PAIRS = make_pairs(3)
ROWS = AttentionChoice("rows", "", max_rows=1)
PADDED = AttentionChoice("rows", "")


def pieces() -> list[list[Completion]]:
    return [[scored.pair.chosen, scored.pair.rejected] for scored in PAIRS]


def plan(of_others: list[list[int]], own: list[list[Completion]], attention: AttentionChoice) -> EqualPasses:
    def exchange(value: Any) -> list[Any]:
        return [value, *of_others]

    policy = PolicyModel(make_llama(), attention)
    return plan_passes(policy, attention, own, PAIRS, exchange)


@pytest.mark.parametrize(
    ("attention", "own", "others", "expected"),
    [
        (PADDED, 3, [[1], [1, 1]], [1, 1, 1]),
        (PADDED, 1, [[1, 1, 1], []], [1, 1, 1]),
        (PADDED, 0, [[1, 1]], [1, 1]),
        (ROWS, 2, [[4], [1, 1, 3]], [4, 2, 3]),
    ],
)
def test_a_pass_has_as_many_calls_as_the_rank_with_the_most(
    attention: AttentionChoice, own: int, others: list[list[int]], expected: list[int]
) -> None:
    passes = plan(others, pieces()[:own], attention)
    assert list(passes.num_calls) == expected
    calls: list[int] = []
    passes.policy.model.model.register_forward_hook(lambda *_: calls.append(1))
    assert len(list(passes.run_all())) == own
    assert len(calls) == sum(expected)


def test_fillers_change_neither_log_probs_nor_gradients() -> None:
    filled, plain = plan([[3, 2]], pieces()[:1], ROWS), plan([], pieces()[:1], ROWS)
    gradients = []
    for passes in (filled, plain):
        for place in range(len(passes)):
            logps, nothing = passes.run(place)
            loss = nothing if logps is None else logps.sums().square().sum() + nothing
            if loss.requires_grad:
                loss.backward()
        gradients.append({name: one.grad for name, one in passes.policy.named_parameters()})
    assert len(filled) == 2 and filled.num_calls == [3, 2]
    for name, gradient in gradients[1].items():
        assert gradient is not None and torch.equal(gradients[0][name], gradient)


def test_a_second_run_carries_the_gradient_of_the_leaves() -> None:
    passes = plan([[3, 2]], pieces()[:1], ROWS)
    with torch.no_grad():
        leaves = [logps.detach() for logps in passes.run_all()]
    leaves[0].sums().square().sum().backward()
    for place in range(len(passes)):
        passes.run_again(place, leaves)()
    expected = PolicyModel(make_llama(), ROWS)
    expected(pieces()[:1])[0].sums().square().sum().backward()
    for found, one in zip(passes.policy.parameters(), expected.parameters(), strict=True):
        assert torch.equal(found.grad, one.grad)


def test_the_filler_has_tokens_that_the_model_knows() -> None:
    filler = filler_of(PAIRS)
    assert len(filler) == 2 and filler.num_tokens == 1
    assert np.isin(filler.sequence_ids, PAIRS[0].pair.chosen.sequence_ids).all()
