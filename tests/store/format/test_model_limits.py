import numpy as np
import pytest

from dpo_cache.errors import ModelError
from dpo_cache.store.format.model_limits import ModelLimits
from dpo_cache.store.format.pair_tables import pair_table
from dpo_cache.types import Completion, Pair, ScoredPair
from tests.store.conftest import ids, score


def table_of(*pairs: tuple[list[int], list[int], list[int], list[int]]):
    """Rows 10, 11, ...: prompt, chosen, prompt of rejected, rejected."""
    return pair_table(
        [
            ScoredPair(
                Pair(row, Completion(ids(*prompt), ids(*chosen)), Completion(ids(*own), ids(*rejected))),
                score(*np.full(len(chosen), -1.0)),
                score(*np.full(len(rejected), -1.0)),
            )
            for row, (prompt, chosen, own, rejected) in enumerate(pairs, 10)
        ]
    )


GOOD = ([1, 2], [3], [1, 2], [9, 4])


@pytest.mark.parametrize("place", range(4))
def test_an_id_beyond_the_vocabulary_names_its_row(place: int) -> None:
    bad = [list(part) for part in GOOD]
    bad[place][0] = 4_000_000_000
    table = table_of(GOOD, tuple(bad))  # type: ignore[arg-type]
    with pytest.raises(
        ModelError, match="row 11 of the data holds token id 4000000000, but m0 has 10 embedd"
    ):
        ModelLimits("m0", 10).check(table, "part")
    ModelLimits("m0", 10).check(table_of(GOOD), "part")
    with pytest.raises(ModelError, match="row 10 of the data holds token id 9, but m0 has 9 embeddings"):
        ModelLimits("m0", 9).check(table_of(GOOD), "part")


def test_a_row_longer_than_the_model_names_its_row() -> None:
    ModelLimits("m0", 10, positions=4).check(table_of(GOOD), "part")
    with pytest.raises(
        ModelError, match="row 10 of the data has a sequence of 4 tokens, but m0 was made for 3"
    ):
        ModelLimits("m0", 10, positions=3).check(table_of(GOOD), "part")
    # the longest prompt and the longest answer are of different sides
    ModelLimits("m0", 10, positions=4).check(table_of(([1, 2, 3], [4], [1], [2, 3, 4])), "part")
