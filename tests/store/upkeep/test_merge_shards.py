import errno
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cache.errors import CorruptShardError, StorageError
from dpo_cache.store import ScoreIndex
from dpo_cache.store.folders.folder import LocalFolder
from dpo_cache.store.format import shards
from dpo_cache.store.format.shards import read_shard
from dpo_cache.store.upkeep import key_ranges
from dpo_cache.store.upkeep.merge_shards import merge_shards, write_sorted_shards
from tests.store.conftest import flip_file, key, make_scores, score

PLACE = f"references/{'0' * 64}/scores"
MERGED = f"references/{'1' * 64}/scores"


def publish(folder: LocalFolder, *shards: Sequence[int]) -> list[str]:
    index = ScoreIndex(folder, PLACE)
    for numbers in shards:
        index.publish(make_scores(numbers))
    return folder.names(PLACE)


def compact(folder: LocalFolder, names: Sequence[str], place: str = PLACE, **options: int) -> list[str]:
    """Merge shards of the place into `MERGED`."""
    tables = merge_shards(folder, [f"{place}/{name}" for name in names])
    return list(write_sorted_shards(folder, MERGED, tables, **options))


def keys_in(folder: LocalFolder, names: Sequence[str]) -> list[bytes]:
    return [
        value
        for name in names
        for table in read_shard(folder, f"{MERGED}/{name}")
        for value in table.column("key").to_pylist()
    ]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups and blocks of a few rows, runs and ranges of some twenty."""
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 150)
    monkeypatch.setattr(key_ranges, "BLOCK_BYTES", 150)
    monkeypatch.setattr(key_ranges, "RUN_BYTES", 2000)
    monkeypatch.setattr(key_ranges, "RANGE_BYTES", 2000)


def test_merged_shards_hold_every_completion_once_in_key_order(folder: LocalFolder, small: None) -> None:
    shuffled = np.random.default_rng(0).permutation(200).tolist()
    names = publish(folder, *(shuffled[start : start + 23] for start in range(0, 200, 23)), range(40, 60))
    merged = compact(folder, names, shard_bytes=2000)
    assert len(merged) > 3
    assert keys_in(folder, merged) == [key(number) for number in range(200)]
    index = ScoreIndex(folder, MERGED)
    wanted = make_scores(range(200))
    found = index.fetch([name for name, _ in wanted])
    assert [values.token_logps.tolist() for values in found] == [
        values.token_logps.tolist() for _, values in wanted
    ]


def test_what_is_compact_compacts_to_itself(folder: LocalFolder, small: None) -> None:
    names = publish(folder, range(90, 30, -1), range(50))
    merged = compact(folder, names, shard_bytes=900)
    again = compact(folder, merged[::-1], MERGED, shard_bytes=900)
    assert again == merged
    assert folder.names(MERGED) == sorted(merged)


@given(
    st.lists(st.lists(st.integers(0, 60), unique=True, min_size=1), min_size=1, max_size=6),
    st.integers(60, 900),
)
@settings(max_examples=40, deadline=None)
def test_how_completions_lie_in_shards_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[list[int]], shard_bytes: int
) -> None:
    one, other = (LocalFolder(tmp_path_factory.mktemp("cache")) for _ in range(2))
    everything = sorted(set().union(*numbers))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "ROW_GROUP_BYTES", 100)
        patch.setattr(key_ranges, "BLOCK_BYTES", 100)
        patch.setattr(key_ranges, "RUN_BYTES", 600)
        patch.setattr(key_ranges, "RANGE_BYTES", 500)
        merged = compact(one, publish(one, *numbers), shard_bytes=shard_bytes)
        assert merged == compact(other, publish(other, everything[::-1]), shard_bytes=shard_bytes)
    assert keys_in(one, merged) == [key(number) for number in everything]


def test_of_a_key_in_several_shards_the_value_of_the_first_is_taken(folder: LocalFolder) -> None:
    index = ScoreIndex(folder, PLACE)
    for value in (1.0, 2.0):
        index.publish([(key(1), score(-value)), (key(3), score(-value))])
    names = [f"{PLACE}/{name}" for name in folder.names(PLACE)]
    for order in (names, names[::-1]):
        (merged,) = merge_shards(folder, order)
        (first,) = read_shard(folder, order[0])
        assert merged.column("logps").to_pylist() == first.column("logps").to_pylist()


def test_nothing_merges_to_nothing(folder: LocalFolder) -> None:
    assert compact(folder, []) == []


def test_keys_that_share_their_first_half_are_sorted_by_the_second(folder: LocalFolder, small: None) -> None:
    keys = [bytes(8) + number.to_bytes(8, "big") for number in (5, 2**63, 0)]
    ScoreIndex(folder, PLACE).publish([(name, score(-1.0)) for name in keys])
    assert keys_in(folder, compact(folder, folder.names(PLACE))) == sorted(keys)


def test_a_damaged_shard_is_not_merged(folder: LocalFolder) -> None:
    names = publish(folder, range(9), range(5, 30))
    path = folder.root / PLACE / names[1]
    flip_file(path, path.stat().st_size // 2)
    with pytest.raises(CorruptShardError, match=names[1]):
        compact(folder, names)


def test_rows_are_taken_from_a_temporary_file_that_has_no_name(
    folder: LocalFolder, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    names = publish(folder, range(100, 0, -1))
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    tables = merge_shards(folder, [f"{PLACE}/{name}" for name in names])
    next(tables)
    assert list(scratch.iterdir()) == []  # a killed process leaves nothing
    tables.close()


def test_a_full_temporary_disk_is_named(
    folder: LocalFolder, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = publish(folder, range(100, 0, -1))

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "write", refuse)
    with pytest.raises(
        StorageError, match=f"^cannot write {re.escape(tempfile.gettempdir())}: No space left"
    ):
        compact(folder, names)
