"""Clipping equals torch's, in value and in gradients, without a copy of a gradient."""

from typing import Any

import pytest
import torch

from dpo_cache.planning.live_bytes import LiveBytes
from dpo_cache.training.optim import clipping
from dpo_cache.training.optim.clipping import clip_gradient, gradient_norm, norm_of
from dpo_cache.training.ranks import Ranks

SHAPES = ((300, 70), (5,), (1, 1), (40, 3, 2))


def parameters(*dtypes: torch.dtype, scale: float = 1.0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for number, shape in enumerate(SHAPES):
        dtype = dtypes[number % len(dtypes)]
        parameter = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        parameter.grad = (scale * torch.randn(shape, generator=generator)).to(dtype)
        made.append(parameter)
    return [*made, torch.nn.Parameter(torch.zeros(3))]  # without a gradient


@pytest.mark.parametrize("max_norm", [0.5, 1e9, float("inf")])
def test_it_is_torchs_own_in_float32(max_norm: float) -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    assert torch.equal(clip_gradient(ours, max_norm), torch.nn.utils.clip_grad_norm_(theirs, max_norm))
    for one, other in zip(ours[:-1], theirs, strict=False):
        assert torch.equal(one.grad, other.grad)
    assert ours[-1].grad is None


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,), (torch.float32, torch.bfloat16)])
def test_bfloat16_gradients_are_summed_in_float32(
    dtypes: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clipping, "SLICE", 1000)
    ours, theirs = parameters(*dtypes), parameters(*dtypes)
    exact = torch.cat([one.grad.double().view(-1) for one in ours[:-1]]).norm().item()
    assert float(gradient_norm(ours)) == pytest.approx(exact, rel=1e-6)
    assert float(clip_gradient(ours, 1.0)) == pytest.approx(exact, rel=1e-6)
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    for one, other in zip(ours[:-1], theirs, strict=False):
        # torch's norm is rounded to 8 bits
        assert torch.allclose(one.grad.float(), other.grad.float(), rtol=2**-7, atol=0)
    assert float(gradient_norm(ours)) == pytest.approx(1.0, rel=2**-8)


@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
def test_a_norm_that_is_not_finite_is_returned(wrong: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        found = parameters(dtype)
        found[0].grad[3, 4] = wrong
        assert str(float(clip_gradient(found, 1.0))) == str(wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_of_one_gradient(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clipping, "SLICE", 1000)
    gradient = parameters(dtype)[0].grad
    assert norm_of(gradient).dtype == torch.float32
    assert float(norm_of(gradient)) == pytest.approx(gradient.double().norm().item(), rel=1e-6)
    assert float(norm_of(torch.zeros(0, dtype=dtype))) == 0.0


def test_nothing_to_clip() -> None:
    assert float(clip_gradient([torch.nn.Parameter(torch.zeros(3))], 1.0)) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [0.1, 1e9])
def test_no_gradient_is_copied(dtype: torch.dtype, max_norm: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clipping, "SLICE", 1000)
    found = parameters(dtype)
    pointers = [one.grad.data_ptr() for one in found[:-1]]
    with LiveBytes() as live:
        clip_gradient(found, max_norm)
    assert live.peak < 10_000 < found[0].grad.nbytes
    assert [one.grad.data_ptr() for one in found[:-1]] == pointers


class Shards(Ranks):
    """Two ranks, seen from one of them; the other one's gradients have this norm."""

    size, shards = 2, True

    def __init__(self, other: float):
        self.other = other

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other]


@pytest.mark.parametrize("max_norm", [0.5, 1e9, float("inf")])
def test_the_norm_of_shards_is_that_of_the_whole_gradient(max_norm: float) -> None:
    whole = [one for one in parameters(torch.float32) if one.grad is not None]
    rows = [torch.nn.Parameter(one.detach()[:3]) for one in whole]
    for one, other in zip(rows, whole, strict=True):
        one.grad = other.grad[:3].clone()
    others = [one.grad[3:].clone() for one in whole]
    expected = clip_gradient(whole, max_norm)
    found = clip_gradient(rows, max_norm, Shards(float(torch.nn.utils.get_total_norm(others))))
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    for one, other in zip(rows, whole, strict=True):
        torch.testing.assert_close(one.grad, other.grad[:3], rtol=1e-6, atol=0)


@pytest.mark.parametrize("other", [float("nan"), float("inf")])
def test_a_shard_that_is_not_finite_makes_the_norm_so(other: float) -> None:
    found = clip_gradient(parameters(torch.float32), 1.0, Shards(other))
    assert not found.isfinite()
