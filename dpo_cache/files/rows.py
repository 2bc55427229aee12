"""Rows into a Parquet file, a JSONL file or a folder of `datasets`: streamed, and wholly there or not at
all.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from dpo_cache.errors import OptionError, StorageError
from dpo_cache.files.sync import sync

Row = dict[str, Any]
WriteRows = Callable[[list[Row]], None]


def check_output(out: str, kind: str, *, overwrite: bool) -> None:
    """Raise `OptionError` where something is at the output that may not be replaced."""
    target = Path(out).expanduser()
    if not target.exists():
        return
    if not overwrite:
        raise OptionError(
            f"{target} is there already.\nChoose another output, or replace it with --overwrite."
        )
    is_ours = (target / "state.json").is_file() if kind == "datasets" else target.is_file()
    if not is_ours:
        found = "a folder" if target.is_dir() else "a file"
        raise OptionError(
            f"{target}: is {found}, which output in the format {kind} is not; it is not replaced.\n"
            "Choose another output."
        )


@contextmanager
def open_output(out: str, kind: str, schema: pa.Schema, *, overwrite: bool) -> Iterator[WriteRows]:
    """What writes rows to the output; it appears under its name when the block ends, and not at all if it
    raises.

    Raises `OptionError` for one that is there already, `StorageError` where the file system refuses.
    """
    target = Path(out).expanduser()
    check_output(out, kind, overwrite=overwrite)
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            scratch.mkdir(parents=True)
            with WRITERS[kind](scratch / "rows", schema) as write:
                yield write
            written = _as_datasets_folder(scratch) if kind == "datasets" else scratch / "rows"
            _put_in_place(written, target, scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise StorageError(
            f"cannot write {target}: {error.strerror or error}.\n"
            "Free some space or choose another output; nothing was left there."
        ) from error


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


WRITERS = {"parquet": _parquet_rows, "jsonl": _json_rows, "datasets": _parquet_rows}


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _as_datasets_folder(scratch: Path) -> Path:
    """The rows as `Dataset.save_to_disk` writes them; goes through files, not through memory."""
    dataset = Dataset.from_parquet(str(scratch / "rows"), cache_dir=str(scratch / "cache"))
    dataset.save_to_disk(scratch / "saved")  # type: ignore[union-attr]
    return scratch / "saved"


def _put_in_place(written: Path, target: Path, scratch: Path) -> None:
    for file in [path for path in written.rglob("*") if path.is_file()] or [written]:
        sync(file)
    if target.is_dir():
        target.rename(scratch / "replaced")  # a folder is not renamed over another
    written.replace(target)
    sync(target.parent)
