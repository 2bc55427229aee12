"""Sequences of queries and gathered keys give what the segments give; the kernels themselves need CUDA."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cache.lm.forest.attention import Rules
from dpo_cache.lm.forest.layout import build_forest
from dpo_cache.lm.forest.plans import plan_tree
from dpo_cache.lm.forest.segments import segments_of
from dpo_cache.lm.forest.stream import Stream
from dpo_cache.lm.forest.varlen import Sequences, VarlenPlan, lay_out
from dpo_cache.lm.policy import completion_logps
from dpo_cache.lm.scoring import _segments
from dpo_cache.lm.self_check import AttentionChoice, choose_attention
from dpo_cache.types import Completion
from tests.conftest import make_completions
from tests.lm.families import make_model
from tests.lm.forest.test_layout import completions, path_of
from tests.lm.test_families import scores

CPU = torch.device("cpu")
rules = st.sampled_from([Rules(1.0), Rules(1.0, window=3), Rules(1.0, chunk=4)])


def seen_keys(layout, rule: Rules) -> list[list[int]]:
    """The keys that each query sees: causally from the end of its sequence, and under the window."""
    found = []
    for number in range(layout.num_sequences):
        keys = layout.keys_P[layout.key_ends[number] : layout.key_ends[number + 1]].tolist()
        num_queries = int(layout.query_ends[number + 1] - layout.query_ends[number])
        for end in range(len(keys) - num_queries + 1, len(keys) + 1):
            found.append(keys[max(0, end - rule.window) if rule.window else 0 : end])
    return found


@given(completions, rules)
def test_each_token_of_a_forest_sees_its_path(given_completions: list[Completion], rule: Rules) -> None:
    forest = build_forest(given_completions)
    seen = seen_keys(lay_out(segments_of(forest), rule), rule)
    assert len(seen) == len(forest)
    for token, keys in enumerate(seen):
        path = path_of(forest, token)
        assert keys == path[int(rule.first_visible(len(path) - 1)) :]


@settings(deadline=None, max_examples=60)
@given(completions, st.integers(1, 9), rules)
def test_each_token_of_a_chunk_sees_its_path(
    given_completions: list[Completion], size: int, rule: Rules
) -> None:
    stream, path = Stream(given_completions), [-1] * 16
    for number, chunk in enumerate(stream.chunks(lambda: size)):
        if not len(chunk):
            continue
        carried = [*path]
        segments = _segments(chunk)
        seen = seen_keys(lay_out(segments, rule), rule)
        for segment in segments:
            for place in range(segment.start, segment.end):
                depth = segment.depth + place - segment.start
                path[depth] = number * 1000 + place
                first = segments[0].depth
                found = [carried[key] if key < first else number * 1000 + key - first for key in seen[place]]
                assert found == path[int(rule.first_visible(depth)) : depth + 1]


@pytest.mark.parametrize("rule", [Rules(0.4), Rules(0.4, window=5), Rules(0.4, chunk=6)])
def test_values_and_gradients_are_those_of_the_segments(rule: Rules) -> None:
    forest = build_forest(make_completions())
    generator = torch.Generator().manual_seed(0)
    found = []
    shapes = [(1, heads, len(forest), 8) for heads in (4, 2, 2)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    weights = torch.randn((1, len(forest), 4, 8), generator=generator, dtype=torch.float64)
    for plan in (plan_tree(forest, "cuda"), VarlenPlan(segments_of(forest), CPU)):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = plan.attend(0, *leaves, rule)
        (output * weights).sum().backward()
        found.append([output, *(leaf.grad for leaf in leaves)])
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(*found, strict=True))


@pytest.mark.rotating(3)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "llama4", "phi", "deepseek_v3"])
def test_families_are_scored_and_trained_as_by_segments(family: str) -> None:
    given_completions, found = make_completions(num_prompts=3), []
    model = make_model(family)
    choices = [
        choose_attention(model, max_length=64),
        AttentionChoice("forest", "for the test", kernel="varlen"),
    ]
    for choice in choices:
        model.zero_grad()
        completion_logps(model, given_completions, choice).tokens_T.square().sum().backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))
    for budget in (13, 4096):
        for one, other in zip(
            *(scores(model, given_completions, choice, budget) for choice in choices), strict=True
        ):
            assert np.abs(one - other).max() < 3e-5


def test_gradients_of_gathered_keys_are_added_in_float32() -> None:
    """256 + 1 is 256 in bf16: one after the other, the uses of a shared prompt would get lost."""
    prompt = np.zeros(1, np.uint32)
    answers = [Completion(prompt, np.array([index], np.uint32)) for index in range(9)]
    forest = build_forest(answers)
    sequences = Sequences(lay_out(segments_of(forest), Rules(1.0)), len(forest), CPU)
    keys = torch.zeros(len(forest), 1, 1, dtype=torch.bfloat16, requires_grad=True)
    gathered = sequences.gather(keys)
    grad = torch.ones_like(gathered)
    grad[0] = 256
    gathered.backward(grad)
    assert keys.grad.flatten().tolist() == [264.0] + [1.0] * 9


def test_soft_caps_and_sinks_are_left_to_other_kernels() -> None:
    plan, tensor = VarlenPlan(segments_of(build_forest(make_completions())), CPU), torch.zeros(1, 1, 1, 8)
    for rule in (Rules(1.0, softcap=5.0), Rules(1.0, sinks_H=torch.zeros(1))):
        with pytest.raises(NotImplementedError):
            plan.attend(0, tensor, tensor, tensor, rule)
