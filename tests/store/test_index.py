import multiprocessing
import os
import re
from pathlib import Path

import numpy as np
import pytest

from dpo_cache.errors import NotInCacheError, StorageError
from dpo_cache.store import ScoreIndex
from dpo_cache.store.folders.folder import LocalFolder, open_folder
from dpo_cache.types import Score
from tests.store.conftest import key, make_scores, score

NUM_WRITERS = 4


def values_of(scores: list[Score]) -> list[list[float]]:
    return [found.token_logps.tolist() for found in scores]


def expected(numbers: list[int]) -> list[list[float]]:
    return values_of([found for _, found in make_scores(numbers)])


@pytest.mark.parametrize("location", ["local", "memory"])
def test_what_is_published_is_read_back_in_the_order_asked(tmp_path: Path, location: str) -> None:
    folder = open_folder(tmp_path if location == "local" else f"memory://{tmp_path.name}-index")
    index = ScoreIndex(folder, "scores")
    for numbers in ([5, 3, 9], [1, 8], [2, 7, 4]):
        index.publish(make_scores(numbers))
    asked = [8, 3, 3, 4, 9, 1, 2, 5, 7, 8]
    for reader in (index, ScoreIndex(folder, "scores")):
        assert len(reader) == 8
        assert values_of(reader.fetch([key(number) for number in asked])) == expected(asked)


def test_a_fetched_score_is_float32_and_its_own(folder: LocalFolder) -> None:
    index = ScoreIndex(folder, "scores")
    index.publish(make_scores(range(4)))
    first, again = index.fetch([key(3), key(3)])
    assert first.token_logps.dtype == np.float32
    first.token_logps[:] = 0
    assert again.token_logps.tolist() == index.fetch([key(3)])[0].token_logps.tolist() == expected([3])[0]


def test_contains_answers_key_by_key(folder: LocalFolder) -> None:
    index = ScoreIndex(folder, "scores")
    index.publish(make_scores([2, 4]))
    assert index.contains([key(number) for number in (1, 2, 3, 4, 5, 2)]).tolist() == [
        False,
        True,
        False,
        True,
        False,
        True,
    ]
    assert index.contains([]).tolist() == []


def test_an_empty_index_contains_nothing(folder: LocalFolder) -> None:
    index = ScoreIndex(folder, "scores")
    assert len(index) == 0
    assert index.contains([key(1), key(2)]).tolist() == [False, False]
    assert index.contains([]).tolist() == []
    assert index.fetch([]) == []


def test_keys_with_zero_bytes_at_their_ends_are_told_apart(folder: LocalFolder) -> None:
    keys = [
        bytes(16),
        b"\1" + bytes(15),
        b"\1\0\1" + bytes(13),
        bytes(15) + b"\1",
        b"\xff" * 15 + b"\0",
        b"\xff" * 16,
    ]
    index = ScoreIndex(folder, "scores")
    index.publish([(name, score(-place)) for place, name in enumerate(keys)])
    for reader in (index, ScoreIndex(folder, "scores")):
        assert len(reader) == 6
        assert [found.logps for found in reader.fetch(keys)] == [0, -1, -2, -3, -4, -5]
        assert not reader.contains([bytes(14) + b"\1\0", b"\1\1" + bytes(14)]).any()


def test_a_missing_key_is_named_with_what_to_run(folder: LocalFolder) -> None:
    index = ScoreIndex(folder, "scores")
    index.publish(make_scores([1]))
    with pytest.raises(NotInCacheError) as caught:
        index.fetch([key(1), key(255), key(2)])
    assert str(caught.value) == (
        f"{folder}/scores: 2 of 3 completions are not scored, the first is "
        "000000000000000000000000000000ff.\n"
        "Run the `dpo-cache precompute` that made this cache again."
    )


def test_one_key_may_stand_in_two_shards(folder: LocalFolder) -> None:
    index = ScoreIndex(folder, "scores")
    index.publish(make_scores([1, 2]))
    index.publish(make_scores([2, 3]))
    assert len(folder.names("scores")) == 2
    for reader in (index, ScoreIndex(folder, "scores")):
        assert len(reader) == 3
        assert values_of(reader.fetch([key(3), key(2), key(1)])) == expected([3, 2, 1])


def test_publishing_the_same_scores_twice_leaves_one_file(folder: LocalFolder) -> None:
    index, other = ScoreIndex(folder, "scores"), ScoreIndex(folder, "scores")
    written = [writer.publish(make_scores([1, 2])) for writer in (index, index, other)]
    (name,) = folder.names("scores")
    assert written == [(folder.root / "scores" / name).stat().st_size] * 3
    assert len(index) == len(other) == 2


def test_refresh_sees_the_shards_of_another_writer(folder: LocalFolder) -> None:
    reader, writer = ScoreIndex(folder, "scores"), ScoreIndex(folder, "scores")
    writer.publish(make_scores([1, 2]))
    assert not reader.contains([key(1)]).any()
    reader.refresh()
    assert reader.contains([key(1), key(2)]).all()
    reader.refresh()
    assert values_of(reader.fetch([key(2)])) == expected([2])


def test_refresh_reads_the_new_shards_alone(folder: LocalFolder) -> None:
    index = ScoreIndex(folder, "scores")
    index.publish(make_scores([1]))
    (known,) = folder.names("scores")
    ScoreIndex(folder, "scores").publish(make_scores([2]))
    (folder.root / "scores" / known).write_bytes(b"no longer Parquet")
    index.refresh()
    assert values_of(index.fetch([key(2)])) == expected([2])


def test_files_that_are_no_shards_are_passed_over(folder: LocalFolder) -> None:
    ScoreIndex(folder, "scores").publish(make_scores([1]))
    folder.publish("scores/.half.parquet", b"half")
    folder.publish("scores/notes.txt", b"notes")
    assert len(ScoreIndex(folder, "scores")) == 1


def test_a_shard_that_was_deleted_under_the_index_is_a_storage_error(folder: LocalFolder) -> None:
    index = ScoreIndex(folder, "scores")
    index.publish(make_scores([1]))
    (name,) = folder.names("scores")
    (folder.root / "scores" / name).unlink()
    with pytest.raises(
        StorageError, match=f"^cannot read {re.escape(str(folder))}/scores/{name}: No such file or directory"
    ):
        index.fetch([key(1)])


def test_two_writers_in_turn_lose_nothing(folder: LocalFolder) -> None:
    writers = ScoreIndex(folder, "scores"), ScoreIndex(folder, "scores")
    for turn in range(6):
        writers[turn % 2].publish(make_scores(range(2 * turn, 2 * turn + 3)))
    for writer in writers:
        writer.refresh()
        assert len(writer) == 13
        assert values_of(writer.fetch([key(number) for number in range(13)])) == expected(list(range(13)))


def window_numbers(window: int, writer: int) -> range:
    first = (window * NUM_WRITERS + writer * 7) % 50
    return range(first, first + 10)


def score_what_is_missing(location: str, writer: int, start) -> None:
    """One of several processes: publishes 15 overlapping windows, each less what it saw stored already."""
    index = ScoreIndex(LocalFolder(Path(location)), "scores")
    start.wait()
    for window in range(15):
        numbers = window_numbers(window, writer)
        index.refresh()
        missing = [
            number
            for number, there in zip(
                numbers, index.contains([key(number) for number in numbers]), strict=True
            )
            if not there
        ]
        if missing:
            index.publish(make_scores(missing))


def test_processes_that_write_at_once_lose_nothing(folder: LocalFolder) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(NUM_WRITERS)
    writers = [
        context.Process(target=score_what_is_missing, args=(str(folder), writer, start))
        for writer in range(NUM_WRITERS)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * NUM_WRITERS
    index = ScoreIndex(folder, "scores")
    everything = sorted(
        {
            number
            for window in range(15)
            for writer in range(NUM_WRITERS)
            for number in window_numbers(window, writer)
        }
    )
    assert len(index) == len(everything)
    assert values_of(index.fetch([key(number) for number in everything])) == expected(everything)
    assert all(not name.startswith(".") for name in os.listdir(folder.root / "scores"))
