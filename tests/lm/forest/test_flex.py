"""Under FlexAttention's plan a token sees the keys that it sees by segments; the kernel runs uncompiled."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cache.lm.forest.attention import Rules
from dpo_cache.lm.forest.flex import FlexPlan
from dpo_cache.lm.forest.stream import Stream
from dpo_cache.lm.scoring import _segments
from dpo_cache.lm.self_check import AttentionChoice, choose_attention
from dpo_cache.types import Completion
from tests.conftest import make_completions
from tests.lm.families import make_model
from tests.lm.test_families import scores

ids = st.lists(st.integers(0, 2), min_size=1, max_size=8).map(lambda values: np.array(values, np.uint32))
completions = st.lists(st.builds(Completion, ids, ids), min_size=1, max_size=12)
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
        plan = FlexPlan(_segments(chunk), stream.max_depth, {}, torch.device("cpu"))
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


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "llama4", "phi"])
def test_the_flex_plan_gives_the_log_probs_of_the_segments(family: str) -> None:
    model, given_completions = make_model(family), make_completions()
    segments = choose_attention(model, max_length=64)
    flex = AttentionChoice("forest", "for the test", kernel="flex")
    for budget in (13, 4096):
        for one, other in zip(
            scores(model, given_completions, flex, budget),
            scores(model, given_completions, segments, budget),
            strict=True,
        ):
            assert np.abs(one - other).max() < 3e-5
