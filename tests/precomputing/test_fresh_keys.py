"""Keys are looked up in an index that others' shards are added to, without listing them all the time."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from dpo_cache.precomputing.fresh_keys import FreshKeys


class Index:
    """Counts refreshes, each of which takes 2 s of a clock."""

    def __init__(self) -> None:
        self.now, self.num_refreshed = 100.0, 0

    def refresh(self) -> None:
        self.num_refreshed += 1
        self.now += 2.0

    def contains(self, keys: list[bytes]) -> np.ndarray:
        return np.array([key == b"known" for key in keys])


def test_a_slow_refresh_takes_at_most_a_twentieth_of_the_time() -> None:
    index = Index()
    fresh = FreshKeys(index, clock=lambda: index.now)  # type: ignore[arg-type]
    assert fresh.contains([b"known", b"other"]).tolist() == [True, False] and index.num_refreshed == 1
    index.now += 39.0
    fresh.contains([b"known"])
    assert index.num_refreshed == 1
    index.now += 1.0
    fresh.contains([b"known"])
    assert index.num_refreshed == 2


def test_an_index_that_is_refreshed_at_once_is_so_before_each_look_up() -> None:
    refreshed: list[int] = []
    index = SimpleNamespace(refresh=lambda: refreshed.append(1), contains=lambda keys: np.zeros(1, bool))
    fresh = FreshKeys(index, clock=lambda: 5.0)  # type: ignore[arg-type]
    for _ in range(3):
        fresh.contains([b"a"])
    assert len(refreshed) == 3
