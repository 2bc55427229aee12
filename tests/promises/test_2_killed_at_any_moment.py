"""Promise 2: killed at any moment, precompute loses at most the unflushed batch, and the next run scores only
what is missing.

Ctrl-C and SIGTERM flush first and exit 130 and 143.
"""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import dpo_cache
from tests.conftest import chat_rows, write_rows
from tests.promises.forking import Runs, read_log, wait_for
from tests.promises.soundness import faults, scratch

pytestmark = pytest.mark.skipif(os.name == "nt", reason="runs are forked")

NUM_ROWS = 24


class Bench:
    """One model and data set, and the runs on them."""

    def __init__(self, runs: Runs, model: str, folder: Path):
        self.runs, self.model, self.folder = runs, model, folder
        self.data = write_rows(folder / "pairs.jsonl", chat_rows(NUM_ROWS))
        self.num_runs = 0

    def job(self, cache: Path, **disturbance: Any) -> dict[str, Any]:
        """A run of `precompute` on the cache, with a log of its own."""
        self.num_runs += 1
        arguments = [
            "--model",
            self.model,
            "--dataset",
            self.data,
            "--cache",
            str(cache),
            "--budget-tokens",
            "48",
        ]
        self.log = self.folder / f"log{self.num_runs}"
        self.output = self.folder / f"output{self.num_runs}"
        return {"arguments": arguments, "log": str(self.log), "output": str(self.output), **disturbance}

    def logged(self, word: str) -> list[str]:
        """All that the last run's log says of the word, in order."""
        return [each for line in read_log(self.log) if line[0] == word for each in line[1:]]


@pytest.fixture
def bench(runs: Runs, model_folder: str, tmp_path: Path) -> Bench:
    return Bench(runs, model_folder, tmp_path)


def kept_keys(cache: Path) -> set[str]:
    """Keys of all scores in the cache."""
    if not (cache / "format.json").exists():
        return set()
    opened = dpo_cache.open_cache(cache)
    shards = [
        path
        for reference in opened.references()
        for path in (cache / "references" / reference / "scores").glob("[!.]*.parquet")
    ]
    return {
        key.hex() for path in shards for key in pq.read_table(path, columns=["key"]).column("key").to_pylist()
    }


def rows_of(cache: Path) -> list[tuple]:
    return [
        (
            entry.pair.row,
            entry.pair.chosen.sequence_ids.tolist(),
            entry.pair.rejected.sequence_ids.tolist(),
            entry.ref_chosen,
            entry.ref_rejected,
        )
        for entry in dpo_cache.open_cache(cache).pairs("pairs")
    ]


def same_rows(one: list[tuple], other: list[tuple]) -> bool:
    """Equal ids, and log-probs equal up to rounding: a resumed run cuts its chunks elsewhere."""
    return len(one) == len(other) and all(
        left[:3] == right[:3]
        and all(
            np.allclose(a.token_logps, b.token_logps, atol=3e-5)
            for a, b in zip(left[3:], right[3:], strict=True)
        )
        for left, right in zip(one, other, strict=True)
    )


def unflushed(log: list[list[str]]) -> set[str]:
    """What was scored since the last flush, which a kill may cost."""
    last = max((number for number, line in enumerate(log) if line[0] == "kept"), default=-1)
    return {key for line in log[last + 1 :] if line[0] == "scored" for key in line[1:]}


@pytest.mark.parametrize("num_kills", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_2_killed_at_random_moments_it_ends_with_the_same_rows_and_scores_nothing_twice(
    bench: Bench, num_kills: int
) -> None:
    """Killed by the clock, or between two steps on the disk, until a run comes through; then with a new
    cache, until there were enough kills.
    """
    chance = random.Random(num_kills)
    whole = bench.folder / "whole"
    # the first run imports everything
    assert bench.runs.run(bench.job(bench.folder / "first")) == [0], bench.output.read_text()
    started = time.monotonic()
    assert bench.runs.run(bench.job(whole, flush_s=0.0)) == [0], bench.output.read_text()
    whole_s, num_steps = time.monotonic() - started, int(bench.logged("steps")[0])
    expected, keys = rows_of(whole), kept_keys(whole)
    kills = finished = 0
    while kills < num_kills:
        assert finished < 1000, f"{kills} kills in {finished} runs"
        cache, before = bench.folder / f"cut{finished}", set[str]()
        status = -signal.SIGKILL
        for _ in range(1000):
            if status != -signal.SIGKILL:
                break
            by_step = chance.random() < 0.5
            job = bench.job(
                cache,
                flush_s=chance.choice([0.0, 0.02]),
                die_at=chance.randrange(1, num_steps) if by_step else None,
            )
            (pid,) = bench.runs.start(job)
            if not by_step:
                time.sleep(chance.uniform(0.2, 1.0) * whole_s)
                os.kill(pid, signal.SIGKILL)
            (status,) = bench.runs.wait()
            assert status in (0, -signal.SIGKILL), bench.output.read_text()
            kills += status == -signal.SIGKILL
            after, scored = kept_keys(cache), bench.logged("scored")
            assert faults(cache) == [] and before <= after
            assert len(set(scored)) == len(scored) and not before & set(scored)
            assert set(scored) - after <= unflushed(read_log(bench.log))
            before = after
        else:
            pytest.fail("killed 1000 times without an end")
        finished += 1
        assert same_rows(rows_of(cache), expected) and before == keys


# -- Ctrl-C and SIGTERM ------------------------------------------------------------------------------------

SIGNALS = pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"]
)
WORDS = {130: "interrupted", 143: "terminated"}
NOTHING = "nothing was stored yet"


def said(code: int, stored: str) -> str:
    """The last line of a command that is stopped: what is stored, and how to continue."""
    continues = "" if stored == NOTHING else ", which continues"
    return f"{WORDS[code]}: {stored}. Next: the same command{continues}.\n"


@SIGNALS
def test_2_a_signal_while_scoring_flushes_what_waits_in_memory(bench: Bench, number: int, code: int) -> None:
    cache = bench.folder / "cache"
    (pid,) = bench.runs.start(bench.job(cache, chunk_s=0.05))
    wait_for(bench.log, "scored", times=3)
    assert not cache.exists()  # nothing was flushed so far
    os.kill(pid, number)
    assert bench.runs.wait() == [code]
    scored = set(bench.logged("scored"))
    assert bench.output.read_text().endswith(said(code, "all scores so far are stored"))
    assert len(scored) >= 3 and scored <= kept_keys(cache) and faults(cache) == []


@SIGNALS
def test_2_a_signal_while_the_model_is_loaded_leaves_nothing(bench: Bench, number: int, code: int) -> None:
    (pid,) = bench.runs.start(bench.job(bench.folder / "cache", loading_s=30.0))
    wait_for(bench.log, "loading")
    os.kill(pid, number)
    assert bench.runs.wait() == [code]
    assert bench.output.read_text().endswith(said(code, NOTHING)) and not (bench.folder / "cache").exists()


@SIGNALS
def test_2_a_signal_while_a_shard_is_written_writes_it_once_more(
    bench: Bench, number: int, code: int
) -> None:
    cache = bench.folder / "cache"
    (pid,) = bench.runs.start(bench.job(cache, writing_s=0.3))
    wait_for(bench.log, "writing")
    os.kill(pid, number)
    assert bench.runs.wait() == [code]
    assert [line[0] for line in read_log(bench.log)].count("writing") == 2
    assert set(bench.logged("scored")) == kept_keys(cache) and faults(cache) == scratch(cache) == []


def test_2_a_second_ctrl_c_waits_for_the_flush_and_a_third_does_not(bench: Bench) -> None:
    for num_signals in (2, 3):
        cache = bench.folder / f"cache{num_signals}"
        (pid,) = bench.runs.start(bench.job(cache, chunk_s=0.02, writing_s=0.5 if num_signals == 2 else 30.0))
        wait_for(bench.log, "scored", times=3)
        os.kill(pid, signal.SIGINT)
        wait_for(bench.log, "writing")
        for _ in range(num_signals - 1):
            time.sleep(0.1)
            os.kill(pid, signal.SIGINT)
        assert bench.runs.wait() == [130]
        assert (
            "stopping; what is waiting is saved first (again: stop at once, losing it)\n"
            in bench.output.read_text()
        )
        scored = set(bench.logged("scored"))
        assert (scored <= kept_keys(cache)) == (num_signals == 2)
        assert faults(cache) == scratch(cache) == []
