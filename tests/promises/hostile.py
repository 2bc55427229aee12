"""Parquet files made by hand to harm their reader, and a reader of them with little memory.

`main` reads each and prints a line of JSON a file: its name, the error it met (null where it was read), and the
memory that took.
"""

from __future__ import annotations

import json
import os
import re
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_cache.errors import DpoCacheError
from dpo_cache.store import ScoreIndex
from dpo_cache.store.folders.local import LocalFolder
from dpo_cache.store.format.parquet import name_by_content, write_parquet
from dpo_cache.store.format.shards import SHARD_SCHEMA, encode_shard
from tests.promises.thrift import (
    BINARY,
    I32,
    I64,
    LIST,
    STRUCT,
    Value,
    edit_footer,
    edit_last_page,
    write_varint,
)
from tests.store.caches import read_shard_bytes
from tests.store.conftest import key, make_scores

NUMBERS = [3, 11, 4]
SHARD = encode_shard(make_scores(NUMBERS))
ROOM_BYTES = 1024 * 2**20  # of address space beyond what the imports took
HUGE, BOMB_BYTES = 2**31 - 1, 300 * 2**20


def column(footer: Value, position: int = 3) -> Value:
    """Meta data of one of the shard's columns."""
    return row_group(footer)[1].held[1][position][3]


def row_group(footer: Value) -> Value:
    return footer[4].held[1][0]


def in_footer(change: Callable[[Value], None]) -> Callable[[], bytes]:
    return lambda: edit_footer(SHARD, change)


def in_page(change: Callable[[Value], None], body: bytes | None = None) -> Callable[[], bytes]:
    return lambda: edit_last_page(SHARD, change, body)


def put(
    *path: int, of: Callable[[Value], Value] = lambda value: value, value: Value
) -> Callable[[Value], None]:
    def change(root: Value) -> None:
        target = of(root)
        for number in path[:-1]:
            target = target[number]
        target[path[-1]] = value

    return change


def both(*changes: Callable[[Value], None]) -> Callable[[Value], None]:
    def change(root: Value) -> None:
        for one in changes:
            one(root)

    return change


def repeat_row_groups(times: int) -> Callable[[Value], None]:
    def change(footer: Value) -> None:
        footer[4] = Value(LIST, (STRUCT, footer[4].held[1] * times))
        footer[3] = Value(I64, len(NUMBERS) * times)

    return change


def nested(kind: int, depth: int) -> bytes:
    """A struct in a struct in a struct, or a list in a list."""
    return (b"\x1c" * depth + b"\0" * (depth + 1)) if kind == STRUCT else b"\x19" * depth + b"\x05"


def zstd_bomb(claimed_bytes: int) -> Callable[[], bytes]:
    def make() -> bytes:
        body = pa.Codec("zstd").compress(bytes(BOMB_BYTES), asbytes=True)
        return edit_last_page(
            SHARD,
            both(put(2, value=Value(I32, claimed_bytes)), put(3, value=Value(I32, len(body))), drop(4)),
            body,
        )

    return make


def drop(number: int) -> Callable[[Value], None]:
    return lambda header: header.held.pop(number) and None


def levels_bomb() -> bytes:
    """Two billion values in some twenty bytes: one run of levels."""
    run = write_varint(HUGE << 1) + b"\1"
    body = (len(run).to_bytes(4, "little") + run) * 2
    packed = pa.Codec("zstd").compress(body, asbytes=True)
    header = both(
        put(2, value=Value(I32, len(body))),
        put(3, value=Value(I32, len(packed))),
        put(5, 1, value=Value(I32, HUGE)),
    )
    return edit_footer(edit_last_page(SHARD, header, packed), put(5, of=column, value=Value(I64, HUGE)))


def one_long_completion(num_tokens: int) -> Callable[[], bytes]:
    def make() -> bytes:
        offsets = pa.array([0, num_tokens, num_tokens + 1, num_tokens + 2], pa.int32())
        values = pa.ListArray.from_arrays(
            offsets, pa.array(np.zeros(num_tokens + 2, np.float32)), type=SHARD_SCHEMA.types[3]
        )
        columns = [
            pa.array(list(map(key, NUMBERS)), pa.binary(16)),
            pa.array([num_tokens, 1, 1], pa.uint32()),
            pa.array([0.0] * 3),
            values,
        ]
        return write_parquet(pa.table(columns, schema=SHARD_SCHEMA), row_group_size=3)

    return make


def rewritten(content: bytes = SHARD, **options: object) -> bytes:
    """The shard as another writer would have it."""
    sink = pa.BufferOutputStream()
    table = read_shard_bytes(content)
    pq.write_table(
        table,
        sink,
        **{
            "compression": "zstd",
            "use_dictionary": False,
            "write_page_checksum": True,
            "store_schema": False,
            **options,
        },
    )
    return sink.getvalue().to_pybytes()


def with_columns(**columns: pa.Array) -> Callable[[], bytes]:
    def make() -> bytes:
        table = read_shard_bytes(SHARD)
        for name, values in columns.items():
            position = SHARD_SCHEMA.get_field_index(name)
            table = table.set_column(
                position, SHARD_SCHEMA.field(position), values.cast(SHARD_SCHEMA.field(position).type)
            )
        return write_parquet(table, row_group_size=len(table))

    return make


def written(
    table: pa.Table, *, use_dictionary: list[str] | bool = False, store_schema: bool = False
) -> bytes:
    """A Parquet file as a shard is written, of any columns."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=use_dictionary,
        write_page_checksum=True,
        store_schema=store_schema,
    )
    return sink.getvalue().to_pybytes()


def with_arrow_schema() -> bytes:
    """The hidden Arrow schema asks for an extension type."""
    fields = [
        SHARD_SCHEMA.field(0).with_metadata(
            {"ARROW:extension:name": "arrow.uuid", "ARROW:extension:metadata": ""}
        ),
        *list(SHARD_SCHEMA)[1:],
    ]
    return written(read_shard_bytes(SHARD).cast(pa.schema(fields)), store_schema=True)


FILES: dict[str, Callable[[], bytes]] = {
    "rows beyond number": in_footer(put(3, value=Value(I64, 2**40))),
    "negative rows": in_footer(put(3, value=Value(I64, -3))),
    "row group of rows beyond number": in_footer(both(put(3, value=Value(I64, 2**40)), put(3, of=row_group, value=Value(I64, 2**40)))),
    "column of values beyond number": in_footer(put(5, of=column, value=Value(I64, 2**40))),
    "column of negative values": in_footer(put(5, of=column, value=Value(I64, -1))),
    "column of bytes beyond number": in_footer(put(6, of=column, value=Value(I64, 10**12))),
    "column of packed bytes beyond number": in_footer(put(7, of=column, value=Value(I64, 10**12))),
    "column of negative bytes": in_footer(put(7, of=column, value=Value(I64, -(10**12)))),
    "column behind the end": in_footer(put(9, of=column, value=Value(I64, 10**12))),
    "column before the start": in_footer(put(9, of=column, value=Value(I64, -5))),
    "column in another file": in_footer(put(1, of=lambda footer: row_group(footer)[1].held[1][3], value=Value(BINARY, b"../../../etc/passwd"))),
    "column of another name": in_footer(put(3, of=column, value=Value(LIST, (BINARY, [Value(BINARY, b"key")])))),
    "column in another codec": in_footer(put(4, of=column, value=Value(I32, 2))),
    "column in no codec that there is": in_footer(put(4, of=column, value=Value(I32, 99))),
    "column with a dictionary": in_footer(put(11, of=column, value=Value(I64, 4))),
    "a hundred row groups of the same bytes": in_footer(repeat_row_groups(100)),
    "row groups beyond number": in_footer(repeat_row_groups(10_000)),
    "row groups, two billion claimed": in_footer(put(4, value=Value(0xF9, b"\xfc" + write_varint(HUGE)))),
    "a string, two billion bytes claimed": in_footer(put(6, value=Value(0xF8, write_varint(HUGE)))),
    "structs in structs": in_footer(put(99, value=Value(0xFC, nested(STRUCT, 50_000)))),
    "lists in lists": in_footer(put(99, value=Value(0xF9, nested(LIST, 50_000)))),
    "no row groups": in_footer(both(put(4, value=Value(LIST, (STRUCT, []))), put(3, value=Value(I64, 0)))),
    "row group without columns": in_footer(put(1, of=row_group, value=Value(LIST, (STRUCT, [])))),
    "schema with children beyond number": in_footer(put(5, of=lambda footer: footer[2].held[1][0], value=Value(I32, HUGE))),
    "page of bytes beyond number": in_page(put(2, value=Value(I32, HUGE))),
    "page of negative bytes": in_page(put(2, value=Value(I32, -1))),
    "page of negative packed bytes": in_page(put(3, value=Value(I32, -1))),
    "page of values beyond number": in_page(put(5, 1, value=Value(I32, HUGE))),
    "page that is a dictionary": in_page(put(1, value=Value(I32, 2))),
    "page of version 2": in_page(put(1, value=Value(I32, 3))),
    "page without a checksum": in_page(drop(4)),
    "page with another checksum": in_page(put(4, value=Value(I32, 7))),
    "page in another encoding": in_page(put(5, 2, value=Value(I32, 8))),
    "page of structs in structs": in_page(put(9, value=Value(0xFC, nested(STRUCT, 400)))),
    "zstd bomb": zstd_bomb(BOMB_BYTES + 100),
    "zstd bomb, told small": zstd_bomb(100),
    "levels bomb": levels_bomb,
    "a completion of forty million tokens": one_long_completion(40_000_000),
    "gzip": lambda: rewritten(compression="gzip"),
    "dictionaries": lambda: rewritten(use_dictionary=True),
    "pages of version 2": lambda: rewritten(data_page_version="2.0"),
    "no checksums": lambda: rewritten(write_page_checksum=False),
    "other encodings": lambda: rewritten(column_encoding={"num_tokens": "DELTA_BINARY_PACKED"}),
    "extension type": with_arrow_schema,
    "counts that disagree": with_columns(num_tokens=pa.array([4, 2, 4])),
    "sums that disagree": with_columns(logps=pa.array([-1.0, -1.0, -1.0])),
    "no numbers": with_columns(
        token_logps=pa.array([[float("nan")] * 4, [float("nan")] * 2, [float("nan")] * 5]), logps=pa.array([float("nan")] * 3)
    ),
    "infinite": with_columns(num_tokens=pa.array([1] * 3), token_logps=pa.array([[float("-inf")]] * 3), logps=pa.array([float("-inf")] * 3)),
    "below all bounds": with_columns(num_tokens=pa.array([1] * 3), token_logps=pa.array([[-3e38]] * 3), logps=pa.array([float(np.float32(-3e38))] * 3)),
    "far above zero": with_columns(num_tokens=pa.array([1] * 3), token_logps=pa.array([[9.0]] * 3), logps=pa.array([9.0] * 3)),
    "empty lists": with_columns(num_tokens=pa.array([0] * 3), token_logps=pa.array([[], [], []], pa.list_(pa.float32())), logps=pa.array([0.0] * 3)),
}  # fmt: skip
READ_ALL_THE_SAME = {  # what is read is what was scored
    "a hundred row groups of the same bytes",  # the same keys over and over
    "the levels as they should be",
    "too many repetition levels",  # nothing reads what is behind the levels and values of a page
    "a run of a million levels",
    "more values than levels",
}


def read_with_little_memory(content: bytes) -> str | None:
    """The error that opening and fetching meets; checks that what is read without one is what was scored."""
    with tempfile.TemporaryDirectory() as place:
        folder = LocalFolder(Path(place))
        folder.publish(f"scores/{name_by_content(content)}", content)
        soft = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (status_bytes("VmSize") + ROOM_BYTES, soft[1]))
        try:
            found = ScoreIndex(folder, "scores").fetch([key(number) for number in NUMBERS])
        except DpoCacheError as error:
            return f"{type(error).__name__}: {error}"
        finally:
            resource.setrlimit(resource.RLIMIT_AS, soft)
        assert [score.token_logps.tolist() for score in found] == [
            score.token_logps.tolist() for _, score in make_scores(NUMBERS)
        ]
    return None


def status_bytes(name: str) -> int:
    """VmSize or VmHWM of this process."""
    match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match, name
    return int(match[1]) * 1024


def main(names: list[str], files: dict[str, Callable[[], bytes]]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in names:
        content = files[name]()
        Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is the peak of reading
        before = status_bytes("VmRSS")
        error = read_with_little_memory(content)
        print(
            json.dumps({"file": name, "error": error, "rise_bytes": status_bytes("VmHWM") - before}),
            flush=True,
        )
