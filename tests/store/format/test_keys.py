import numpy as np
import pytest

from dpo_cache.store import completion_key
from dpo_cache.store.format.keys import key_array, key_bounds, key_bytes
from dpo_cache.types import Completion
from tests.store.conftest import ids

GOLDEN_KEYS = {
    "99b8ce1926c39e0002294055c7945d54": ([1], [2]),
    "6db4c57b39fce8c8ea5301eb78ca00ae": ([1, 2, 3], [4, 5]),
    "8863f7bec26df6601c1a71b345e2b5c3": ([128000, 4294967295, 0], [65536, 7, 7]),
}


@pytest.mark.parametrize(("hex_key", "completion"), GOLDEN_KEYS.items())
def test_the_keys_of_fixed_completions_never_change(
    hex_key: str, completion: tuple[list[int], list[int]]
) -> None:
    prompt, answer = completion
    assert completion_key(Completion(ids(*prompt), ids(*answer))).hex() == hex_key


def test_the_prompt_boundary_changes_the_key() -> None:
    sequence = ids(1, 2, 3, 4, 5)
    keys = {completion_key(Completion(sequence[:cut], sequence[cut:])) for cut in range(1, 5)}
    assert len(keys) == 4


def test_the_order_of_the_ids_changes_the_key() -> None:
    keys = {
        completion_key(Completion(ids(*prompt), ids(*answer)))
        for prompt in ([1, 2], [2, 1])
        for answer in ([3, 4], [4, 3])
    }
    assert len(keys) == 4


def test_swapping_prompt_and_answer_changes_the_key() -> None:
    assert completion_key(Completion(ids(1, 2), ids(3, 4))) != completion_key(
        Completion(ids(3, 4), ids(1, 2))
    )


@pytest.mark.parametrize("dtype", ["<u4", ">u4", "int32", "int64", "uint16"])
def test_the_dtype_of_the_arrays_does_not_change_the_key(dtype: str) -> None:
    prompt, answer = GOLDEN_KEYS["6db4c57b39fce8c8ea5301eb78ca00ae"]
    completion = Completion(np.array(prompt, dtype), np.array(answer, dtype))
    assert completion_key(completion).hex() == "6db4c57b39fce8c8ea5301eb78ca00ae"


def test_views_with_a_stride_have_the_key_of_their_values() -> None:
    every_second = np.array([1, 9, 2, 9, 3, 9], np.uint32)[::2]
    assert completion_key(Completion(every_second, ids(4, 5))).hex() == "6db4c57b39fce8c8ea5301eb78ca00ae"


def test_the_smallest_and_the_largest_key() -> None:
    generator = np.random.default_rng(0)
    keys = [bytes(8) + generator.bytes(8) for _ in range(20)] + [generator.bytes(16) for _ in range(20)]
    for some in (keys, keys[:20], keys[:1], [b"\xff" * 16, b"\xff" * 8 + bytes(8)]):
        assert key_bytes(key_bounds(key_array(some))) == [min(some), max(some)]
