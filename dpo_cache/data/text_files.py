"""Text files -> rows: opened, decompressed, read into a table that `datasets` can keep, or streamed."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa
from datasets import Dataset, DownloadManager, config

from dpo_cache.data.csv_records import csv_records
from dpo_cache.data.examples import RowProblem
from dpo_cache.data.json_records import BrokenFileError, Record, json_records
from dpo_cache.data.text_rows import SCHEMA, Row, TextRows, TextStream, blocks_of
from dpo_cache.errors import DataError, first_line
from dpo_cache.files.atomic import replaced

READER_VERSION = 2  # raised when the same files would give other rows
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error)
MAGIC: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": lambda file: pa.CompressedInputStream(file, "zstd"),
}


@dataclass(frozen=True)
class TextFiles:
    """The files of a split, of one kind: paths, or URLs of fsspec."""

    kind: str  # json or csv
    paths: tuple[str, ...]
    delimiter: str | None = None  # the delimiter of CSV; None: found in its first line

    @property
    def names(self) -> tuple[str, ...]:
        """The files' names without the folder that they share."""
        if len(self.paths) == 1:
            return (PurePosixPath(self.paths[0]).name,)
        shared = os.path.commonpath([PurePosixPath(path).parent for path in self.paths])
        return tuple(str(PurePosixPath(path).relative_to(shared)) for path in self.paths)


def kept_in() -> Path:
    """The folder for rows that were read, in the cache of `datasets`."""
    return Path(config.HF_DATASETS_CACHE) / "dpo_cache_rows"


def read_whole(files: TextFiles, place: str) -> TextRows:
    """The rows of the files in a table on disk, in the cache of `datasets`; unchanged files are read once.

    Raises `DataError` for a file that cannot be read to its end, and for files without a row.
    """
    key = _key_of(files)
    folder = kept_in() / key[:32]
    if not (folder / "rows.arrow").is_file():
        with _kept_in(folder, place):
            folder.mkdir(parents=True, exist_ok=True)
            with replaced(folder / "rows.arrow", is_shared=True) as scratch:
                _write(scratch, _blocks(_downloaded(files)))
    table = Dataset.from_file(str(folder / "rows.arrow"))
    table._fingerprint = key[:32]
    if not len(table):
        raise DataError(f"{place} has no rows.")
    rows = TextRows(table, files.names, is_untyped=files.kind == "csv")
    first_row_of(rows, place)
    return rows


def first_row_of(rows: TextRows, place: str) -> Row:
    """The first row that can be read. Raises `DataError` if there is none."""
    (first,) = rows.at(0, 1)
    if not isinstance(first, RowProblem):
        return first
    found = next((row for row in rows if not isinstance(row, RowProblem)), None)
    if found is None:
        (where,) = rows.places([0])
        raise DataError(
            f"{place}: not readable ({' '.join(where)}: {first.reason}).\n{_hint(rows.is_untyped)}"
        )
    return found


def read_stream(files: TextFiles) -> TextStream:
    """The rows of the files, read when they are needed. The stream raises `DataError` as `read_whole`."""
    return TextStream(lambda: _blocks(files), files.names, is_untyped=files.kind == "csv")


def _blocks(files: TextFiles) -> Iterator[pa.RecordBatch]:
    return blocks_of(_records(files, path) for path in files.paths)


def _records(files: TextFiles, path: str) -> Iterator[Record]:
    """The records of a file. Raises `DataError`."""
    try:
        with _opened(path) as stream:
            yield from json_records(stream) if files.kind == "json" else csv_records(stream, files.delimiter)
    except BrokenFileError as error:
        where = f", line {error.line}" if error.line else ""
        raise DataError(f"{path}{where}: not readable ({error}).\n{_hint(files.kind == 'csv')}") from error
    except READ_ERRORS as error:
        raise DataError(
            f"{path}: not readable ({first_line(error)}).\nRepair the file and run again."
        ) from error


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """The file's content, decompressed if it is compressed, whatever its name."""
    with fsspec.open(path, "rb") if "://" in path else open(path, "rb") as file:
        head = file.read(6)
        file.seek(0)
        decompress = next((found for magic, found in MAGIC.items() if head.startswith(magic)), None)
        if decompress is None:
            yield cast(BinaryIO, file)
            return
        with decompress(file) as stream:
            yield stream


def _write(path: Path, blocks: Iterator[pa.RecordBatch]) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        for block in blocks:
            writer.write_batch(block)


@contextmanager
def _kept_in(folder: Path, place: str) -> Iterator[None]:
    """Raise `DataError` where the rows cannot be written there."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{place}: its rows cannot be kept in {folder} ({first_line(error)}).\n"
            "Free some space there, or set HF_HOME to another folder."
        ) from error


def _key_of(files: TextFiles) -> str:
    """A digest of the files' names, sizes and times, and of how they are read.

    URLs of the Hub name a commit.
    """
    stats = [None if "://" in path else Path(path).stat() for path in files.paths]
    made_from = [READER_VERSION, files.kind, files.delimiter, [
        [path] if stat is None else [os.path.abspath(path), stat.st_size, stat.st_mtime_ns]
        for path, stat in zip(files.paths, stats, strict=True)
    ]]  # fmt: skip
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()


def _downloaded(files: TextFiles) -> TextFiles:
    """The files with local copies in place of URLs."""
    if not any("://" in path for path in files.paths):
        return files
    return TextFiles(files.kind, tuple(DownloadManager().download(list(files.paths))), files.delimiter)


def _hint(is_csv: bool) -> str:
    return (
        "Repair the file and run again."
        if is_csv
        else "One JSON object a line, or a list of objects, is expected in JSON."
    )
