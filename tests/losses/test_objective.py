"""Weighted sums of losses, what they look at, and which options go with which."""

import math

import numpy as np
import pytest
import torch

from dpo_cache.errors import OptionError
from dpo_cache.lm.policy import CompletionLogps
from dpo_cache.losses.objective import Objective
from dpo_cache.losses.reference_losses import preference_loss
from dpo_cache.losses.table import LOSSES
from dpo_cache.losses.terms import loss_terms
from dpo_cache.options.run_config import complete_config
from dpo_cache.options.train import TrainOptions
from dpo_cache.training.pair_logps import (
    mean_chosen_tokens,
    objective_of,
    pair_logps,
    policy_losses,
    reference_logps,
)
from dpo_cache.types import Completion, Pair, Score, ScoredPair

LENGTHS = [3, 5, 1, 4, 2, 1]  # three chosen, three rejected


def scored_pairs() -> list[ScoredPair]:
    generator = np.random.default_rng(0)
    sides = [Completion(np.ones(2, np.uint32), np.ones(length, np.uint32)) for length in LENGTHS]
    scores = [Score(-generator.random(length).astype(np.float32) * 4) for length in LENGTHS]
    return [
        ScoredPair(Pair(index, sides[index], sides[3 + index]), scores[index], scores[3 + index])
        for index in range(3)
    ]


def policy_logps() -> CompletionLogps:
    generator = torch.Generator().manual_seed(1)
    tokens, squares = (-torch.rand(sum(LENGTHS), generator=generator) * 4 for _ in range(2))
    tokens[:3] *= 6  # the first pair's rank is another than the reference's
    return CompletionLogps(tokens.requires_grad_(), LENGTHS, squares)


def objective(*losses: str, **settings: object) -> Objective:
    return Objective(terms=loss_terms(losses), **settings)


def losses_of(found: Objective):
    pairs = scored_pairs()
    return policy_losses(found, [(pairs, policy_logps())], mean_chosen_tokens(pairs))


@pytest.mark.parametrize(
    ("name", "settings"), [("sigmoid", {}), ("sigmoid", {"label_smoothing": 0.2}), ("ipo", {"beta": 0.3})]
)
@pytest.mark.parametrize("reference_free", [False, True])
def test_sigmoid_and_ipo_are_those_of_the_original_repository(
    name: str, settings: dict, reference_free: bool
) -> None:
    found = losses_of(objective(name, reference_free=reference_free, **settings))
    sides = [*policy_logps().sums().chunk(2), *torch.from_numpy(reference_logps(scored_pairs())).chunk(2)]
    expected = preference_loss(
        *sides, **{"beta": 0.1, **settings}, ipo=name == "ipo", reference_free=reference_free
    )
    assert torch.allclose(found["loss"], expected[0], rtol=1e-12)
    for metric, values in (("rewards/chosen", expected[1]), ("rewards/rejected", expected[2])):
        assert torch.allclose(found[metric], values, rtol=1e-12, atol=1e-14)


def test_a_weighted_sum_is_reported_by_its_parts() -> None:
    both = losses_of(objective("sigmoid:0.8", "sft:0.2"))
    parts = [losses_of(objective(name)) for name in ("sigmoid", "sft")]
    assert torch.allclose(both["loss"], 0.8 * parts[0]["loss"] + 0.2 * parts[1]["loss"])
    assert torch.equal(both["loss/sigmoid"], parts[0]["loss"]) and torch.equal(
        both["loss/sft"], parts[1]["loss"]
    )
    assert not any(name.startswith("loss/") for name in parts[0])


def test_sft_is_a_mean_over_tokens_and_sft_norm_over_pairs() -> None:
    chosen = policy_logps().sums()[:3]
    assert losses_of(objective("sft"))["loss"].mean().item() == pytest.approx(-chosen.sum().item() / 9)
    assert losses_of(objective("sft_norm"))["loss"].mean().item() == pytest.approx(
        -(chosen / torch.tensor([3, 5, 1])).mean().item()
    )


@pytest.mark.parametrize("weighs_reference", [True, False])
def test_ld_dpo_weights_tokens_past_the_shorter_answer(weighs_reference: bool) -> None:
    alpha, pairs, policy = 0.25, scored_pairs(), policy_logps()
    ld_dpo = objective("sigmoid", ld_alpha=alpha, ld_reference=weighs_reference)
    found = pair_logps(ld_dpo, pairs, policy)
    rows = policy.tokens_T.split(LENGTHS)
    for index, shared in enumerate([3, 2, 1]):  # 3 and 4 tokens, 5 and 2, 1 and 1
        for values, row in ((found.chosen, rows[index]), (found.rejected, rows[3 + index])):
            assert values[index].item() == pytest.approx(
                (row[:shared].sum() + alpha * row[shared:].sum()).item(), rel=1e-6
            )
        for values, score in (
            (found.ref_chosen, pairs[index].ref_chosen),
            (found.ref_rejected, pairs[index].ref_rejected),
        ):
            tail = alpha if weighs_reference else 1.0
            assert values[index].item() == pytest.approx(
                score.token_logps[:shared].sum() + tail * score.token_logps[shared:].sum(), rel=1e-6
            )
    assert torch.equal(found.chosen_sums, policy.sums()[:3])


def test_ld_dpo_that_weights_nothing_changes_nothing() -> None:
    assert torch.allclose(
        losses_of(objective("sigmoid", ld_alpha=1.0))["loss"], losses_of(objective("sigmoid"))["loss"]
    )


@pytest.mark.parametrize("mode", ["on", "clipped"])
def test_wpo_weights_the_preference_losses_without_a_gradient(mode: str) -> None:
    policy, pairs = policy_logps(), scored_pairs()
    excess = (policy.tokens_T - policy.squares_T).detach().split(LENGTHS)
    weights = torch.tensor([math.exp(excess[index].mean() + excess[3 + index].mean()) for index in range(3)])
    if mode == "clipped":
        assert (weights > 1).any()
        weights = weights.clamp(max=1)
    found = policy_losses(objective("sigmoid", "sft", wpo=mode), [(pairs, policy)], 3.0)
    plain = losses_of(objective("sigmoid", "sft"))
    assert torch.allclose(found["loss/sigmoid"].float(), plain["loss/sigmoid"].float() * weights)
    assert torch.equal(found["loss/sft"], plain["loss/sft"])
    policy.tokens_T.grad = None
    found["loss/sigmoid"].sum().backward()
    reference = policy_logps()
    plain = policy_losses(objective("sigmoid"), [(pairs, reference)], 3.0)
    (plain["loss"] * weights).sum().backward()
    assert torch.allclose(policy.tokens_T.grad, reference.tokens_T.grad)


def test_rewards_are_the_policys_own_only_where_no_loss_looks_at_the_reference() -> None:
    sums, lengths = policy_logps().sums()[:3], torch.tensor([3, 5, 1])
    reference = torch.from_numpy(reference_logps(scored_pairs()))[:3]
    for losses, expected in [
        (("cpo",), sums), (("slic", "sft"), sums), (("simpo",), sums / lengths), (("orpo",), sums / lengths), (("sft",), sums - reference),
        (("simpo", "sigmoid"), sums - reference),
    ]:  # fmt: skip
        assert torch.allclose(losses_of(objective(*losses, beta=0.5))["rewards/chosen"], 0.5 * expected)


def test_cpo_adds_the_likelihood_of_the_chosen_answer() -> None:
    alone, both, sft = (
        losses_of(objective(name, **more))["loss"]
        for name, more in (("cpo", {"cpo_alpha": 0.0}), ("cpo", {"cpo_alpha": 0.5}), ("sft", {}))
    )
    assert torch.allclose(both, alone + 0.5 * sft)


@pytest.mark.parametrize("name", LOSSES)
def test_pairs_in_parts_are_the_pairs_together(name: str) -> None:
    pairs, policy = scored_pairs(), policy_logps()
    whole = objective(name, label_smoothing=0.1)
    rows = policy.tokens_T.split(LENGTHS)
    parts = [
        (
            [pairs[index]],
            CompletionLogps(torch.cat([rows[index], rows[3 + index]]), [LENGTHS[index], LENGTHS[3 + index]]),
        )
        for index in range(3)
    ]
    joined = policy_losses(whole, parts, 3.0)["loss"]
    assert torch.allclose(joined, policy_losses(whole, [(pairs, policy)], 3.0)["loss"], rtol=1e-12)
    apart = torch.cat([policy_losses(whole, [part], 3.0)["loss"] for part in parts])
    assert torch.allclose(apart.mean(), joined.mean()) is not whole.needs_whole_step


def options(**changes: object) -> TrainOptions:
    return TrainOptions(cache="cache", output="run", **changes)


def test_losses_are_given_singly_or_weighted() -> None:
    assert loss_terms(options().loss) == {"sigmoid": 1.0}
    assert loss_terms(options(loss="ipo").loss) == {"ipo": 1.0}
    assert loss_terms(options(loss=["sigmoid:0.8", "sft:0.2"]).loss) == {"sigmoid": 0.8, "sft": 0.2}
    assert objective_of(options(loss="simpo", beta=2.0, simpo_gamma=1.0), 0.0) == objective(
        "simpo", beta=2.0, simpo_gamma=1.0
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "dpo"}, r"`loss` dpo: expected one of sigmoid, sigmoid_norm, hinge, ipo, .*slic"),
        ({"loss": "sigmoid:x"}, r"`loss` sigmoid:x: expected NAME or NAME:WEIGHT with a number above 0"),
        ({"loss": "sigmoid:-1"}, "a number above 0"),
        ({"loss": "sigmoid:inf"}, "a number above 0"),
        ({"loss": ("sft", "sft:2")}, "sft is given twice"),
        ({"loss": ()}, "`loss` is needed"),
        ({"loss": "sft", "beta": 0.2}, "`beta` 0.2 has no meaning under `loss` sft"),
        (
            {"loss": "ipo", "label_smoothing": 0.1},
            "`label_smoothing` 0.1 has no meaning under `loss` ipo.\n"
            "Leave it out; it is used by sigmoid, exo_pair",
        ),
        (
            {"simpo_gamma": 1.0},
            "`simpo_gamma` 1.0 has no meaning under `loss` sigmoid.\nLeave it out; it is used by simpo",
        ),
        ({"discopop_tau": 0.1}, "`discopop_tau`"),
        ({"cpo_alpha": 0.1}, "`cpo_alpha`"),
        ({"loss": "simpo", "reference_free": True}, "`reference_free` has no meaning under `loss` simpo"),
        (
            {"loss": ("sigmoid", "nca_pair"), "f_divergence": "js_divergence"},
            "`f_divergence` js_divergence has no meaning under `loss` nca_pair",
        ),
        ({"loss": ("sigmoid", "orpo"), "ld_alpha": 0.5}, "`ld_alpha` 0.5 has no meaning under `loss` orpo"),
        ({"loss": "aot", "wpo": "on"}, "`wpo` on has no meaning under `loss` aot"),
        ({"loss": "exo_pair"}, "`loss` exo_pair needs a `label_smoothing` above 0"),
        ({"loss": "robust", "label_smoothing": 0.5}, "`loss` robust expects less than 0.5"),
        ({"label_smoothing": 0.6}, "expected 0 to 0.5"),
        ({"ld_alpha": 1.5}, "expected 0 to 1"),
        ({"ld_reference": False}, "`ld_reference=False` is used only with `ld_alpha`"),
        ({"f_alpha": 0.7}, "`f_alpha` is used only by `f_divergence` alpha_divergence"),
        ({"f_divergence": "kl"}, "expected one of reverse_kl, forward_kl"),
        ({"reference_free": True, "f_divergence": "forward_kl"}, "nothing to diverge from"),
        ({"loss": "discopop", "discopop_tau": 0.0}, "`discopop_tau` 0.0: expected a number above 0"),
        ({"router_aux_loss_coef": -1.0}, "`router_aux_loss_coef` -1.0: expected 0 or more"),
    ],
)
def test_options_that_do_not_go_with_the_loss_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        options(**changes)


def test_a_setting_that_serves_one_loss_of_a_sum_is_allowed() -> None:
    options(
        loss=("sigmoid", "sft"),
        beta=0.5,
        label_smoothing=0.1,
        ld_alpha=0.5,
        f_divergence="forward_kl",
        wpo="clipped",
    )
    options(loss=("ipo", "sigmoid"), label_smoothing=0.1)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_run_by_its_name(name: str) -> None:
    found = losses_of(objective(name, label_smoothing=0.1))
    assert found["loss"].shape == (3,) and found["loss"].isfinite().all()
    assert LOSSES[name].has_reference != torch.equal(found["loss"], _with_another_reference(name))


def _with_another_reference(name: str) -> torch.Tensor:
    pairs = [
        ScoredPair(
            pair.pair, Score(pair.ref_chosen.token_logps - 1), Score(pair.ref_rejected.token_logps * 2)
        )
        for pair in scored_pairs()
    ]
    parts = [(pairs, policy_logps())]
    return policy_losses(objective(name, label_smoothing=0.1), parts, mean_chosen_tokens(pairs))["loss"]


def test_the_config_of_an_older_run_is_read_as_it_was_meant() -> None:
    old = {"loss": "ipo", "beta": 0.3, "resolved": {}}
    assert complete_config(old) == {**complete_config({}), "loss": ["ipo"], "beta": 0.3, "resolved": {}}
    assert complete_config({})["wpo"] == "off" and complete_config({})["loss"] == ["sigmoid"]
