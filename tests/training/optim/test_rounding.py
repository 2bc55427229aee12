"""float32 to bfloat16: unbiased or exact, and nothing that bfloat16 has is changed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_cache.training.optim import rounding
from dpo_cache.training.optim.rounding import join_float, split_float, stochastic_bf16

INF, NAN = float("inf"), float("nan")
ALL_BF16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)


def test_values_that_bfloat16_has_are_kept_bit_for_bit() -> None:
    numbers = ALL_BF16[~ALL_BF16.isnan()]
    for draw in range(3):
        assert torch.equal(bits(stochastic_bf16(numbers.float(), draw)), bits(numbers))
    rounded, rest = split_float(numbers.float())
    assert torch.equal(bits(rounded), bits(numbers)) and not rest.any()


def test_nan_stays_nan_and_infinities_stay() -> None:
    odd = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, 0x7F800000, -0x800000], dtype=torch.int32).view(
        torch.float32
    )
    assert odd[:3].isnan().all() and odd[3] == INF and odd[4] == -INF
    for found in (stochastic_bf16(odd, 1), split_float(odd)[0], join_float(*split_float(odd))):
        assert found[:3].isnan().all() and found[3] == INF and found[4] == -INF


@pytest.mark.parametrize("value", [1.001, -0.3333333, 1e-6, -3e38, 1e-39, 1.9999, 255.7])
def test_the_mean_of_many_draws_is_the_value(value: float) -> None:
    exact = torch.tensor(value)
    below, rest = split_float(exact.view(1))
    low = torch.tensor([bits(exact.view(1)).item() & -65536], dtype=torch.int32).view(torch.float32)
    high = torch.tensor([(bits(exact.view(1)).item() & -65536) + 65536], dtype=torch.int32).view(
        torch.float32
    )
    drawn = stochastic_bf16(exact.expand(200_000).contiguous(), 3).double()
    assert set(drawn.unique().tolist()) == {low.double().item(), high.double().item()}
    step = (high.double() - low.double()).abs().item()
    standard_deviation = step * 0.5 / 200_000**0.5
    assert abs(drawn.mean().item() - exact.double().item()) < 5 * standard_deviation
    assert rest.item() and below.double().item() in (low.double().item(), high.double().item())


def test_a_draw_depends_only_on_its_numbers_and_changes_no_global_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = torch.linspace(-1, 1, 5000)
    before = torch.get_rng_state()
    first = stochastic_bf16(values, 0, 7, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(10)
    assert torch.equal(stochastic_bf16(values, 0, 7, 3), first)
    for other in ((1, 7, 3), (0, 8, 3), (0, 7, 4), (0, 73), (73, 0)):
        assert not torch.equal(stochastic_bf16(values, *other), first)
    monkeypatch.setattr(rounding, "SLICE", 100)
    assert stochastic_bf16(values.view(50, 100), 0).shape == (50, 100)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=50))
def test_a_split_value_comes_back_bit_for_bit(patterns: list[int]) -> None:
    values = torch.tensor(patterns, dtype=torch.int32).view(torch.float32)
    values = values[~values.isnan()]
    rounded, rest = split_float(values)
    assert torch.equal(bits(join_float(rounded, rest)), bits(values))
    nearest = (rounded.double() - values.double()).abs()
    plain = (values.bfloat16().double() - values.double()).abs()
    assert (nearest[rounded.isfinite()] <= plain[rounded.isfinite()]).all()


def test_slices_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(37, 5, generator=torch.Generator().manual_seed(0))
    whole = split_float(values)
    monkeypatch.setattr(rounding, "SLICE", 7)
    for one, other in zip(split_float(values), whole, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(join_float(*whole), values) and torch.equal(split_float(values.t())[0], whole[0].t())
    assert torch.equal(split_float(torch.tensor(1.001))[0], torch.tensor(1.001).bfloat16())


@pytest.mark.parametrize("cut", [64, 128, 320])
def test_parts_of_a_tensor_are_rounded_as_the_whole(cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "SLICE", 64)
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole, parts = stochastic_bf16(values, 3, 1), torch.empty(1000, dtype=torch.bfloat16)
    for start in reversed(range(0, 1000, cut)):
        place = slice(start, start + cut)
        stochastic_bf16(values[place], 3, 1, start=start, out=parts[place])
    assert torch.equal(parts, whole)
    ups = (whole.float() > values).view(-1)[:960].view(15, 64)
    assert len({tuple(row.tolist()) for row in ups}) == 15  # every slice has a draw of its own
    rounded, rest = torch.empty(1000, dtype=torch.bfloat16), torch.empty(1000, dtype=torch.int16)
    for start in range(0, 1000, cut):
        place = slice(start, start + cut)
        split_float(values[place], out=(rounded[place], rest[place]))
    assert torch.equal(join_float(rounded, rest), values)
