"""Promise 3: any number of processes write to one cache, without a server and without locks."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import dpo_cache
from dpo_cache.store import open_cache
from dpo_cache.store.upkeep.verify import verify_cache
from tests.conftest import chat_rows, write_rows
from tests.promises.forking import Runs, read_log
from tests.promises.life import DETAILS, publish_pairs
from tests.promises.soundness import faults, scratch
from tests.store.conftest import make_pairs, make_scores, plain

NUM_WRITERS = 4


@pytest.mark.skipif(os.name == "nt", reason="runs are forked")
@pytest.mark.parametrize("num_rounds", [2, pytest.param(25, marks=pytest.mark.slow)])
def test_3_four_processes_at_once_make_the_union_of_what_each_would(
    runs: Runs, model_folder: str, tmp_path: Path, num_rounds: int
) -> None:
    """They start at once on a cache that is not there, with data that overlaps; two publish a pair set of one
    name, of the same data.
    """
    rows = chat_rows(36)
    parts = [rows[:18], rows[:18], rows[9:27], rows[18:]]
    data = [write_rows(tmp_path / f"part{number}.jsonl", part) for number, part in enumerate(parts)]
    whole = tmp_path / "whole"
    dpo_cache.precompute(model_folder, write_rows(tmp_path / "all.jsonl", rows), whole)
    reference = open_cache(whole).references()[0]
    for number in range(num_rounds):
        cache = tmp_path / f"cache{number}"
        jobs = [
            {
                "arguments": [
                    "--model",
                    model_folder,
                    "--dataset",
                    path,
                    "--cache",
                    str(cache),
                    "--name",
                    name,
                    "--budget-tokens",
                    "48",
                ],
                "log": str(tmp_path / f"log{number}-{place}"),
                "output": str(tmp_path / f"output{number}-{place}"),
                "flush_s": 0.0,
            }
            for place, (path, name) in enumerate(zip(data, ("same", "same", "two", "three"), strict=True))
        ]
        assert runs.run(*jobs) == [0] * NUM_WRITERS, [Path(job["output"]).read_text() for job in jobs]
        assert faults(cache) == [] and scratch(cache) == [] and verify_cache(cache).problems == []
        opened = open_cache(cache)
        assert opened.references() == [reference] and opened.pair_sets() == [
            "same/train",
            "three/train",
            "two/train",
        ]
        assert len(opened.scores(reference)) == len(open_cache(whole).scores(reference))
        assert [len(opened.pairs(name)) for name in ("same", "two", "three")] == [18, 18, 18]
        lines = [line for job in jobs for line in read_log(Path(job["log"])) if line[0] == "kept"]
        kept = {bytes.fromhex(key) for line in lines for key in line[1:]}
        scores = opened.scores(reference)
        assert len(kept) == len(scores) and scores.contains(sorted(kept)).all()


def at_once(acts: list[Callable[[], None]]) -> None:
    """Run each in a thread of its own, all from one moment on; the first error is raised."""
    gate, errors = threading.Barrier(len(acts)), list[BaseException]()

    def enter(act: Callable[[], None]) -> None:
        gate.wait()
        try:
            act()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=enter, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error


@pytest.mark.usefixtures("small_parts")
def test_3_writers_that_make_the_cache_at_the_same_moment_do_not_disturb_each_other(tmp_path: Path) -> None:
    for number in range(20):
        root = tmp_path / f"cache{number}"

        def write(place: int, root: Path = root) -> None:
            cache = open_cache(root, create=True)
            scores = cache.scores(cache.publish_reference({"weights": "w"}, {"model": f"m{place}"}))
            scores.publish(make_scores([place, place + 1, 100]))
            publish_pairs(cache, f"set{place % 2}", make_pairs(5))

        at_once([lambda place=place: write(place) for place in range(NUM_WRITERS)])  # type: ignore[misc]
        assert faults(root) == [] and scratch(root) == []
        cache = open_cache(root)
        index = cache.scores(cache.find_reference(""))
        expected = make_scores([*range(NUM_WRITERS + 1), 100])
        assert len(index) == len(expected)
        for score, (_, wanted) in zip(index.fetch([key for key, _ in expected]), expected, strict=True):
            assert score.token_logps.tolist() == wanted.token_logps.tolist()


@pytest.mark.usefixtures("small_parts")
def test_3_of_two_pair_sets_published_under_one_name_at_once_one_is_there_whole(tmp_path: Path) -> None:
    cache = open_cache(tmp_path / "cache", create=True)
    sets = [make_pairs(7), [*make_pairs(2), *make_pairs(5, first_row=50)]]  # they share a part
    for _ in range(20):
        at_once([lambda pairs=pairs: publish_pairs(cache, "pairs", pairs) for pairs in sets])  # type: ignore[misc]
        found = [plain(pair) for pair in cache.pairs("pairs")]
        assert found in [[plain(pair) for pair in pairs] for pairs in sets]
        assert faults(tmp_path / "cache") == [] and scratch(tmp_path / "cache") == []


@pytest.mark.usefixtures("small_parts")
def test_3_a_reader_beside_a_writer_sees_one_whole_pair_set_or_the_other(tmp_path: Path) -> None:
    sets = [make_pairs(7), [*make_pairs(2), *make_pairs(5, first_row=50)]]
    expected = [[plain(pair) for pair in pairs] for pairs in sets]
    publish_pairs(open_cache(tmp_path / "cache", create=True), "pairs", sets[0])
    is_done = threading.Event()

    def write() -> None:
        cache = open_cache(tmp_path / "cache")
        try:
            for number in range(40):
                publish_pairs(cache, "pairs", sets[number % 2])
        finally:
            is_done.set()  # or the readers would read forever

    def read() -> None:
        while not is_done.is_set():
            assert [plain(pair) for pair in open_cache(tmp_path / "cache").pairs("pairs")] in expected

    at_once([write, read, read])
    assert open_cache(tmp_path / "cache").pairs("pairs").manifest["pairs_digest"] == DETAILS["pairs_digest"]
