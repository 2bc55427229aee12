from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cache.store.format.keys import is_sorted, key_array, key_order
from dpo_cache.store.key_table import KeyTable, keys_of_pairs

keys = st.binary(min_size=16, max_size=16) | st.builds(
    lambda low: bytes(8) + low.to_bytes(8, "big"), st.sampled_from([0, 1, 2, 2**63, 2**64 - 1])
)
batches = st.lists(st.lists(keys, max_size=12), max_size=6)


@given(batches, st.lists(keys, max_size=12))
@settings(deadline=None)
def test_a_table_finds_what_a_dict_would(added: list[list[bytes]], others: list[bytes]) -> None:
    table, plain, first = KeyTable(), {}, 0
    for batch in added:
        table.add(key_array(batch), first)
        for row, name in enumerate(batch, start=first):
            plain.setdefault(name, row)
        first += len(batch)
    wanted = [*plain, *others]
    assert table.find(key_array(wanted)).tolist() == [plain.get(name, -1) for name in wanted]
    assert len(table) == len(plain)


@given(st.lists(keys, max_size=30))
@settings(deadline=None)
def test_keys_are_ordered_as_bytes_are(names: list[bytes]) -> None:
    order = key_order(key_array(names)).tolist()
    assert order == sorted(range(len(names)), key=lambda index: names[index])
    assert is_sorted(key_array(sorted(set(names))))
    assert is_sorted(key_array(names)) == all(one < other for one, other in pairwise(names))


def test_many_keys_that_share_their_first_half_are_found_fast() -> None:
    table = KeyTable()
    halves = np.zeros((200_000, 2), ">u8")
    halves[:, 1] = np.arange(200_000) * 2
    everything = halves.view("S16")[:, 0]
    table.add(everything[::-1], 0)
    assert (table.find(everything) == np.arange(200_000)[::-1]).all()
    halves[:, 1] += 1
    assert (table.find(halves.view("S16")[:, 0]) == -1).all()


@given(st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 3)), max_size=12))
@settings(deadline=None)
def test_pairs_of_numbers_are_keys(pairs: list[tuple[int, int]]) -> None:
    table = KeyTable()
    one, other = np.array(pairs, np.int64).reshape(-1, 2).T
    table.add(keys_of_pairs(one, other), 0)
    assert table.find(keys_of_pairs(one, other)).tolist() == [pairs.index(pair) for pair in pairs]
    opposites = [(second, first) for first, second in pairs]
    expected = [pairs.index(pair) if pair in pairs else -1 for pair in opposites]
    assert table.find(keys_of_pairs(other, one)).tolist() == expected
