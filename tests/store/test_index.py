import multiprocessing
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dpo_cache.errors import CorruptShardError, NotInCacheError, StorageError
from dpo_cache.store import Cache, ScoreIndex
from dpo_cache.store.folders.folder import LocalFolder, open_folder
from dpo_cache.store.format import shards
from dpo_cache.store.format.keys import key_bytes
from dpo_cache.store.format.parquet import ParquetReader
from dpo_cache.store.format.shards import SHARD_SCHEMA, read_keys
from dpo_cache.store.upkeep import compact as compact_module
from dpo_cache.store.upkeep.compact import compact_reference
from dpo_cache.store.upkeep.contents import shard_files
from dpo_cache.store.upkeep.merge import merge_caches
from dpo_cache.store.upkeep.merge_shards import write_sorted_shards
from dpo_cache.store.upkeep.verify import verify_cache
from dpo_cache.types import Score
from tests.programs import START_METHOD
from tests.store.caches import add_scores, key_of, lie_about_keys, make_cache, value
from tests.store.conftest import flip_file, key, make_scores, score

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
    context = multiprocessing.get_context(START_METHOD)
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


# -- compacted shards: their keys are read when they are looked up ------------------------------------------


@pytest.fixture
def compacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """A cache of one reference whose completions 0 to 59 are in several shards of several row groups."""
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 200)
    cache = make_cache(tmp_path / "cache", shards=[range(start, start + 20) for start in range(0, 60, 20)])
    compact_in_parts(cache, 1000)
    return cache


def compact_in_parts(cache: Cache, shard_bytes: int) -> None:
    (reference,) = cache.references()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            compact_module,
            "write_sorted_shards",
            lambda *given: write_sorted_shards(*given, shard_bytes=shard_bytes),
        )
        compact_reference(cache, reference)


def scores_of(cache: Cache) -> ScoreIndex:
    return cache.scores(cache.references()[0])


def check_all(index: ScoreIndex, numbers: Sequence[int]) -> None:
    """The index has these completions and no others of the first hundred."""
    found = index.contains([key_of(number) for number in range(100)])
    assert np.flatnonzero(found).tolist() == sorted(numbers)
    fetched = index.fetch([key_of(number) for number in numbers])
    assert values_of(fetched) == [value(number).token_logps.tolist() for number in numbers]
    assert len(index) == len({*numbers})


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Row groups that are read from now on: place and number."""
    reads: list[tuple[str, int]] = []
    real = ParquetReader.read_group

    def read(reader: ParquetReader, group: int, columns: Sequence[str] | None = None) -> object:
        reads.append((reader.place, group))
        return real(reader, group, columns)

    monkeypatch.setattr(ParquetReader, "read_group", read)
    return reads


def test_opening_compacted_shards_reads_no_keys_and_finds_all(
    compacted: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = count_reads(monkeypatch)
    index = scores_of(compacted)
    single = {place for place, _ in reads}  # a last shard of one row group
    assert len(single) <= 1
    check_all(index, range(60))
    del reads[:]
    assert index.contains([key_of(7)]).all() and reads == [], "keys that were read are kept"


def test_a_look_up_reads_only_the_row_groups_of_its_keys(
    compacted: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, reads = scores_of(compacted), count_reads(monkeypatch)
    assert index.contains([key_of(7), key_of(9)]).all()
    assert len(reads) <= 2
    del reads[:]
    assert index.contains([key_of(7), key_of(9)]).all() and reads == []


def test_shards_that_are_not_compacted_are_found_next_to_those_that_are(compacted: Cache) -> None:
    index = scores_of(compacted)
    add_scores(compacted, compacted.references()[0], range(55, 70))  # some are there already
    index.refresh()
    index.publish([(key_of(number), value(number)) for number in range(70, 80)])
    for reader in (index, scores_of(compacted)):
        check_all(reader, range(80))


def test_caches_that_were_compacted_and_then_merged_have_overlapping_shards(
    compacted: Cache, tmp_path: Path
) -> None:
    other = make_cache(tmp_path / "other", shards=[range(40, 65), range(65, 90)])
    compact_in_parts(other, 700)
    merge_caches([other], compacted.folder.root)  # type: ignore[union-attr]
    check_all(scores_of(compacted), range(90))


def test_shards_compacted_again_since_the_index_was_opened_are_found(compacted: Cache) -> None:
    index = scores_of(compacted)
    add_scores(compacted, compacted.references()[0], range(60, 70))
    compact_in_parts(compacted, 10**9)
    check_all(index, range(70))


def several_groups(cache: Cache) -> tuple[str, int]:
    """A shard of several row groups, and the position of the last byte of its first keys."""
    for file in shard_files(cache.folder, cache.references()[0]):
        footer = ParquetReader(pa.BufferReader(cache.folder.read(file)), SHARD_SCHEMA, file).footer
        if len(footer.chunks) > 1:
            chunk = footer.chunks[0][0]
            return file, chunk.start + chunk.packed_bytes - 1
    raise AssertionError("no shard has several row groups")


def test_keys_that_turn_out_damaged_are_left_out_with_a_remark(
    compacted: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    file, position = several_groups(compacted)
    flip_file(Path(str(compacted.folder), file), position)
    index = scores_of(compacted)
    held = {
        key
        for other in shard_files(compacted.folder, compacted.references()[0])
        if other != file
        for group in read_keys(compacted.folder, other)
        for key in key_bytes(group)
    }
    everything = [key_of(number) for number in range(60)]
    found = index.contains(everything)
    assert found.tolist() == [key in held for key in everything] and not found.all()
    assert "a score shard is left out" in caplog.text and file in caplog.text
    index.fetch([key for key in everything if key in held])
    with pytest.raises(CorruptShardError, match=file):
        index.fetch(everything)
    index.publish([(key_of(number), value(number)) for number in range(60)])  # scored again
    check_all(index, range(60))


def test_a_shard_whose_footer_claims_other_keys_is_left_out(
    compacted: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    file = lie_about_keys(compacted, several_groups(compacted)[0])
    index = scores_of(compacted)
    assert not index.contains([key_of(number) for number in range(60)]).all()
    assert file in caplog.text and "its footer claims other keys than its row groups have" in caplog.text
    report = verify_cache(compacted.folder.root)  # type: ignore[union-attr]
    assert [(problem.file, problem.kind) for problem in report.problems] == [(file, "damaged")]
