import math
import random
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cache.errors import CacheError, CorruptShardError, DpoCacheError, NotInCacheError
from dpo_cache.store import ScoreIndex
from dpo_cache.store.folders.folder import LocalFolder
from dpo_cache.store.format.keys import key_bytes
from dpo_cache.store.format.page_limits import Footer
from dpo_cache.store.format.parquet import ParquetReader, name_by_content, write_parquet
from dpo_cache.store.format.shards import (
    KEY,
    SHARD_SCHEMA,
    are_only_sums,
    check_bounds,
    encode_shard,
    group_bounds,
    keys_of,
)
from dpo_cache.types import HIGHEST_LOGP, LOWEST_LOGP, Score, are_logps
from tests.store.caches import decode_shard, read_shard_bytes
from tests.store.conftest import flip, key, make_scores, score

float32s = st.floats(LOWEST_LOGP, HIGHEST_LOGP, width=32)
scores = st.lists(float32s, min_size=1, max_size=9).map(lambda values: score(*values))
shards = st.dictionaries(st.binary(min_size=16, max_size=16), scores, min_size=1, max_size=8).map(
    lambda by_key: list(by_key.items())
)


@given(shards)
@settings(deadline=None)
def test_what_is_written_is_read_back_exactly(shard: list[tuple[bytes, Score]]) -> None:
    keys, found = decode_shard(encode_shard(shard))
    assert keys.dtype == "S16"
    assert [bytes(value).ljust(16, b"\0") for value in keys] == [name for name, _ in shard]
    for read, (_, written) in zip(found, shard, strict=True):
        assert read.token_logps.dtype == np.float32
        assert read.token_logps.tobytes() == written.token_logps.tobytes()
        assert read.logps == written.logps


@given(shards)
@settings(deadline=None, max_examples=30)
def test_the_stored_sum_is_the_sum_of_the_token_logps(shard: list[tuple[bytes, Score]]) -> None:
    table = read_shard_bytes(encode_shard(shard))
    for logps, num_tokens, token_logps in zip(
        *(table.column(name).to_pylist() for name in ("logps", "num_tokens", "token_logps")), strict=True
    ):
        assert math.isclose(
            logps, math.fsum(token_logps), rel_tol=1e-12, abs_tol=1e-12 * math.fsum(map(abs, token_logps))
        )
        assert num_tokens == len(token_logps)


def test_the_same_scores_make_the_same_file() -> None:
    assert encode_shard(make_scores(range(20))) == encode_shard(make_scores(range(20)))


@pytest.mark.parametrize(
    "values", [[], [float("nan")], [-1.0, float("-inf")], [float("inf"), -1.0], [-3e38], [-1.0, 2.0]]
)
def test_a_score_that_is_empty_or_no_log_prob_is_not_written(
    folder: LocalFolder, values: list[float]
) -> None:
    index = ScoreIndex(folder, "scores")
    with pytest.raises(
        ValueError, match=f"^completion {key(7).hex()}: token log-probs are empty or not log-probs$"
    ):
        index.publish([*make_scores(range(3)), (key(7), score(*values))])
    assert folder.names("scores") == []
    assert len(index) == 0


@pytest.mark.parametrize(
    ("values", "num_tokens", "expected"),
    [
        ([0.0, -0.5, 1e-3, -1e6], 1, True), ([-1.1e6], 1, False), ([1.1], 1, False), ([math.nan], 1, False), ([-math.inf], 1, False),
        ([-1e308], 4, False), ([-1e308], np.array([2**31]), False), ([-3e6, -1.0], np.array([3, 1]), True), ([-3.1e6, -1.0], np.array([3, 1]), False),
    ],
)  # fmt: skip
def test_log_probs_have_bounds(values: list[float], num_tokens: object, expected: bool) -> None:
    assert are_logps(np.array(values), num_tokens) is expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("logps", "expected"), [(-40.0, True), (-1e308, False), (3.0, False), (math.nan, False)]
)
def test_imported_sums_have_bounds(logps: float, expected: bool) -> None:
    lists = pa.array([[]], pa.list_(pa.float32()))
    assert are_only_sums(lists, pa.array([2], pa.uint32()), pa.array([logps])) is expected


def shard_of(num_tokens: int, logps: float, token_logps: list[float]) -> bytes:
    return write_parquet(
        pa.table([[key(1)], [num_tokens], [logps], [token_logps]], schema=SHARD_SCHEMA), row_group_size=1
    )


def test_a_shard_built_by_hand_is_read() -> None:
    _, (found,) = decode_shard(shard_of(2, -3.5, [-1.5, -2.0]))
    assert found.token_logps.tolist() == [-1.5, -2.0]


@pytest.mark.parametrize(
    "content",
    [
        shard_of(3, -3.5, [-1.5, -2.0]),
        shard_of(2, -3.25, [-1.5, -2.0]),
        shard_of(1, float("nan"), [float("nan")]),
    ],
    ids=["count", "sum", "nan"],
)
def test_columns_that_disagree_are_refused(content: bytes) -> None:
    with pytest.raises(CorruptShardError, match="^there: num_tokens or logps disagree with token_logps"):
        decode_shard(content)


@pytest.mark.parametrize(
    "content",
    [shard_of(2, float("-inf"), [-1.5, float("-inf")]), shard_of(0, 0.0, [])],
    ids=["infinite", "empty"],
)
def test_scores_that_would_not_be_written_are_refused_when_read(content: bytes) -> None:
    with pytest.raises(CorruptShardError):
        decode_shard(content)


def with_double_tokens(table: pa.Table) -> pa.Table:
    return table.set_column(3, "token_logps", table.column("token_logps").cast(pa.list_(pa.float64())))


def with_another_key_width(table: pa.Table) -> pa.Table:
    return table.set_column(
        0, pa.field("key", pa.binary(), nullable=False), table.column("key").cast(pa.binary())
    )


def with_a_nullable_column(table: pa.Table) -> pa.Table:
    return table.set_column(2, pa.field("logps", pa.float64(), nullable=True), table.column("logps"))


def with_a_null(table: pa.Table) -> pa.Table:
    return table.set_column(2, "logps", pa.array([None] * len(table), pa.float64()))


def with_a_uuid_key(table: pa.Table) -> pa.Table:
    keys = pa.ExtensionArray.from_storage(pa.uuid(), table.column("key").combine_chunks())
    return table.set_column(0, pa.field("key", pa.uuid(), nullable=False), keys)


WRONG_COLUMNS: dict[str, Callable[[pa.Table], pa.Table]] = {
    "wrong value type": with_double_tokens,
    "wrong key type": with_another_key_width,
    "extra column": lambda table: table.append_column("extra", pa.array(range(len(table)))),
    "missing column": lambda table: table.drop_columns("num_tokens"),
    "renamed column": lambda table: table.rename_columns(["key", "num_tokens", "logp", "token_logps"]),
    "other order": lambda table: table.select(["num_tokens", "key", "logps", "token_logps"]),
    "nullable column": with_a_nullable_column,
    "null": with_a_null,
    "extension type": with_a_uuid_key,
}


def rewrite(change: Callable[[pa.Table], pa.Table]) -> bytes:
    table = change(read_shard_bytes(encode_shard(make_scores(range(5)))))
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, use_dictionary=False, compression="none", write_page_checksum=True, row_group_size=2
    )
    return sink.getvalue().to_pybytes()


def test_the_same_columns_written_by_someone_else_are_read() -> None:
    keys, found = decode_shard(rewrite(lambda table: table))
    assert len(keys) == len(found) == 5


@pytest.mark.parametrize("change", WRONG_COLUMNS.values(), ids=WRONG_COLUMNS)
def test_other_columns_are_refused(folder: LocalFolder, change: Callable[[pa.Table], pa.Table]) -> None:
    content = rewrite(change)
    name = name_by_content(content)
    folder.publish(f"scores/{name}", content)
    with pytest.raises(CorruptShardError, match="^there: expected the columns\nkey: fixed_size_binary"):
        decode_shard(content)
    with pytest.raises(CorruptShardError, match=f"{name}: expected the columns"):
        ScoreIndex(folder, "scores").fetch([key(0)])


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"not Parquet at all", b"PAR1" * 5], ids=["empty", "magic", "text", "magics"]
)
def test_what_is_no_parquet_file_is_refused(content: bytes) -> None:
    with pytest.raises(CorruptShardError, match=r"^there: not readable as Parquet \("):
        decode_shard(content)


SMALL_SHARD = encode_shard(make_scores([3, 11, 4]))
SMALL_KEYS = [key(number) for number in (3, 11, 4)]


def test_every_byte_flipped_under_an_open_index_is_found(folder: LocalFolder) -> None:
    index = ScoreIndex(folder, "scores")
    index.publish(make_scores([3, 11, 4]))
    (name,) = folder.names("scores")
    for position in range(len(SMALL_SHARD)):
        (folder.root / "scores" / name).write_bytes(flip(SMALL_SHARD, position))
        with pytest.raises(CorruptShardError, match=f"{name}: its bytes hash to "):
            index.fetch(SMALL_KEYS)


def test_every_truncation_is_found(folder: LocalFolder) -> None:
    name = name_by_content(SMALL_SHARD)
    folder.publish(f"scores/{name}", SMALL_SHARD)
    for length in range(0, len(SMALL_SHARD), 7):
        (folder.root / "scores" / name).write_bytes(SMALL_SHARD[:length])
        with pytest.raises(CorruptShardError, match=name):
            ScoreIndex(folder, "scores").fetch(SMALL_KEYS)


def error_of_reading(folder: LocalFolder, content: bytes) -> type[DpoCacheError] | None:
    """What a reader that opens the cache now meets when it fetches the small shard's scores."""
    (folder.root / "scores" / name_by_content(SMALL_SHARD)).write_bytes(content)
    try:
        ScoreIndex(folder, "scores").fetch(SMALL_KEYS)
    except DpoCacheError as error:
        return type(error)
    return None


@pytest.fixture(scope="module")
def errors_by_flip(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[int, int], type[DpoCacheError] | None]:
    """The error that each flip meets: the first and last 64 bytes with three masks, 300 positions between
    them with one.
    """
    folder = LocalFolder(tmp_path_factory.mktemp("flipped"))
    folder.publish(f"scores/{name_by_content(SMALL_SHARD)}", SMALL_SHARD)
    assert error_of_reading(folder, SMALL_SHARD) is None
    ends = [*range(64), *range(len(SMALL_SHARD) - 64, len(SMALL_SHARD))]
    middle = random.Random(0).sample(range(64, len(SMALL_SHARD) - 64), 300)
    flips = [(position, mask) for position in ends for mask in (0x01, 0x20, 0x80)] + [
        (position, 0x01) for position in middle
    ]
    return {
        (position, mask): error_of_reading(folder, flip(SMALL_SHARD, position, mask))
        for position, mask in flips
    }


def test_no_flipped_byte_goes_unseen(
    errors_by_flip: dict[tuple[int, int], type[DpoCacheError] | None],
) -> None:
    unseen = [
        place for place, error in errors_by_flip.items() if error is None or not issubclass(error, CacheError)
    ]
    assert len(errors_by_flip) == 684
    assert not unseen


def test_every_flipped_byte_is_told_as_damage(
    errors_by_flip: dict[tuple[int, int], type[DpoCacheError] | None],
) -> None:
    taken_as_missing = [place for place, error in errors_by_flip.items() if error is NotInCacheError]
    assert not taken_as_missing


def test_keys_are_stored_as_sixteen_bytes() -> None:
    assert read_shard_bytes(SMALL_SHARD).column("key").type == KEY


def footer_of(content: bytes) -> Footer:
    return ParquetReader(pa.BufferReader(content), SHARD_SCHEMA, "there").footer


def groups(monkeypatch: pytest.MonkeyPatch, numbers: list[int]) -> bytes:
    """A shard whose row groups hold two completions each."""
    monkeypatch.setattr("dpo_cache.store.format.shards.ROW_GROUP_BYTES", 80)
    return encode_shard([(key(number), score(-1.0)) for number in numbers])


def test_the_footer_has_the_keys_of_row_groups_that_ascend(monkeypatch: pytest.MonkeyPatch) -> None:
    content = groups(monkeypatch, [2, 1, 256, 200, 300])  # in a row group, in any order
    found = group_bounds(footer_of(content))
    assert found is not None and found.shape == (3, 2)
    expected = [key(number) for number in (1, 2, 200, 256, 300, 300)]
    assert key_bytes(found.reshape(-1)) == expected
    reader = ParquetReader(pa.BufferReader(content), SHARD_SCHEMA, "there")
    for table, bounds in zip(reader.read_groups(), found, strict=True):
        check_bounds(keys_of(table.column("key")), bounds, "there")


@pytest.mark.parametrize("numbers", [[1, 5, 3, 7], [1, 3, 3, 7], [5, 7, 1, 3]], ids=repr)
def test_row_groups_that_overlap_or_descend_are_not_listed(
    monkeypatch: pytest.MonkeyPatch, numbers: list[int]
) -> None:
    assert group_bounds(footer_of(groups(monkeypatch, numbers))) is None


def test_a_footer_without_keys_lists_none() -> None:
    table = read_shard_bytes(encode_shard(make_scores(range(3))))
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, compression="zstd", store_schema=False, use_dictionary=False, write_statistics=False
    )
    footer = footer_of(sink.getvalue().to_pybytes())
    assert footer.bounds == [None] and group_bounds(footer) is None


@pytest.mark.parametrize("claimed", [(b"a", b"c"), (b"b", b"d"), (b"b", b"cc"), (b"b" * 17, b"c")], ids=repr)
def test_other_keys_than_the_footer_claims_are_damage(claimed: tuple[bytes, bytes]) -> None:
    keys = np.array([b"c", b"b"], "S16")
    check_bounds(keys, (b"b", b"c"), "there")
    with pytest.raises(CorruptShardError, match="there: its footer claims other keys"):
        check_bounds(keys, claimed, "there")
    with pytest.raises(CorruptShardError, match="there: its footer claims other keys"):
        check_bounds(keys[:0], claimed, "there")
