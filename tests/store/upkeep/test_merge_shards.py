import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cache.errors import CorruptShardError
from dpo_cache.store import ScoreIndex
from dpo_cache.store.folders.folder import LocalFolder
from dpo_cache.store.format import shards
from dpo_cache.store.format.keys import key_array
from dpo_cache.store.format.shards import SHARD_SCHEMA, encode_shard, read_shard
from dpo_cache.store.upkeep import merge_shards as merging
from dpo_cache.store.upkeep.merge_shards import merge_shards, merge_sorted, sort_table, write_sorted_shards
from tests.store.caches import read_shard_bytes
from tests.store.conftest import flip_file, key, make_scores, score


def publish(folder: LocalFolder, *shards: Sequence[int]) -> list[str]:
    index = ScoreIndex(folder, "scores")
    for numbers in shards:
        index.publish(make_scores(numbers))
    return folder.names("scores")


def compact(folder: LocalFolder, names: Sequence[str], place: str = "merged", **options: int) -> list[str]:
    return list(
        write_sorted_shards(
            folder, place, merge_shards(folder, [f"scores/{name}" for name in names]), **options
        )
    )


def keys_in(folder: LocalFolder, names: Sequence[str], place: str = "merged") -> list[bytes]:
    return [
        value
        for name in names
        for table in read_shard(folder, f"{place}/{name}")
        for value in table.column("key").to_pylist()
    ]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups of a few rows, runs of some twenty."""
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 150)
    monkeypatch.setattr(merging, "RUN_BYTES", 1000)


def test_merged_shards_hold_every_completion_once_in_key_order(folder: LocalFolder, small: None) -> None:
    shuffled = np.random.default_rng(0).permutation(200).tolist()
    names = publish(folder, *(shuffled[start : start + 23] for start in range(0, 200, 23)), range(40, 60))
    merged = compact(folder, names, shard_bytes=2000)
    assert len(merged) > 3
    assert keys_in(folder, merged) == [key(number) for number in range(200)]
    index = ScoreIndex(folder, "merged")
    wanted = make_scores(range(200))
    found = index.fetch([name for name, _ in wanted])
    assert [values.token_logps.tolist() for values in found] == [
        values.token_logps.tolist() for _, values in wanted
    ]


def test_what_is_compact_compacts_to_itself(folder: LocalFolder, small: None) -> None:
    names = publish(folder, range(90, 30, -1), range(50))
    merged = compact(folder, names, shard_bytes=900)
    again = list(
        write_sorted_shards(
            folder,
            "merged",
            merge_shards(folder, [f"merged/{name}" for name in merged[::-1]]),
            shard_bytes=900,
        )
    )
    assert again == merged
    assert folder.names("merged") == sorted(merged)


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
        patch.setattr(merging, "RUN_BYTES", 300)
        merged = compact(one, publish(one, *numbers), shard_bytes=shard_bytes)
        assert merged == compact(other, publish(other, everything[::-1]), shard_bytes=shard_bytes)
    assert keys_in(one, merged) == [key(number) for number in everything]


def test_of_a_key_in_several_runs_the_first_is_taken() -> None:
    runs = [
        read_shard_bytes(encode_shard([(key(1), score(-1.0)), (key(3), score(-value))]))
        for value in (1.0, 2.0)
    ]
    (merged,) = merge_sorted([iter([run]) for run in runs])
    assert merged.column("logps").to_pylist() == [-1.0, -1.0]
    (merged,) = merge_sorted([iter([run]) for run in runs[::-1]])
    assert merged.column("logps").to_pylist() == [-1.0, -2.0]


def test_nothing_merges_to_nothing(folder: LocalFolder) -> None:
    assert compact(folder, []) == []
    assert list(merge_sorted([iter([SHARD_SCHEMA.empty_table()])])) == []


def test_keys_that_share_their_first_half_are_sorted_by_the_second() -> None:
    keys = [bytes(8) + number.to_bytes(8, "big") for number in (5, 2**63, 0, 5)]
    table = read_shard_bytes(encode_shard([(name, score(-1.0)) for name in keys]))
    assert sort_table(table).column("key").to_pylist() == sorted(set(keys))
    assert key_array(sorted(keys)).tolist() == sorted(key_array(keys).tolist())


def test_a_damaged_shard_is_not_merged(folder: LocalFolder) -> None:
    names = publish(folder, range(9), range(5, 30))
    path = folder.root / "scores" / names[1]
    flip_file(path, path.stat().st_size // 2)
    with pytest.raises(CorruptShardError, match=names[1]):
        compact(folder, names)


def test_the_temporary_folder_is_left_empty(
    folder: LocalFolder, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    names = publish(folder, range(100))
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    tables = merge_shards(folder, [f"scores/{name}" for name in names])
    next(tables)
    assert len(list(scratch.iterdir())) == 1
    tables.close()
    assert list(scratch.iterdir()) == []
