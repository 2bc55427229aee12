"""Ranks learn at their next exchange that one of them has no memory left."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dpo_cache.training.exchange import OutOfMemoryElsewhere, end_run, exchange
from dpo_cache.training.ranks import Ranks


class ThreadRanks(Ranks):
    """Ranks that are threads of this process."""

    def __init__(self, index: int, size: int, barrier: threading.Barrier, values: list[Any]):
        self.index, self.size = index, size
        self._barrier, self._values = barrier, values

    def gather(self, value: Any) -> list[Any]:
        self._values[self.index] = value
        self._barrier.wait(10)
        found = list(self._values)
        self._barrier.wait(10)
        return found


def on_threads(function: Callable[[Ranks], Any], size: int) -> list[Any]:
    barrier, values, results = threading.Barrier(size), [None] * size, [None] * size

    def run(index: int) -> None:
        results[index] = function(ThreadRanks(index, size, barrier, values))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_every_rank_has_the_values_of_all() -> None:
    assert on_threads(lambda ranks: exchange(ranks, ranks.index), 3) == [[0, 1, 2]] * 3


@pytest.mark.parametrize("num_failing", [1, 2])
def test_all_ranks_leave_a_run_at_the_same_exchange_and_can_exchange_again(num_failing: int) -> None:
    def run(ranks: Ranks) -> tuple[str, list[int]]:
        try:
            exchange(ranks, "fits")
            if ranks.index < num_failing:
                raise torch.OutOfMemoryError("no memory\nfor this")
            exchange(ranks, "fits")
            raise AssertionError("another rank has ended the run")
        except torch.OutOfMemoryError as error:
            end_run(ranks, error)
            kind = "elsewhere" if isinstance(error, OutOfMemoryElsewhere) else "here"
            return f"{kind}: {error}", exchange(ranks, ranks.index)

    here, elsewhere = "here: no memory\nfor this", "elsewhere: rank 0: no memory"
    assert on_threads(run, 3) == [
        (here if index < num_failing else elsewhere, [0, 1, 2]) for index in range(3)
    ]
