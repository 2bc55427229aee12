import doctest
import math

import pytest
import torch
import torch.nn.functional as F

from dpo_cache import preference_loss
from dpo_cache.errors import ShapeError
from dpo_cache.training import losses as losses_module

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
    loss = (h - 1 / (2 * beta)) ** 2 if ipo else -F.logsigmoid(beta * h) * (1 - label_smoothing) - F.logsigmoid(-beta * h) * label_smoothing
    return loss, beta * (pc - rc).detach(), beta * (pr - rr).detach()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 3.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("ipo", [False, True])
@pytest.mark.parametrize("reference_free", [False, True])
def test_numbers_are_those_of_the_definition_to_the_last_bit(dtype, beta, label_smoothing, ipo, reference_free) -> None:
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
    assert smoothed == pytest.approx(0.75 * math.log1p(math.exp(-1.0)) + 0.25 * math.log1p(math.exp(1.0)), abs=1e-15)
    assert preference_loss(chosen, rejected, zero - 2, zero - 2, 0.5, ipo=True)[0].item() == (2 - 1) ** 2


def test_a_uniform_reference_leaves_the_rewards_as_they_are() -> None:
    values = logps(5, torch.float32)
    with_reference = preference_loss(*values, 0.1)
    without = preference_loss(*values, 0.1, reference_free=True)
    assert torch.equal(without[1], with_reference[1]) and torch.equal(without[2], with_reference[2])
    assert torch.equal(without[0], -F.logsigmoid(0.1 * (values[0] - values[1])))


def test_ipo_leaves_label_smoothing_aside() -> None:
    values = logps(6, torch.float32)
    assert torch.equal(preference_loss(*values, 0.1, 0.3, True)[0], preference_loss(*values, 0.1, 0.0, True)[0])


def test_mixed_dtypes_promote() -> None:
    policy, reference = logps(7, torch.bfloat16)[:2], logps(7, torch.float32)[2:]
    assert preference_loss(*policy, *reference, 0.1)[0].dtype == torch.float32


def test_plain_numbers_serve_as_a_reference() -> None:
    chosen, rejected = logps(8, torch.float32)[:2]
    assert torch.equal(preference_loss(chosen, rejected, 0.0, 0.0, 0.1)[0], preference_loss(chosen, rejected, chosen * 0, chosen * 0, 0.1)[0])


def test_one_temperature_a_pair_is_allowed() -> None:
    values, beta = logps(9, torch.float32, size=3), torch.tensor([0.1, 0.2, 0.3])
    found = preference_loss(*values, beta)[0]
    singly = [preference_loss(*(value[index : index + 1] for value in values), float(beta[index]))[0] for index in range(3)]
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
    for one, other in zip(preference_loss(chosen, rejected, zero, zero, 0.1), preference_loss(chosen, rejected, 0.0, 0.0, 0.1), strict=True):
        assert torch.equal(one, other)


def test_extreme_margins_stay_finite() -> None:
    far = torch.tensor([1e30, -1e30])
    zero = torch.zeros(2)
    for smoothing in (0.0, 0.1):
        assert preference_loss(far, zero, zero, zero, 0.1, smoothing)[0].isfinite().all()


def test_the_examples_in_the_docstring() -> None:
    assert doctest.testmod(losses_module).attempted > 6
