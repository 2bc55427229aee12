import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dpo_cache.store.key_set import KeySet, join_keys, occurs_before

keys = st.lists(st.binary(min_size=2, max_size=2), max_size=12).map(lambda values: np.array(values, "S2"))


@given(st.lists(keys, max_size=5))
def test_a_key_set_says_what_a_set_says(batches: list[np.ndarray]) -> None:
    found, plain = KeySet(2), set()
    for batch in batches:
        assert found.contains(batch).tolist() == [key in plain for key in batch.tolist()]
        is_new = []
        for key in batch.tolist():
            is_new.append(key not in plain)
            plain.add(key)
        assert found.add(batch).tolist() == is_new
    assert len(found) == len(plain)


@given(keys, keys)
def test_what_stands_earlier_is_found(some: np.ndarray, wanted: np.ndarray) -> None:
    wanted = np.resize(wanted, len(some)) if len(wanted) else some
    expected = [wanted[place] in some[:place] for place in range(len(some))]
    assert occurs_before(some, wanted).tolist() == expected


@given(keys)
def test_joined_keys_are_one_after_the_other(some: np.ndarray) -> None:
    joined = join_keys(some, some[::-1].copy())
    assert joined.tobytes() == b"".join(
        one.ljust(2, b"\0") + other.ljust(2, b"\0")
        for one, other in zip(some.tolist(), some.tolist()[::-1], strict=True)
    )
