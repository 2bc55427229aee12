"""Ranks that watch each other, as threads of one process with a store in memory."""

import json
import subprocess
import sys
import threading
import time

import pytest
from torch import distributed

from dpo_cache.errors import DataError, OptionError, OtherRankError, TrainingError
from dpo_cache.training import watch
from dpo_cache.training.watch import Watch
from tests.waiting import wait_until


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOOK_S", 0.01)
    monkeypatch.setattr(watch, "BEAT_S", 0.02)
    monkeypatch.setattr(watch, "FOLLOWS_S", 5.0)
    monkeypatch.setattr(watch, "END_S", 1000.0)


def open_watches(size: int) -> list[Watch]:
    store = distributed.HashStore()
    found: list[Watch | None] = [None] * size

    def begin(index: int) -> None:
        found[index] = Watch(store, index, size)

    threads = [threading.Thread(target=begin, args=(index,)) for index in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [one for one in found if one is not None]


def end_all(watches: list[Watch]) -> None:
    for one in watches:
        one.end()


def test_the_first_error_counts_and_the_others_learn_of_it() -> None:
    watches = open_watches(3)
    error = DataError("no pairs")
    assert watches[1].report(error) is error
    assert str(error) == "rank 1: no pairs" and error.rank == 1
    for index in (0, 2):  # whatever their own errors are
        other = watches[index].report(RuntimeError("connection closed"))
        assert isinstance(other, OtherRankError) and other.code == 1 and other.rank is None
        assert str(other) == "rank 1 failed: no pairs"
    end_all(watches)


def test_an_error_of_all_ranks_is_that_of_the_main_rank() -> None:
    watches = open_watches(3)
    errors = [OptionError("wrong") for _ in watches]
    found: dict[int, BaseException] = {}
    threads = [
        threading.Thread(
            target=lambda index=index: found.update({index: watches[index].report(errors[index])})
        )
        for index in (2, 1, 0)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] is errors[0] and str(errors[0]) == "wrong"
    assert [(type(found[index]), found[index].code) for index in (1, 2)] == [(OtherRankError, 2)] * 2  # type: ignore[attr-defined]
    end_all(watches)


def test_a_rank_that_ended_as_it_should_is_not_lost() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    watches = _with_process(process.pid)
    watches[0]._store.set("ended/1", "1")
    process.communicate(b"\n")
    time.sleep(0.1)
    assert watches[0].failure is None
    end_all(watches)


def test_a_rank_whose_process_is_gone_is_lost() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    watches = _with_process(process.pid)
    process.kill()  # and not reaped: a zombie
    assert process.stdin is not None
    process.stdin.close()
    error = watches[0].report(RuntimeError("connection closed"))
    assert type(error) is TrainingError and error.rank == 0
    assert str(error).startswith(f"rank 1, process {process.pid} on ")
    process.wait()
    end_all(watches)


def _with_process(pid: int) -> list[Watch]:
    """The watch of rank 0, for which rank 1 is another process."""
    import psutil

    store = distributed.HashStore()
    described = {**watch._this_process(), "pid": pid, "started": psutil.Process(pid).create_time()}
    store.set("process/1", json.dumps(described))
    return [Watch(store, 0, 2)]


def test_ranks_end_with_the_process_that_started_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPO_CACHE_LAUNCHER", "999999999")  # not the parent of this process
    store = distributed.HashStore()
    main = Watch(store, 0, 1)
    wait_until(lambda: main.failure is not None, "the failure")
    error = main.report(OtherRankError("found in a call"))
    assert type(error) is TrainingError and error.rank == 0
    assert str(error) == "the process that started the ranks is gone."
    main.end()


def test_a_silent_rank_of_another_machine_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SILENT_S", 0.5)
    store = distributed.HashStore()
    store.set("process/1", json.dumps({"kernel": "another", "name": "node7", "pid": 5, "started": 0.0}))
    main = Watch(store, 0, 2)
    for beat in range(100):  # longer than the silence that is allowed
        store.set("beat/1", str(beat))
        time.sleep(0.01)
    assert main.failure is None
    wait_until(lambda: main.failure is not None, "the lost rank")
    assert main.failure is not None and main.failure.rank == 1
    assert main.failure.text.startswith("rank 1, process 5 on node7, ended without reporting an error")
    main.end()


def test_a_rank_whose_main_thread_is_stuck_ends_its_process() -> None:
    script = """
import os, sys, time
from torch import distributed
from dpo_cache.training import watch
watch.LOOK_S = watch.END_S = 0.05
store = distributed.HashStore()
store.set("process/1", __import__("json").dumps(watch._this_process()))
main = watch.Watch(store, 0, 2)
store.set("failure", '{"rank": 1, "text": "no pairs", "code": 2, "reporter": 1}')
time.sleep(1000)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (2, "")  # rank 1 reports it
