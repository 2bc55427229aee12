"""Rows of score shards and parts under one schema."""

from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pytest

from dpo_cache.errors import CorruptShardError
from dpo_cache.store import Cache
from dpo_cache.store.upkeep.contents import shard_files
from dpo_cache.store.upkeep.row_files import ROW_SCHEMA, RowFiles, bytes_of
from tests.store.caches import completion, key_of, make_cache, value
from tests.store.conftest import flip_file

Row = dict[str, object]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """A shard of completions 0 to 4, and pairs of them."""
    return make_cache(tmp_path / "cache", shards=(range(5),), pairs=[(0, 1), (4, 1)])


def files_of(cache: Cache) -> list[str]:
    """The shard, and the part."""
    (part,) = [file for file in cache.folder.files("pairs") if file.endswith(".parquet")]
    return [*shard_files(cache.folder, cache.references()[0]), part]


def read(cache: Cache, number: int, **options: int) -> list[Row]:
    sources = [(cache.folder, file) for file in files_of(cache)]
    options = {"only_keys": 0, "is_hashed": False, **options}
    with closing(RowFiles(sources, options.pop("only_keys"), **options)) as files:  # type: ignore[arg-type]
        tables = list(files.read_tables(number))
    assert all(table.schema == ROW_SCHEMA for table in tables)
    return pa.concat_tables(tables).to_pylist()


def row(number: int, source: int, *, has_values: bool = True) -> Row:
    logps = value(number)
    return {
        "key": key_of(number),
        "num_tokens": completion(number).num_tokens if has_values else 0,
        "logps": logps.logps if has_values else 0.0,
        "token_logps": logps.token_logps.tolist() if has_values else [],
        "source": source,
    }


def by_key(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda found: bytes(found["key"]))  # type: ignore[call-overload]


@pytest.mark.parametrize("is_hashed", [False, True])
def test_a_part_has_a_row_for_each_side_of_a_pair(cache: Cache, is_hashed: bool) -> None:
    assert read(cache, 0, is_hashed=is_hashed) == [row(number, 0) for number in range(5)]
    expected = [row(number, 1) for number in (0, 1, 4, 1)]
    assert by_key(read(cache, 1, is_hashed=is_hashed)) == by_key(expected)


def test_of_the_first_files_only_the_keys_are_read(cache: Cache) -> None:
    assert read(cache, 0, only_keys=1) == [row(number, 0, has_values=False) for number in range(5)]
    assert by_key(read(cache, 1, only_keys=1)) == by_key([row(number, 1) for number in (0, 1, 4, 1)])


def test_bytes_are_checked_of_the_files_whose_values_are_used(cache: Cache) -> None:
    shard = files_of(cache)[0]
    path = Path(str(cache.folder), shard)
    flip_file(path, path.stat().st_size - 40)  # in the footer: what it leads to has no page checksum
    with pytest.raises(CorruptShardError, match=shard):
        read(cache, 0, is_hashed=True)


def test_row_groups_are_listed_with_their_keys_and_bytes(cache: Cache) -> None:
    sources = [(cache.folder, file) for file in files_of(cache)]
    with closing(RowFiles(sources, 0, is_hashed=False)) as files:
        num_bytes, (group,) = files.list_groups(0)
        keys = sorted(map(key_of, range(5)))
        assert group.bounds.tolist() == [keys[0].rstrip(b"\0"), keys[-1].rstrip(b"\0")]
        assert num_bytes == group.num_bytes == bytes_of(files.read_group(0, 0))
        assert files.list_groups(1) == (cache.folder.size(files_of(cache)[1]), [])
        assert files.read_group(0, 0).to_pylist() == [row(number, 0) for number in range(5)]
