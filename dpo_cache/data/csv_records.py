"""The rows of a CSV file, each as JSON text whose values are text to the letter, with the line where it
begins.

A cell is what the file has: `007`, `1.0`, `NA` and an empty cell are text. Cells that a record lacks at its
end are missing. Text after the closing quotation mark of a cell is an error: programs differ in what they
make of it. Columns without a name, and names that are there twice, get those of pandas (`Unnamed: 0`,
`chosen.1`).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import BinaryIO, cast

from dpo_cache.data.json_records import BrokenFileError, Record

DELIMITERS = ",;\t|"
LONGEST_CELL = 2**31 - 1  # letters; the module's own limit is 131,072
OPEN = "it has a quotation mark that is never closed"
AFTER_QUOTE = (
    "it has text after the closing quotation mark of a cell (inside a quoted cell, each of its own quotation "
    "marks is written twice)"
)


def csv_records(stream: BinaryIO, delimiter: str | None = None) -> Iterator[Record]:
    """Yield the rows of a CSV file. Raises `BrokenFileError`.

    Without `delimiter`: the comma or, if the first line has none, the one of `;`, tab and `|` that it has
    most.
    """
    buffered = io.BufferedReader(cast(io.RawIOBase, _Raw(stream)), 1 << 20)
    head = buffered.peek(4)[:4]
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head:
        raise BrokenFileError("the file is UTF-16 text, expected UTF-8; convert it")
    former_limit = csv.field_size_limit(LONGEST_CELL)
    try:
        lines = _Lines(io.TextIOWrapper(buffered, "utf-8-sig", errors="surrogateescape", newline=""))
        delimiter = delimiter or _delimiter_of(lines.first)
        yield from _records(lines, delimiter)
    finally:
        csv.field_size_limit(former_limit)


def _records(lines: _Lines, delimiter: str) -> Iterator[Record]:
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    names: tuple[str, ...] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            problem = OPEN if lines.have_ended else AFTER_QUOTE if "expected after" in str(error) else None
            if names is None:
                raise BrokenFileError(f"not CSV ({problem or error})", line) from error
            yield Record(line, None, problem=problem or f"it is not CSV ({error})")
            continue
        if cells is None:
            return
        if not cells:  # a blank line
            continue
        if names is None:
            names = _column_names(cells)
            continue
        yield _record(names, cells, line)


def _record(names: tuple[str, ...], cells: list[str], line: int) -> Record:
    if len(cells) > len(names):
        problem = f"it has {len(cells)} cells, but the header names {len(names)} columns"
        return Record(line, None, problem=problem)
    text = json.dumps(dict(zip(names, cells, strict=False)), ensure_ascii=False)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return Record(line, None, problem="it is not UTF-8 text")
    return Record(line, text, names)


def _column_names(cells: list[str]) -> tuple[str, ...]:
    names: list[str] = []
    for place, cell in enumerate(cells):
        name, repeats = cell or f"Unnamed: {place}", 0
        while (f"{name}.{repeats}" if repeats else name) in names:
            repeats += 1
        names.append(f"{name}.{repeats}" if repeats else name)
    return tuple(name.encode("utf-8", "replace").decode() for name in names)


def _delimiter_of(header: str) -> str:
    return "," if "," in header else max(DELIMITERS, key=header.count)


class _Lines:
    """Lines of a text; `have_ended` is true once a line was wanted after the last."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text, self.have_ended = text, False
        self.first = text.readline()
        self._waiting = [self.first] if self.first else []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._waiting.pop() if self._waiting else self._text.readline()
        if not line:
            self.have_ended = True
            raise StopIteration
        return line


class _Raw(io.RawIOBase):
    """Any binary stream as a raw one, which `io.BufferedReader` takes."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        found = self._stream.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)
