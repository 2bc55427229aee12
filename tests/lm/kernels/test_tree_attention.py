"""Attention of a forest as one operation equals attention of each part by itself."""

import pytest
import torch

from dpo_cache.lm.forest import segments
from dpo_cache.lm.forest.attention import Rules
from dpo_cache.lm.forest.layout import build_forest
from dpo_cache.lm.forest.plans import TreePlan, plan_tree
from dpo_cache.lm.kernels import tree_attention
from dpo_cache.lm.kernels.tree_attention import can_attend_tree, has_kernels
from dpo_cache.planning.live_bytes import LiveBytes
from tests.conftest import make_completions

needs_kernels = pytest.mark.skipif(not has_kernels(), reason="this torch lacks the kernels")
FOREST = build_forest(make_completions())


def make_tensors(dtype: torch.dtype, key_heads: int, *, is_transposed: bool) -> list[torch.Tensor]:
    """Queries, keys, values and the output's gradient; [1, L, heads, E] in memory if transposed."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1, heads, len(FOREST), 8, generator=generator) for heads in (4, key_heads, key_heads)
    ]
    if is_transposed:
        tensors = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    outward = torch.randn(1, 4, len(FOREST), 8, generator=generator).transpose(1, 2)
    return [*(tensor.to(dtype).requires_grad_() for tensor in tensors), outward.to(dtype)]


def outcome(plan: TreePlan, tensors: list[torch.Tensor], rules: Rules) -> list[torch.Tensor]:
    *leaves, outward = tensors
    output = plan.attend(0, *leaves, rules)
    return [output.detach(), *torch.autograd.grad(output, leaves, outward)]


def plain(tensors: list[torch.Tensor], rules: Rules) -> list[torch.Tensor]:
    """One mask [L, L] over the whole row, in float64."""
    *leaves, outward = (tensor.detach().double().requires_grad_() for tensor in tensors)
    visible = torch.zeros(len(FOREST), len(FOREST), dtype=torch.bool)
    for token, depth in enumerate(FOREST.depths_L):
        above = token
        while above >= 0 and FOREST.depths_L[above] >= rules.first_visible(depth):
            visible[token, above] = True
            above = FOREST.parents_L[above]
    query, key, value = leaves
    key, value = (tensor.repeat_interleave(4 // tensor.shape[1], dim=1) for tensor in (key, value))
    scores = (query @ key.transpose(2, 3) * rules.scaling).masked_fill(~visible, float("-inf"))
    output = (scores.softmax(-1) @ value).transpose(1, 2)
    return [output.detach(), *torch.autograd.grad(output, leaves, outward)]


@pytest.mark.rotating(2)
@needs_kernels
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("is_transposed", [True, False])
@pytest.mark.parametrize("reach", [{}, {"window": 4}, {"chunk": 5}], ids=str)
def test_values_and_gradients_are_those_of_one_mask(
    key_heads: int, is_transposed: bool, reach: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "QUERY_TOKENS", 3)
    tensors, rules = make_tensors(torch.float32, key_heads, is_transposed=is_transposed), Rules(0.4, **reach)
    plan = plan_tree(FOREST)
    assert plan.is_one_operation and can_attend_tree(*tensors[:3])
    found, expected = outcome(plan, tensors, rules), plain(tensors, rules)
    plan.is_one_operation = False
    for one, other, exact in zip(found, outcome(plan, tensors, rules), expected, strict=True):
        assert one.shape == exact.shape and one.dtype == torch.float32
        assert ((one - exact).abs() <= (other - exact).abs() + 1e-5).all()


@needs_kernels
def test_bfloat16_errs_no_more_than_attention_by_parts() -> None:
    tensors, rules = make_tensors(torch.bfloat16, 2, is_transposed=True), Rules(0.4)
    plan = plan_tree(FOREST)
    assert can_attend_tree(*tensors[:3])
    found, expected = outcome(plan, tensors, rules), plain(tensors, rules)
    plan.is_one_operation = False
    for one, other, exact in zip(found, outcome(plan, tensors, rules), expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one - exact).norm() <= 1.2 * (other - exact).norm() + 1e-3


@needs_kernels
def test_no_copy_of_a_path_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the output, the logarithms of the sums and the masks."""
    monkeypatch.setattr(segments, "QUERY_TOKENS", 3)
    (query, key, value, _), plan = make_tensors(torch.float32, 2, is_transposed=True), plan_tree(FOREST)
    plan.attend(0, query, key, value, Rules(0.4))  # makes the masks
    with LiveBytes() as live:
        output = plan.attend(0, query, key, value, Rules(0.4))
        kept = live.now
    assert kept <= 4 * (output.numel() + 4 * len(FOREST))


@pytest.mark.parametrize("case", ["autocast", "sizes", "dtype", "soft cap"])
def test_other_attention_is_computed_by_parts(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_cache.lm.forest.plans.attend_tree", lambda *_: pytest.fail("one operation"))
    dtype = torch.float16 if case == "dtype" else torch.float32
    query, key, value, _ = make_tensors(dtype, 2, is_transposed=True)
    if case == "sizes":
        value = value[..., :4]
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        output = plan_tree(FOREST).attend(
            0, query, key, value, Rules(0.4, softcap=30.0 if case == "soft cap" else None)
        )
    assert output.shape == (1, len(FOREST), 4, value.shape[3])


@pytest.mark.parametrize("fault", ["missing", "wrong"])
def test_kernels_that_are_missing_or_differ_are_not_used(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(query: torch.Tensor, *_: object) -> torch.Tensor:
        if fault == "missing":
            raise AttributeError("no such operator")
        return (query * 1.1).transpose(1, 2)

    monkeypatch.setattr(tree_attention, "attend_tree", broken)
    assert not tree_attention._agrees()
