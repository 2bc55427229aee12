import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dpo_cache.lm.forest.layout import build_forest, count_forest_tokens
from dpo_cache.types import Completion

ids = st.lists(st.integers(0, 2), min_size=1, max_size=8).map(lambda values: np.array(values, np.uint32))
completions = st.lists(st.builds(Completion, ids, ids), min_size=1, max_size=12)


def path_of(forest, position: int) -> list[int]:
    path = []
    while position >= 0:
        path.append(position)
        position = int(forest.parents_L[position])
    return path[::-1]


def test_the_example_in_the_docstring() -> None:
    a, b, c, d, e, f, g = range(7)
    forest = build_forest(
        [
            Completion(np.array([a, b], np.uint32), np.array([c, d], np.uint32)),
            Completion(np.array([a, b], np.uint32), np.array([c, e], np.uint32)),
            Completion(np.array([a, f], np.uint32), np.array([g], np.uint32)),
        ]
    )
    assert forest.tokens_L.tolist() == [a, b, c, d, e, f, g]
    assert forest.depths_L.tolist() == [0, 1, 2, 3, 3, 1, 2]
    assert forest.parents_L.tolist() == [-1, 0, 1, 2, 2, 0, 5]
    assert forest.starts.tolist() == [0, 4, 5]
    assert [target.tolist() for target in forest.targets] == [[2, 3], [2, 4], [6]]


@given(completions)
def test_uses_count_the_completions_whose_path_a_token_is_on(given_completions: list[Completion]) -> None:
    forest = build_forest(given_completions)
    expected = np.zeros(len(forest), int)
    for target in forest.targets:
        expected[path_of(forest, int(target[-1]))] += 1
    assert forest.uses_L().tolist() == expected.tolist()
    assert forest.uses_L().sum() == sum(map(len, given_completions))


@given(completions)
def test_each_completion_is_read_back_along_its_path(given_completions: list[Completion]) -> None:
    forest = build_forest(given_completions)
    for completion, target in zip(given_completions, forest.targets, strict=True):
        path = path_of(forest, int(target[-1]))
        assert forest.tokens_L[path].tolist() == completion.sequence_ids.tolist()
        assert path[len(completion.prompt_ids) :] == target.tolist()
        assert forest.depths_L[path].tolist() == list(range(len(path)))


@given(completions)
def test_each_distinct_prefix_occurs_exactly_once(given_completions: list[Completion]) -> None:
    forest = build_forest(given_completions)
    sequences = [tuple(completion.sequence_ids.tolist()) for completion in given_completions]
    prefixes = {sequence[: end + 1] for sequence in sequences for end in range(len(sequence))}
    found = [tuple(forest.tokens_L[path_of(forest, position)].tolist()) for position in range(len(forest))]
    assert sorted(found) == sorted(prefixes)
    assert count_forest_tokens(given_completions) == len(forest)


@given(completions)
def test_targets_are_the_completion_tokens(given_completions: list[Completion]) -> None:
    forest = build_forest(given_completions)
    expected = {int(position) for target in forest.targets for position in target}
    assert set(np.flatnonzero(forest.is_target_L()).tolist()) == expected
