"""Rows into a Parquet file, a JSONL file or a folder of `datasets`: streamed, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from dpo_cache.errors import StorageError
from dpo_cache.files.atomic import refused_writes, replaced
from dpo_cache.files.locations import check_output

Row = dict[str, Any]
WriteRows = Callable[[list[Row]], None]


@contextmanager
def open_output(out: str, kind: str, schema: pa.Schema, *, overwrite: bool) -> Iterator[WriteRows]:
    """A function that writes rows to the output, which appears under its name when the block ends, and not at
    all if the block raises.

    Raises `OptionError` for an output that exists already, `StorageError` where the file system refuses.
    """
    target = Path(out).expanduser()
    check_output(out, kind, overwrite=overwrite)
    advice = "Or choose another `output`. Nothing was left there."
    with refused_writes(target, StorageError, advice):
        target.parent.mkdir(parents=True, exist_ok=True)
        with replaced(target, is_shared=True) as scratch, WRITERS[kind](scratch, schema) as write:
            yield write


@contextmanager
def _parquet_rows(path: Path, schema: pa.Schema) -> Iterator[WriteRows]:
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        yield lambda rows: writer.write_table(pa.Table.from_pylist(rows, schema=schema))


@contextmanager
def _json_rows(path: Path, schema: pa.Schema) -> Iterator[WriteRows]:
    with open(path, "w", encoding="utf-8") as file:
        yield lambda rows: file.writelines(
            json.dumps({name: _plain(row[name]) for name in schema.names}, ensure_ascii=False) + "\n"
            for row in rows
        )


@contextmanager
def _datasets_rows(path: Path, schema: pa.Schema) -> Iterator[WriteRows]:
    """A folder as `Dataset.save_to_disk` writes it; the rows pass through a file, not through memory."""
    with TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.") as work:
        rows = Path(work, "rows.parquet")
        with _parquet_rows(rows, schema) as write:
            yield write
        dataset = Dataset.from_parquet(str(rows), cache_dir=str(Path(work, "cache")))
        dataset.save_to_disk(path)  # type: ignore[union-attr]


WRITERS = {"parquet": _parquet_rows, "jsonl": _json_rows, "datasets": _datasets_rows}


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value
