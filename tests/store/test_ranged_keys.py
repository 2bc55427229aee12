from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cache.store import ranged_keys
from dpo_cache.store.format.keys import key_array, key_bounds
from dpo_cache.store.ranged_keys import RangedKeys, RangedShard

NUMBERS = st.lists(st.integers(0, 400), unique=True, min_size=1, max_size=30)


def key(number: int) -> bytes:
    """Keys that share their first half in threes, and have zeros at their ends."""
    return (number // 3).to_bytes(8, "big") + (number % 3 << 56).to_bytes(8, "big")


class Shards:
    """Shards in memory, and the row groups that were read of them."""

    def __init__(self, shards: dict[str, list[list[int]]]):
        """Row groups of numbers by the shard's name."""
        self.groups = {
            name: [key_array([key(number) for number in group]) for group in groups]
            for name, groups in shards.items()
        }
        self.reads: list[tuple[str, int]] = []

    def read(self, name: str, groups: Sequence[int]) -> list[np.ndarray]:
        self.reads += [(name, group) for group in groups]
        return [self.groups[name][group] for group in groups]

    def index(self) -> RangedKeys:
        found, row = RangedKeys(self.read), 0
        for name, groups in self.groups.items():
            rows = [len(group) for group in groups]
            found.add([RangedShard(name, row, np.stack(list(map(key_bounds, groups))), rows)])
            row += sum(rows)
        return found


def cut(numbers: list[int], size: int, shuffled: np.random.Generator) -> list[list[int]]:
    """Row groups that ascend; inside, in any order."""
    ordered = sorted(numbers)
    groups = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    return [shuffled.permutation(group).tolist() for group in groups]


@given(st.lists(NUMBERS, min_size=1, max_size=6), st.integers(1, 7), st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_rows_are_those_of_a_dictionary(numbers: list[list[int]], size: int, kept_bytes: int) -> None:
    generator = np.random.default_rng(size)
    shards = Shards({str(place): cut(of, size, generator) for place, of in enumerate(numbers)})
    rows: dict[bytes, set[int]] = {}
    flat = [name for groups in shards.groups.values() for group in groups for name in group.tolist()]
    for row, name in enumerate(flat):
        rows.setdefault(name.ljust(16, b"\0"), set()).add(row)
    wanted = [key(number) for number in generator.permutation(402).tolist()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranged_keys, "KEPT_BYTES", kept_bytes)
        index = shards.index()
        for _ in range(2):  # keys that are kept, and those that are read again
            for name, row in zip(wanted, index.find(key_array(wanted)).tolist(), strict=True):
                assert row in rows.get(name, {-1})
    assert index.count_keys(lambda keys: np.zeros(len(keys), bool)) == len(rows)
    assert index.count_keys(lambda keys: keys == key_array([wanted[0]])) == len(rows.keys() - {wanted[0]})


def test_adding_reads_nothing_and_a_look_up_reads_the_row_groups_of_its_keys_once() -> None:
    shards = Shards({"a": [[0, 1], [10, 11], [20, 21]], "b": [[30, 31], [40, 41]]})
    index = shards.index()
    assert shards.reads == []
    for _ in range(2):
        assert index.find(key_array([key(20), key(10), key(40), key(41), key(99)])).tolist() == [
            4,
            2,
            8,
            9,
            -1,
        ]
    assert shards.reads == [("a", 1), ("a", 2), ("b", 1)]
    assert index.find(key_array([key(15), key(25)])).tolist() == [-1, -1], "between the row groups"
    assert len(shards.reads) == 3


def test_keys_beyond_the_limit_are_read_again_and_those_read_first_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranged_keys, "KEPT_BYTES", 64)  # four keys
    shards = Shards({"a": [[0, 1], [10, 11], [20, 21], [30, 31]]})
    index, wanted = shards.index(), key_array([key(number) for number in (0, 10, 20, 30)])
    for _ in range(3):
        assert index.find(wanted).tolist() == [0, 2, 4, 6]
    assert [shards.reads.count(("a", group)) for group in range(4)] == [1, 1, 3, 3]


def test_shards_that_overlap_are_searched_in_turn() -> None:
    shards = Shards({"a": [[0, 8], [20, 28]], "b": [[4, 12], [16, 40]], "c": [[50], [60]]})
    index = shards.index()
    wanted = key_array([key(number) for number in (0, 8, 20, 28, 4, 12, 16, 40, 50, 60, 5)])
    assert index.find(wanted).tolist() == [*range(10), -1]


def test_without_shards_nothing_is_found() -> None:
    index = Shards({}).index()
    assert index.find(key_array([key(1)])).tolist() == [-1]
    assert index.find(np.empty(0, "S16")).tolist() == []
    assert index.count_keys(lambda keys: np.zeros(len(keys), bool)) == 0
