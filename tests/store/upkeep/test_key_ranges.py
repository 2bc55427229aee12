"""Rows in the order of their keys: all of them, each once, whatever files they are in."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cache.errors import CorruptShardError
from dpo_cache.store import Cache, open_cache
from dpo_cache.store.format import shards
from dpo_cache.store.format.shards import keys_of
from dpo_cache.store.upkeep import key_ranges
from dpo_cache.store.upkeep.contents import shard_files
from dpo_cache.store.upkeep.key_ranges import find_overlap, key_starts, rows_by_key
from dpo_cache.store.upkeep.merge_shards import merge_shards, write_sorted_shards
from dpo_cache.store.upkeep.row_files import ROW_SCHEMA, Source, bytes_of
from tests.store.caches import add_pairs, add_reference, add_scores, key_of, lie_about_keys, value

Row = tuple[bytes, int, list[float]]  # key, source, token log-probs


def make_small(patch: pytest.MonkeyPatch, range_bytes: int = 2000) -> None:
    """Blocks and row groups of a few rows, ranges of some twenty."""
    patch.setattr(shards, "ROW_GROUP_BYTES", 200)
    patch.setattr(key_ranges, "BLOCK_BYTES", 200)
    patch.setattr(key_ranges, "RUN_BYTES", 2000)
    patch.setattr(key_ranges, "RANGE_BYTES", range_bytes)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


def sources_of(cache: Cache) -> list[Source]:
    """The shards and parts, in the order of their names."""
    files = [file for file in cache.folder.files() if file.endswith(".parquet")]
    return [(cache.folder, file) for file in sorted(files, reverse=True)]  # shards first


def compacted(cache: Cache, shard_bytes: int) -> list[Source]:
    """The reference's shards as `compact` makes them; the others are removed."""
    (reference,) = cache.references()
    old = list(shard_files(cache.folder, reference))
    place = f"references/{reference}/scores"
    tables = merge_shards(cache.folder, old)
    new = [
        f"{place}/{name}"
        for name in write_sorted_shards(cache.folder, place, tables, shard_bytes=shard_bytes)
    ]
    for name in {*old} - {*new}:
        cache.folder.remove(name)
    return [(cache.folder, name) for name in new]


def read_rows(sources: Sequence[Source], **options: int) -> list[Row]:
    """All rows, in the order in which they come."""
    rows: list[Row] = []
    before = b""
    for table in rows_by_key(sources, **options):
        assert table.schema == ROW_SCHEMA and len(table)
        keys = table.column("key").to_pylist()
        assert before < keys[0], "rows of one key are in one table"
        before = keys[-1]
        rows += zip(
            keys, table.column("source").to_pylist(), table.column("token_logps").to_pylist(), strict=True
        )
    return rows


def expected_rows(numbers: Sequence[Sequence[int]]) -> list[Row]:
    """The rows of files that hold these completions."""
    return sorted(
        (key_of(number), source, value(number).token_logps.tolist())
        for source, of_file in enumerate(numbers)
        for number in of_file
    )


@given(
    st.lists(st.lists(st.integers(0, 80), unique=True, min_size=1, max_size=40), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 80), st.integers(0, 80)), max_size=20),
    st.integers(300, 6000),
)
@settings(max_examples=40, deadline=None)
def test_every_row_comes_once_by_key_and_then_by_source(
    tmp_path_factory: pytest.TempPathFactory,
    numbers: list[list[int]],
    pairs: list[tuple[int, int]],
    range_bytes: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch, range_bytes)
        cache = open_cache(tmp_path_factory.mktemp("cache"), create=True)
        reference, files = add_reference(cache), dict[str, list[int]]()
        for of_shard in numbers:
            add_scores(cache, reference, of_shard)
            (new,) = shard_files(cache.folder, reference).keys() - files.keys() or [None]
            if new:  # the same completions make the same file
                files[new] = of_shard
        if pairs:
            add_pairs(cache, reference, pairs)
            (part,) = [file for _, file in sources_of(cache) if file.startswith("pairs/")]
            files[part] = [number for pair in pairs for number in pair]
        sources = [(cache.folder, file) for file in files]
        assert sorted(read_rows(sources)) == read_rows(sources) == expected_rows([*files.values()])
        only_keys = [(key, source, []) for key, source, _ in expected_rows([*files.values()])]
        assert read_rows(sources, only_keys=len(sources)) == only_keys


def test_only_the_keys_are_read_of_the_first_files(cache: Cache, small: None) -> None:
    sources = sources_of(cache)
    for row, (_, source, token_logps) in zip(
        read_rows(sources), read_rows(sources, only_keys=3), strict=True
    ):
        assert token_logps == ([] if source < 3 else row[2])


@pytest.mark.parametrize("is_compact", [False, True])
def test_no_table_is_much_larger_than_a_range(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, is_compact: bool
) -> None:
    (reference,) = cache.references()
    for start in range(40, 400, 30):
        add_scores(cache, reference, range(start, start + 30))
    make_small(monkeypatch)
    sources = compacted(cache, 3000) if is_compact else sources_of(cache)
    sizes = [bytes_of(table) for table in rows_by_key(sources)]
    assert len(sizes) > 10 and max(sizes) <= 2 * key_ranges.RANGE_BYTES


def test_compacted_shards_are_read_in_place(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, small: None
) -> None:
    """Each row group once, and the few that hold two ranges twice; others are written to the temporary
    file.
    """
    (reference,) = cache.references()
    add_scores(cache, reference, range(40, 200))
    sources = compacted(cache, 3000)
    add_scores(cache, reference, range(200, 210))
    (added,) = {*sources_of(cache)} - {*sources, sources_of(cache)[-1]}
    calls: list[str] = []
    for name in ("read_tables", "read_group"):
        real = getattr(key_ranges.RowFiles, name)

        def count(files: object, number: int, *given: int, name: str = name, real=real) -> object:
            calls.append(f"{name} {number}")
            return real(files, number, *given)

        monkeypatch.setattr(key_ranges.RowFiles, name, count)
    rows = read_rows([*sources, added])
    assert [row[0] for row in rows] == sorted(key_of(number) for number in range(210))
    assert calls.count(f"read_tables {len(sources)}") == 1 == sum("tables" in call for call in calls)
    num_groups = sum(len(list(shards.read_shard(cache.folder, file))) for _, file in sources)
    assert num_groups <= sum("group" in call for call in calls) <= 2 * num_groups


def test_a_shard_whose_footer_claims_other_keys_is_refused(cache: Cache, small: None) -> None:
    (reference,) = cache.references()
    add_scores(cache, reference, range(40, 100))
    sources = compacted(cache, 10**9)
    file = lie_about_keys(cache, sources[0][1])
    with pytest.raises(CorruptShardError, match="its footer claims other keys than its row groups have"):
        read_rows([(cache.folder, file)])


def test_files_that_share_completions_are_found_with_their_owners(cache: Cache, small: None) -> None:
    (reference,) = cache.references()
    sources = [source for source in sources_of(cache) if source[1].startswith("references")]
    found = find_overlap(sources)
    assert (found.files, found.num_rows, found.num_keys) == ([], 40, 40)
    add_scores(cache, reference, [12, 100, 101])
    (added,) = {*sources_of(cache)} - {*sources, sources_of(cache)[-1]}
    holder = next(
        place
        for place, (folder, file) in enumerate(sources)
        if key_of(12)
        in {key for table in shards.read_shard(folder, file) for key in table["key"].to_pylist()}
    )
    found = find_overlap([*sources, added])
    assert (found.files, found.num_rows, found.num_keys) == ([holder, len(sources)], 43, 42)
    assert find_overlap([*sources, added], [0] * 9).files == []
    assert find_overlap([*sources, added], [0] * 8 + [1]).files == [holder, len(sources)]


def test_the_first_rows_of_keys() -> None:
    keys = np.array([b"a", b"a", b"b", b"c", b"c", b"c"], "S16")
    is_first, first = key_starts(keys)
    assert is_first.tolist() == [True, False, True, True, False, False]
    assert first.tolist() == [0, 0, 2, 3, 3, 3]
    assert [len(found) for found in key_starts(keys[:0])] == [0, 0]


def test_ranges_follow_the_keys_where_these_are_not_spread_evenly(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All keys begin with the same two bytes."""
    make_small(monkeypatch)
    generator = np.random.default_rng(0)
    keys = sorted(b"\7\7" + generator.bytes(14) for _ in range(300))
    (reference,) = cache.references()
    for start in range(20):
        cache.scores(reference).publish([(key, value(3)) for key in keys[start::20]])
    sources = [(cache.folder, file) for file in shard_files(cache.folder, reference)]
    tables = list(rows_by_key(sources))
    assert max(map(bytes_of, tables)) <= 2 * key_ranges.RANGE_BYTES
    found = np.concatenate([keys_of(table.column("key")) for table in tables])
    assert all(one < other for one, other in pairwise(found.tolist())) and len(found) == 340
