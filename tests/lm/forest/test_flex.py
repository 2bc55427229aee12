"""Under FlexAttention's plan a token sees the keys that it sees by segments."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import _get_current_dispatch_mode

from dpo_cache.lm.forest import flex, flex_call
from dpo_cache.lm.forest.attention import Rules, use_forest_attention
from dpo_cache.lm.forest.flex import FlexPlan, tree_spans, visible_blocks
from dpo_cache.lm.forest.flex_call import FlexCall
from dpo_cache.lm.forest.layout import build_forest
from dpo_cache.lm.forest.segments import segments_of
from dpo_cache.lm.forest.stream import Stream
from dpo_cache.lm.memory.recompute import Recomputation
from dpo_cache.lm.policy import completion_logps
from dpo_cache.lm.scoring import _segments
from dpo_cache.lm.self_check import AttentionChoice, choose_attention
from dpo_cache.types import Completion
from tests.conftest import make_completions
from tests.lm.families import make_model
from tests.lm.test_families import scores

ids = st.lists(st.integers(0, 2), min_size=1, max_size=8).map(lambda values: np.array(values, np.uint32))
completions = st.lists(st.builds(Completion, ids, ids), min_size=1, max_size=12)
CPU = torch.device("cpu")
FLEX = AttentionChoice("forest", "for the test", kernel="flex")
rules = st.sampled_from([Rules(1.0), Rules(1.0, window=3), Rules(1.0, chunk=4)])


@settings(deadline=None, max_examples=60)
@given(completions, st.integers(1, 9), rules)
def test_a_query_sees_its_own_path_and_nothing_else(
    given_completions: list[Completion], size: int, rule: Rules
) -> None:
    stream, path = Stream(given_completions), [-1] * 16
    for number, chunk in enumerate(stream.chunks(lambda: size)):
        if not len(chunk):
            continue
        plan = FlexPlan(_segments(chunk), CPU, {}, stream.max_depth)
        is_visible = plan.visible(rule)
        for piece in chunk.pieces:
            for place in range(piece.start, piece.end):
                depth = piece.depth + place - piece.start
                path[depth] = number * 1000 + place
                expected = set(path[int(rule.first_visible(depth)) : depth + 1])
                keys = torch.arange(plan.path_length + len(chunk))
                seen = keys[is_visible(0, 0, torch.tensor(place), keys)].tolist()
                found = {
                    path[key] if key < plan.path_length else number * 1000 + key - plan.path_length
                    for key in seen
                }
                assert found == expected and len(seen) == len(expected)


@settings(deadline=None, max_examples=60)
@given(completions, st.integers(1, 30), rules, st.integers(1, 4))
def test_blocks_agree_with_the_mask_function(
    given_completions: list[Completion], size: int, rule: Rules, block: int
) -> None:
    """All pairs of a block that is left out are hidden, and all of a whole block are visible."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "MASK_BLOCK", block)
        stream = Stream(given_completions)
        for chunk in stream.chunks(lambda: size):
            if not len(chunk):
                continue
            plan = FlexPlan(_segments(chunk), CPU, {}, stream.max_depth)
            queries, keys = torch.arange(len(chunk)), torch.arange(plan.path_length + len(chunk))
            visible = plan.visible(rule)(0, 0, queries[:, None], keys).numpy()
            is_seen, is_whole = visible_blocks(plan._spans, plan.path_length, rule)
            for (row, column), flag in np.ndenumerate(is_seen):
                part = visible[row * block : (row + 1) * block, column * block : (column + 1) * block]
                assert flag or not part.any()
                assert part.all() or not is_whole[row, column]
            assert is_seen.sum() <= (len(queries) // block + 1) * (len(keys) // block + 2)


def test_blocks_of_other_trees_are_left_out_and_blocks_of_the_prompt_are_whole() -> None:
    ids = np.arange(1200, dtype=np.uint32)
    forest = build_forest([Completion(ids[start : start + 256], ids[1000:1128]) for start in (0, 300)])
    is_seen, is_whole = visible_blocks(tree_spans(segments_of(forest)), 0, Rules(1.0))
    assert is_seen.astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1],
    ]  # fmt: skip
    assert is_whole.tolist() == (is_seen & ~np.eye(6, dtype=bool)).tolist()


@pytest.mark.rotating(2)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "llama4", "phi", "gpt_oss", "deepseek_v3"])
def test_the_flex_plan_gives_the_log_probs_of_the_segments(family: str) -> None:
    model, given_completions = make_model(family), make_completions()
    segments = choose_attention(model, max_length=64)
    for budget in (13, 4096):
        for one, other in zip(
            scores(model, given_completions, FLEX, budget),
            scores(model, given_completions, segments, budget),
            strict=True,
        ):
            assert np.abs(one - other).max() < 3e-5


@pytest.mark.rotating(3)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "llama4", "gpt_oss"])
@pytest.mark.parametrize("mode", ["none", "selective"])
def test_the_flex_plan_gives_the_gradient_of_the_segments(family: str, mode: str) -> None:
    given_completions, found = make_completions(num_prompts=3), []
    model = make_model(family)
    segments = choose_attention(model, max_length=64)
    Recomputation(model).mode = mode
    for attention in (segments, FLEX):
        model.zero_grad()
        logps = completion_logps(model, given_completions, attention).tokens_T
        logps.square().sum().backward()
        found.append([logps.detach(), *(one.grad for one in model.parameters() if one.grad is not None)])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


def test_selective_recomputation_computes_the_attention_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs under a dispatch mode, in which torch does not compile."""
    modes = []

    def compute(call: FlexCall, *tensors: torch.Tensor) -> torch.Tensor:
        modes.append(_get_current_dispatch_mode())
        return real(call, *tensors)

    real = FlexCall.compute
    monkeypatch.setattr(FlexCall, "compute", compute)
    model = make_model("llama")
    use_forest_attention(model)
    Recomputation(model).mode = "selective"
    logps = completion_logps(model, make_completions(num_prompts=2), FLEX).tokens_T
    assert modes == [None] * 2  # layers
    logps.sum().backward()
    assert modes == [None] * 4  # once more, for the gradient


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("softcap", "has_sinks"), [(None, False), (2.0, False), (None, True)])
def test_flex_attention_is_the_formula(softcap: float | None, has_sinks: bool) -> None:
    """The kernel runs uncompiled, which is the only way without a GPU."""
    forest = build_forest(make_completions(num_prompts=2))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, len(forest), 8, generator=generator) for heads in (4, 2, 2))
    sinks = torch.randn(4, generator=generator) if has_sinks else None
    plan = FlexPlan(segments_of(forest), CPU)
    call = plan._call(Rules(0.5, window=9, softcap=softcap))
    found = flex_call.flex(query, key, value, sinks, call.mask, 0.5, softcap and repr(softcap))
    assert torch.allclose(found, call(query, key, value, sinks), atol=1e-6)
