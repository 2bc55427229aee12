import doctest
import math

import pytest
import torch
import torch.nn.functional as F

from dpo_cache import preference_loss
from dpo_cache.errors import ShapeError
from dpo_cache.losses import policy_losses
from dpo_cache.losses import reference_losses as losses_module

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def logps(seed: int, dtype: torch.dtype, size: int = 257, scale: float = 100.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(-scale * torch.rand(size, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(4)]


def written_out(pc, pr, rc, rr, beta, label_smoothing, ipo, reference_free):
    """The definition, one operation after the other, as the original repository orders them."""
    pi, ref = pc - pr, rc - rr
    if reference_free:
        ref = 0
    h = pi - ref
    loss = (
        (h - 1 / (2 * beta)) ** 2
        if ipo
        else -F.logsigmoid(beta * h) * (1 - label_smoothing) - F.logsigmoid(-beta * h) * label_smoothing
    )
    return loss, beta * (pc - rc).detach(), beta * (pr - rr).detach()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 3.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("ipo", [False, True])
@pytest.mark.parametrize("reference_free", [False, True])
def test_numbers_are_those_of_the_definition_to_the_last_bit(
    dtype, beta, label_smoothing, ipo, reference_free
) -> None:
    values = logps(3, dtype)
    found = preference_loss(*values, beta, label_smoothing, ipo, reference_free)
    expected = written_out(*values, beta, label_smoothing, ipo, reference_free)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype and one.shape == (257,)
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ipo", [False, True])
def test_gradients_are_those_of_the_definition(dtype, ipo) -> None:
    grads = []
    for function in (preference_loss, written_out):
        chosen, rejected, *reference = logps(4, dtype)
        chosen.requires_grad_(), rejected.requires_grad_()
        loss, chosen_rewards, rejected_rewards = function(chosen, rejected, *reference, 0.1, 0.2, ipo, False)
        assert not chosen_rewards.requires_grad and not rejected_rewards.requires_grad
        loss.float().mean().backward()
        grads += [chosen.grad, rejected.grad]
    assert torch.equal(grads[0], grads[2]) and torch.equal(grads[1], grads[3])


def test_values_worked_by_hand() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    assert preference_loss(zero, zero, zero, zero, 0.1)[0].item() == pytest.approx(math.log(2), abs=1e-15)
    chosen, rejected = zero - 1, zero - 3
    loss, chosen_reward, rejected_reward = preference_loss(chosen, rejected, zero - 2, zero - 2, 0.5)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1.0)), abs=1e-15)
    assert (chosen_reward.item(), rejected_reward.item()) == (0.5, -0.5)
    smoothed = preference_loss(chosen, rejected, zero - 2, zero - 2, 0.5, label_smoothing=0.25)[0].item()
    assert smoothed == pytest.approx(
        0.75 * math.log1p(math.exp(-1.0)) + 0.25 * math.log1p(math.exp(1.0)), abs=1e-15
    )
    assert preference_loss(chosen, rejected, zero - 2, zero - 2, 0.5, ipo=True)[0].item() == (2 - 1) ** 2


def test_a_uniform_reference_leaves_the_rewards_as_they_are() -> None:
    values = logps(5, torch.float32)
    with_reference = preference_loss(*values, 0.1)
    without = preference_loss(*values, 0.1, reference_free=True)
    assert torch.equal(without[1], with_reference[1]) and torch.equal(without[2], with_reference[2])
    assert torch.equal(without[0], -F.logsigmoid(0.1 * (values[0] - values[1])))


def test_ipo_leaves_label_smoothing_aside() -> None:
    values = logps(6, torch.float32)
    assert torch.equal(
        preference_loss(*values, 0.1, 0.3, True)[0], preference_loss(*values, 0.1, 0.0, True)[0]
    )


def test_mixed_dtypes_promote() -> None:
    policy, reference = logps(7, torch.bfloat16)[:2], logps(7, torch.float32)[2:]
    assert preference_loss(*policy, *reference, 0.1)[0].dtype == torch.float32


def test_plain_numbers_serve_as_a_reference() -> None:
    chosen, rejected = logps(8, torch.float32)[:2]
    assert torch.equal(
        preference_loss(chosen, rejected, 0.0, 0.0, 0.1)[0],
        preference_loss(chosen, rejected, chosen * 0, chosen * 0, 0.1)[0],
    )


def test_one_temperature_a_pair_is_allowed() -> None:
    values, beta = logps(9, torch.float32, size=3), torch.tensor([0.1, 0.2, 0.3])
    found = preference_loss(*values, beta)[0]
    singly = [
        preference_loss(*(value[index : index + 1] for value in values), float(beta[index]))[0]
        for index in range(3)
    ]
    assert torch.allclose(found, torch.cat(singly), rtol=1e-6)


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("shape", [(1,), (4, 1), (5,)])
def test_shapes_that_broadcasting_would_get_wrong_are_refused(position: int, shape: tuple[int, ...]) -> None:
    values = [torch.zeros(4) for _ in range(4)]
    values[position] = torch.zeros(shape)
    with pytest.raises(ShapeError, match="needs one shape"):
        preference_loss(*values, 0.1)


@pytest.mark.parametrize("argument", ["beta", "label_smoothing"])
def test_a_temperature_or_smoothing_of_another_shape_is_refused(argument: str) -> None:
    options = {"beta": 0.1, argument: torch.full((4, 1), 0.1)}
    with pytest.raises(ShapeError, match="needs one shape"):
        preference_loss(*(torch.zeros(4) for _ in range(4)), **options)


def test_a_tensor_without_dimensions_is_a_number() -> None:
    chosen, rejected, zero = torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -1.5]), torch.tensor(0.0)
    for one, other in zip(
        preference_loss(chosen, rejected, zero, zero, 0.1),
        preference_loss(chosen, rejected, 0.0, 0.0, 0.1),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_extreme_margins_stay_finite() -> None:
    far = torch.tensor([1e30, -1e30])
    zero = torch.zeros(2)
    for smoothing in (0.0, 0.1):
        assert preference_loss(far, zero, zero, zero, 0.1, smoothing)[0].isfinite().all()


def test_the_examples_in_the_docstring() -> None:
    found = doctest.testmod(losses_module)
    assert found.attempted > 6 and found.failed == 0


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


ONE = {"dtype": torch.float64}
BY_HAND = [  # log-ratios 1.5 and -0.5, so margin 2; beta 0.5
    ("hinge, inside", lambda: losses_module.hinge_losses(torch.tensor([0.5], **ONE), 0.5), 0.75),
    ("hinge, outside", lambda: losses_module.hinge_losses(torch.tensor([2.5], **ONE), 0.5), 0.0),
    ("ipo", lambda: losses_module.ipo_losses(torch.tensor([2.0], **ONE), 0.5), 1.0),
    ("ipo_norm", lambda: losses_module.ipo_norm_losses(torch.tensor([2.0], **ONE), 0.5), 1.0),
    ("sigmoid_norm", lambda: losses_module.sigmoid_norm_losses(torch.tensor([2.0], **ONE), 0.5), math.log1p(math.exp(-1))),
    ("robust", lambda: losses_module.robust_losses(torch.tensor([2.0], **ONE), 0.5, 0.2),
     (0.8 * math.log1p(math.exp(-1)) - 0.2 * math.log1p(math.e)) / 0.6),
    ("exo_pair", lambda: losses_module.exo_pair_losses(torch.tensor([2.0], **ONE), 0.5, 0.2),
     sigmoid(1) * math.log(sigmoid(1) / 0.8) + sigmoid(-1) * math.log(sigmoid(-1) / 0.2)),
    ("discopop", lambda: losses_module.discopop_losses(torch.tensor([2.0], **ONE), 0.5, 0.5),
     math.log1p(math.exp(-1)) * (1 - sigmoid(2)) + math.exp(-1) * sigmoid(2)),
    ("nca_pair", lambda: losses_module.nca_pair_losses(torch.tensor([1.5], **ONE), torch.tensor([-0.5], **ONE), 0.5),
     -math.log(sigmoid(0.75)) - 0.5 * math.log(sigmoid(-0.75)) - 0.5 * math.log(sigmoid(0.25))),
    ("bco_pair", lambda: losses_module.bco_pair_losses(torch.tensor([1.5], **ONE), torch.tensor([-0.5], **ONE), 0.5),
     -math.log(sigmoid(0.75)) - math.log(sigmoid(0.25))),
    ("sppo_hard", lambda: losses_module.sppo_hard_losses(torch.tensor([1.5], **ONE), torch.tensor([-0.5], **ONE), 0.5), 0.25 + 0.25),
    ("apo_zero", lambda: losses_module.apo_zero_losses(torch.tensor([1.5], **ONE), torch.tensor([-0.5], **ONE), 0.5),
     1 - sigmoid(0.75) + sigmoid(-0.25)),
    ("apo_down", lambda: losses_module.apo_down_losses(torch.tensor([1.5], **ONE), torch.tensor([-0.5], **ONE), 0.5),
     sigmoid(0.75) + 1 - sigmoid(1.0)),
    ("forward_kl", lambda: losses_module.divergence_scores(torch.tensor([1.5], **ONE), "forward_kl"), 1 - math.exp(-1.5)),
    ("js_divergence", lambda: losses_module.divergence_scores(torch.tensor([1.5], **ONE), "js_divergence"),
     math.log(2 * math.exp(1.5) / (1 + math.exp(1.5)))),
    ("alpha_divergence", lambda: losses_module.divergence_scores(torch.tensor([1.5], **ONE), "alpha_divergence", 0.5), (math.exp(-0.75) - 1) / -0.5),
    ("WPO", lambda: losses_module.wpo_weights(torch.tensor([0.5], **ONE), torch.tensor([0.25], **ONE), clipped=False), math.exp(0.75)),
    ("WPO, clipped", lambda: losses_module.wpo_weights(torch.tensor([0.5], **ONE), torch.tensor([0.25], **ONE), clipped=True), 1.0),
    ("sft_norm", lambda: policy_losses.sft_norm_losses(torch.tensor([-6.0], **ONE), torch.tensor([4.0], **ONE)), 1.5),
    ("sft", lambda: policy_losses.sft_losses(torch.tensor([-6.0], **ONE), 4.0), 1.5),
    ("simpo", lambda: policy_losses.simpo_losses(*(torch.tensor([value], **ONE) for value in (-6.0, -6.0, 4.0, 2.0)), 2.0, 1.0),
     math.log1p(math.exp(-2.0))),
    ("cpo", lambda: policy_losses.cpo_losses(*(torch.tensor([value], **ONE) for value in (-6.0, -8.0, -6.0)), 4.0, 0.5, cpo_alpha=0.0),
     math.log1p(math.exp(-1.0))),
    ("cpo, with likelihood", lambda: policy_losses.cpo_losses(*(torch.tensor([value], **ONE) for value in (-6.0, -8.0, -6.0)), 4.0, 0.5, cpo_alpha=0.5),
     math.log1p(math.exp(-1.0)) + 0.5 * 1.5),
    ("slic", lambda: policy_losses.slic_losses(torch.tensor([-6.0], **ONE), torch.tensor([-7.0], **ONE), 0.5), 0.5),
    ("orpo", lambda: policy_losses.orpo_losses(*(torch.tensor([value], **ONE) for value in (-2.0, -3.0, 4.0, 2.0)), 0.25),
     0.5 - 0.25 * math.log(sigmoid(math.log(math.exp(-0.5) / (1 - math.exp(-0.5))) - math.log(math.exp(-1.5) / (1 - math.exp(-1.5)))))),
]  # fmt: skip


@pytest.mark.parametrize(
    ("compute", "expected"), [case[1:] for case in BY_HAND], ids=[case[0] for case in BY_HAND]
)
def test_each_formula_by_hand(compute, expected) -> None:
    assert compute().item() == pytest.approx(expected, abs=1e-14)


def test_aot_compares_ranks_and_not_pairs() -> None:
    upper, lower = torch.tensor([3.0, 1.0, 2.0], **ONE), torch.tensor([0.0, 2.0, 1.0], **ONE)
    assert torch.allclose(
        losses_module.aot_losses(upper, lower, 0.5), torch.full((3,), math.log1p(math.exp(-0.5)), **ONE)
    )
    shuffled = losses_module.aot_losses(upper[[2, 0, 1]], lower, 0.5)
    assert torch.equal(shuffled, losses_module.aot_losses(upper, lower, 0.5))


MARGIN_FUNCTIONS = {
    "sigmoid": lambda m: losses_module.sigmoid_losses(m, 0.1),
    "sigmoid, smoothed": lambda m: losses_module.sigmoid_losses(m, 0.1, 0.2),
    "hinge": lambda m: losses_module.hinge_losses(m, 0.1),
    "ipo": lambda m: losses_module.ipo_losses(m, 0.1),
    "exo_pair": lambda m: losses_module.exo_pair_losses(m, 0.1, 0.001),
    "robust": lambda m: losses_module.robust_losses(m, 0.1, 0.1),
    "discopop": lambda m: losses_module.discopop_losses(m, 0.1),
    "aot": lambda m: losses_module.aot_losses(m, -m, 0.1),
    **{divergence: lambda m, divergence=divergence: losses_module.divergence_scores(m, divergence)
       for divergence in ("forward_kl", "js_divergence", "alpha_divergence")},
}  # fmt: skip
RATIO_FUNCTIONS = {
    name: lambda c, r, name=name: getattr(losses_module, f"{name}_losses")(c, r, 0.1)
    for name in ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")
}
LENGTHS = torch.tensor([3.0, 7.0, 1.0, 500.0], **ONE)
POLICY_FUNCTIONS = {
    "sft": lambda c, r: policy_losses.sft_losses(c, 4.0) + 0 * r,
    "simpo": lambda c, r: policy_losses.simpo_losses(c, r, LENGTHS[: len(c)], LENGTHS[: len(c)].flip(0), 2.0),
    "cpo": lambda c, r: policy_losses.cpo_losses(c, r, c, 4.0, 0.1),
    "slic": lambda c, r: policy_losses.slic_losses(c, r, 0.1),
    "orpo": lambda c, r: policy_losses.orpo_losses(c, r, LENGTHS[: len(c)], LENGTHS[: len(c)].flip(0), 0.1),
}


@pytest.mark.parametrize("function", MARGIN_FUNCTIONS.values(), ids=MARGIN_FUNCTIONS)
def test_gradients_of_margins_are_right_and_stay_finite_far_out(function) -> None:
    assert torch.autograd.gradcheck(
        function, torch.tensor([-3.1, -0.4, 0.2, 7.3], dtype=torch.float64, requires_grad=True)
    )
    for dtype in (torch.float32, torch.float64):
        far = torch.tensor([-1e4, 0.0, 1e4], dtype=dtype, requires_grad=True)
        losses = function(far)
        losses.sum().backward()
        assert losses.isfinite().all() and far.grad.isfinite().all()


@pytest.mark.parametrize(
    "function",
    [*RATIO_FUNCTIONS.values(), *POLICY_FUNCTIONS.values()],
    ids=[*RATIO_FUNCTIONS, *POLICY_FUNCTIONS],
)
def test_gradients_of_two_sides_are_right_and_stay_finite_far_out(function) -> None:
    chosen, rejected = (
        torch.tensor(values, dtype=torch.float64, requires_grad=True)
        for values in ([-3.1, -0.4, -2.2, -7.3], [-1.0, -2.4, -0.3, -5.0])
    )
    assert torch.autograd.gradcheck(function, (chosen, rejected))
    for dtype in (torch.float32, torch.float64):
        far = [
            torch.tensor(values, dtype=dtype, requires_grad=True)
            for values in ([-1e4, -1e4, 0.0, -1e-9], [-1e4, -1e-9, -1e4, 0.0])
        ]
        losses = function(*far)
        losses.sum().backward()
        assert losses.isfinite().all() and all(side.grad.isfinite().all() for side in far)


def test_far_down_discopop_is_the_limit_of_its_formula() -> None:
    assert losses_module.discopop_losses(torch.tensor([-1e4], **ONE), 0.1).item() == pytest.approx(1000.0)
