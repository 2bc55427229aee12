"""Losses of pairs that several ranks have run: the same values and, added up, the same gradient."""

from typing import Any

import pytest
import torch

from dpo_cache.lm.policy import CompletionLogps
from dpo_cache.lm.routing import Routing
from dpo_cache.losses.objective import Objective
from dpo_cache.losses.table import LOSSES
from dpo_cache.losses.terms import loss_terms
from dpo_cache.training.pair_logps import RunPairs, policy_losses, policy_losses_of_all
from tests.losses.test_objective import LENGTHS, policy_logps, scored_pairs

CPU = torch.device("cpu")


def leaf(index: int) -> CompletionLogps:
    """The log-probs of one of three pairs, with gradients, and a routing."""
    policy = policy_logps()
    assert policy.squares_T is not None
    tokens, squares = (values.detach().split(LENGTHS) for values in (policy.tokens_T, policy.squares_T))
    generator = torch.Generator().manual_seed(index)
    choices, probs = torch.rand(2, 4, generator=generator) * 10
    return CompletionLogps(
        torch.cat([tokens[index], tokens[3 + index]]).requires_grad_(),
        [LENGTHS[index], LENGTHS[3 + index]],
        torch.cat([squares[index], squares[3 + index]]),
        Routing(choices, probs.requires_grad_(), torch.tensor(10.0 + index)),
    )


def parts() -> list[RunPairs]:
    return [([scored], leaf(index)) for index, scored in enumerate(scored_pairs())]


def gradients(entries: list[RunPairs]) -> list[torch.Tensor | None]:
    return [
        grad
        for _, logps in entries
        for grad in (logps.tokens_T.grad, logps.routing.probs_E.grad if logps.routing else None)
    ]


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
@pytest.mark.parametrize(
    ("name", "wpo"),
    [(name, "off") for name in LOSSES]
    + [(name, "clipped") for name, loss in LOSSES.items() if loss.has_reference],
)
@pytest.mark.parametrize("of_ranks", [[[0], [1, 2]], [[], [0, 1], [2]], [[0, 1, 2], []]], ids=str)
def test_ranks_together_have_the_losses_and_the_gradient_of_one(
    name: str, of_ranks: list[list[int]], wpo: str, coefficient: float
) -> None:
    objective = Objective(
        terms=loss_terms([name]), label_smoothing=0.1, wpo=wpo, router_coefficient=coefficient
    )
    whole = parts()
    expected = policy_losses(objective, whole, 3.0)
    expected["loss"].sum().backward()

    sent: list[Any] = []
    for places in of_ranks:  # what each rank sends, and then what it makes of all
        with pytest.raises(StopIteration):
            policy_losses_of_all(objective, [parts()[place] for place in places], 3.0, stop_at(sent), 0, CPU)
    found: dict[str, list[torch.Tensor]] = {}
    for rank, places in enumerate(of_ranks):
        entries = [parts()[place] for place in places]
        losses, own = policy_losses_of_all(objective, entries, 3.0, lambda _: list(sent), rank, CPU)
        assert len(losses["loss"][own]) == len(places)
        for key, values in losses.items():
            assert torch.equal(values, expected[key]), "the pairs of all ranks, in their order"
            found.setdefault(key, []).append(values[own])
        if entries:
            losses["loss"].sum().backward()
        assert_equal(gradients(entries), gradients([whole[place] for place in places]))
    assert all(torch.equal(torch.cat(of_all), expected[key]) for key, of_all in found.items())


def stop_at(sent: list[Any]) -> Any:
    def exchange(value: Any) -> list[Any]:
        sent.append(value)
        raise StopIteration

    return exchange


def assert_equal(found: list[torch.Tensor | None], expected: list[torch.Tensor | None]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert torch.allclose(one, other, rtol=1e-6, atol=1e-9)
