from hypothesis import given
from hypothesis import strategies as st

from dpo_cache.lm.forest import segments
from dpo_cache.lm.forest.layout import build_forest
from dpo_cache.lm.forest.plans import plan_tree
from dpo_cache.lm.forest.segments import group_segments, last_at_each_depth
from dpo_cache.types import Completion
from tests.lm.forest.test_layout import completions, path_of


@given(completions, st.integers(1, 4), st.sampled_from([0, 8, 4000]))
def test_the_tokens_of_a_block_see_their_paths(
    given_completions: list[Completion], query_tokens: int, call_cost: int
) -> None:
    forest = build_forest(given_completions)
    whole = plan_tree(forest, "cuda").segments
    before = segments.QUERY_TOKENS, segments.CALL_COST
    segments.QUERY_TOKENS, segments.CALL_COST = query_tokens, call_cost
    try:
        blocks = group_segments(whole)
    finally:
        segments.QUERY_TOKENS, segments.CALL_COST = before
    assert [token for block in blocks for token in range(block.start, block.end)] == list(range(len(forest)))
    open_path: dict[int, int] = {}  # token by depth
    for block in blocks:
        keys = [*(open_path[depth] for depth in range(block.path_length)), *range(block.start, block.end)]
        assert block.depths_N().tolist() == forest.depths_L[block.start : block.end].tolist()
        for token, visible in zip(range(block.start, block.end), block.visible_NP(), strict=True):
            seen = [key for key, is_visible in zip(keys, visible, strict=True) if is_visible]
            assert seen == sorted(path_of(forest, token))
        depths, places = last_at_each_depth(block.depths_N())
        open_path.update(zip(depths.tolist(), (block.start + places).tolist(), strict=True))
