"""Parquet files that are malformed in the ways of apache/parquet-testing's `bad_data`, made here by mutation.

Each of the kinds there, named in a comment, crashed or confused a reader; here the score shards and their
readers are ours. Their checksums and sizes fit, so only what the pages hold is wrong. Run as a script, it reads
these files and those of `hostile.py`.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
import pyarrow as pa

from tests.promises.hostile import (
    FILES,
    SHARD,
    both,
    column,
    drop,
    in_footer,
    main,
    put,
    rewritten,
    row_group,
    written,
)
from tests.promises.thrift import BINARY, I32, I64, LIST, Value, edit_footer, edit_last_page, write_varint
from tests.store.caches import read_shard_bytes

TOKEN_LOGPS = read_shard_bytes(SHARD).column("token_logps").combine_chunks().values.to_numpy()
LENGTHS = (4, 2, 5)  # tokens of the shard's completions
NUM_TOKENS = sum(LENGTHS)
REPETITION = [level for length in LENGTHS for level in [0] + [1] * (length - 1)]
DEFINITION = [1] * NUM_TOKENS


def run_levels(levels: Sequence[int]) -> bytes:
    """Levels as runs of the RLE encoding, after their length."""
    runs = [(level, len(list(group))) for level, group in groupby(levels)]
    body = b"".join(write_varint(length << 1) + bytes([level]) for level, length in runs)
    return len(body).to_bytes(4, "little") + body


def with_levels(
    repetition: Sequence[int] = REPETITION,
    definition: Sequence[int] = DEFINITION,
    num_values: int = NUM_TOKENS,
) -> Callable[[], bytes]:
    """The shard, with other levels or another number of values in the page of its lists."""

    def make() -> bytes:
        values = np.resize(TOKEN_LOGPS, num_values).tobytes()
        body = run_levels(repetition) + run_levels(definition) + values
        packed = pa.Codec("zstd").compress(body, asbytes=True)
        checksum = int(np.uint32(zlib.crc32(packed)).astype(np.int32))
        header = both(
            put(2, value=Value(I32, len(body))),
            put(3, value=Value(I32, len(packed))),
            put(4, value=Value(I32, checksum)),
            put(5, 2, value=Value(I32, 0)),
        )
        return edit_last_page(SHARD, header, packed)

    return make


def schema_element(position: int) -> Callable[[Value], Value]:
    return lambda footer: footer[2].held[1][position]


def in_schema(position: int, number: int, value: Value) -> Callable[[], bytes]:
    return in_footer(put(number, of=schema_element(position), value=value))


def nulls_in_a_required_column() -> bytes:
    """A column of `logps` with a null, and with it definition levels, which the schema says is required."""
    table = read_shard_bytes(SHARD)
    optional = table.set_column(2, pa.field("logps", pa.float64()), pa.array([None, -1.0, -2.0]))
    return edit_footer(written(optional), put(3, of=schema_element(3), value=Value(I32, 0)))


def hidden_dictionary() -> bytes:
    """A column that starts with a dictionary, which its footer does not show."""

    def hide(footer: Value) -> None:
        details = column(footer)
        details[9] = details[11]
        drop(11)(details)
        details[2] = Value(LIST, (I32, [Value(I32, 0), Value(I32, 3)]))

    return edit_footer(rewritten(use_dictionary=["token_logps.list.element"]), hide)


def dictionary_of_another_type() -> bytes:
    """Keys from a dictionary, whose values have lengths before them though the schema gives them one."""
    table = read_shard_bytes(SHARD)
    keys = table.column("key").cast(pa.binary())
    content = written(
        table.set_column(0, pa.field("key", pa.binary(), nullable=False), keys), use_dictionary=["key"]
    )
    element = both(
        put(1, of=schema_element(1), value=Value(I32, 7)), put(2, of=schema_element(1), value=Value(I32, 16))
    )
    kind = put(1, of=lambda footer: column(footer, 0), value=Value(I32, 7))
    return edit_footer(content, both(element, kind))


def column_group() -> bytes:
    """A column that is a group of two, as a Variant is stored."""
    table = read_shard_bytes(SHARD)
    group = pa.StructArray.from_arrays([pa.array([b""] * 3), pa.array([b"\xff"] * 3)], ["metadata", "value"])
    return written(table.set_column(2, "logps", group))


BAD_DATA: dict[str, Callable[[], bytes]] = {
    # PARQUET-1481: a value of the schema is corrupted
    "a type that there is not": in_schema(1, 1, Value(I32, -7)),
    "a type beyond number": in_schema(3, 1, Value(I32, 2**30)),
    "a repetition that there is not": in_schema(3, 3, Value(I32, 9)),
    "a converted type that there is not": in_schema(2, 6, Value(I32, 99)),
    "keys of no length": in_schema(1, 2, Value(I32, 0)),
    "keys of a negative length": in_schema(1, 2, Value(I32, -16)),
    "keys of two billion bytes": in_schema(1, 2, Value(I32, 2**31 - 1)),
    "children of a column": in_schema(3, 5, Value(I32, 1)),
    "a negative number of children": in_schema(0, 5, Value(I32, -1)),
    "a column's type that the schema does not have": in_footer(put(1, of=column, value=Value(I32, 6))),
    "a column's type that there is not": in_footer(put(1, of=column, value=Value(I32, -7))),
    "the levels as they should be": with_levels(),
    # ARROW-RS-GH-6229-LEVELS, ARROW-GH-41321: fewer levels than the page's header says
    "too few repetition levels": with_levels(repetition=REPETITION[:-2]),
    "no repetition levels": with_levels(repetition=[]),
    "too few definition levels": with_levels(definition=DEFINITION[:-2]),
    "no definition levels": with_levels(definition=[]),
    "too many repetition levels": with_levels(repetition=REPETITION + [1] * 50),
    "a run of a million levels": with_levels(definition=DEFINITION[:2] + [1] * 10**6),
    "a definition level above its most": with_levels(definition=[255, *DEFINITION[1:]]),
    "a repetition level above its most": with_levels(repetition=[0, 255, *REPETITION[2:]]),
    "fewer values than levels": with_levels(num_values=NUM_TOKENS - 2),
    "no values": with_levels(num_values=0),
    "more values than levels": with_levels(num_values=NUM_TOKENS + 3),
    # ARROW-GH-41317: columns of different sizes
    "a column of fewer rows": with_levels(repetition=[0] + [1] * (NUM_TOKENS - 1)),
    "a column of more rows": with_levels(repetition=[0] * NUM_TOKENS),
    "a row group of fewer rows": in_footer(both(put(3, value=Value(I64, 2)), put(3, of=row_group, value=Value(I64, 2)))),
    "a row group of more rows": in_footer(both(put(3, value=Value(I64, 4)), put(3, of=row_group, value=Value(I64, 4)))),
    # ARROW-GH-45185: repetition levels that start with 1
    "a first row that continues another": with_levels(repetition=[1, *REPETITION[1:]]),
    "rows that all continue another": with_levels(repetition=[1] * NUM_TOKENS),
    # ARROW-GH-47662: nulls in a required column
    "nulls in a required column": nulls_in_a_required_column,
    "lists that are null": with_levels(definition=[0, *DEFINITION[1:]], num_values=NUM_TOKENS - 1),
    # ARROW-RS-GH-6229-DICTHEADER, ARROW-GH-43605, ARROW-RS-GH-11261-FLBA-DICT: dictionaries
    "a dictionary that the footer hides": hidden_dictionary,
    "a dictionary of another type": dictionary_of_another_type,
    # variant/: a column that is a group
    "a column that is a group": column_group,
    "a column whose path is longer": in_footer(put(3, of=column, value=Value(LIST, (BINARY, [Value(BINARY, name) for name in (b"token_logps", b"list", b"element", b"value")])))),
}  # fmt: skip
ALL = {**FILES, **BAD_DATA}

if __name__ == "__main__":
    main(sys.argv[1:], ALL)
