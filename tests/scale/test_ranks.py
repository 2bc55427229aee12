"""The harness of tests with several ranks, and what the ranks of a process group can do."""

import os

import pytest
import torch

from dpo_cache.training.ranks import Ranks
from tests.scale.ranks import RankError, run_ranks


def exchange(ranks: Ranks, text: str) -> tuple:
    total = torch.full((2,), 1.0 + ranks.index)
    ranks.add_up([total])
    gathered = ranks.gather(f"{text} {ranks.index}")
    return (
        ranks.index,
        ranks.is_main,
        gathered,
        ranks.share({"from": ranks.index}),
        ranks.any(ranks.index == ranks.size - 1),
        ranks.any(False),
        total.tolist(),
    )


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_exchange_values(size: int) -> None:
    gathered = [f"rank {index}" for index in range(size)]
    sums = [size * (size + 1) / 2] * 2
    assert run_ranks(exchange, size, "rank") == [
        (index, index == 0, gathered, {"from": 0}, True, False, sums) for index in range(size)
    ]


def process_id(_: Ranks) -> int:
    return os.getpid()


def fail_on_one(ranks: Ranks) -> None:
    if ranks.index == 1:
        raise ValueError("a problem of rank 1")
    ranks.gather(None)


def end_on_one(ranks: Ranks) -> None:
    if ranks.index == 1:
        os._exit(7)
    ranks.gather(None)


def test_processes_are_kept_until_a_rank_fails() -> None:
    first = run_ranks(process_id, 2)
    assert run_ranks(process_id, 2) == first and os.getpid() not in first
    with pytest.raises(RankError, match="(?s)rank 1: .*a problem of rank 1"):
        run_ranks(fail_on_one, 2)
    second = run_ranks(process_id, 2)
    assert not set(first) & set(second)
    with pytest.raises(RankError, match="rank 1: the process ended with exit code 7"):
        run_ranks(end_on_one, 2)
