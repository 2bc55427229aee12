"""The rows of a JSON file, each as its own text, with the line where it begins.

Read are: an object a line (JSON Lines), a list of objects, objects one after the other over several lines,
and one object that holds the rows (`{"data": [...]}`) or the columns (`{"prompt": [...], "chosen": [...]}`).
No type is guessed over a column: a row is the JSON text that the file has.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Any, BinaryIO, NamedTuple

BLOCK_BYTES = 1 << 20
NEAR_END = 16  # letters: an error so near to the end of what is read may be that of a value that is cut there
CUT = "it is an incomplete JSON object (cut before its end)"
SPACE = re.compile(r"[ \t\n\r]*")


class Record(NamedTuple):
    """One row of a file: its JSON text and the names of its columns, or the problem with it."""

    line: int | None  # counted from 1, where the row begins; None: rows of a column-wise file
    text: str | None
    names: tuple[str, ...] = ()
    problem: str | None = None


class BrokenFileError(Exception):
    """The rest of a file cannot be read: the reason, and the line if it is known."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


def json_records(stream: BinaryIO) -> Iterator[Record]:
    """Yield the rows of a JSON file. Raises `BrokenFileError`."""
    blocks = without_mark(iter(partial(stream.read, BLOCK_BYTES), b""))
    head = b""
    for block in blocks:
        head += block
        if head.strip():
            break
    blocks = chain([head], blocks)
    is_list = head.lstrip()[:1] == b"["
    if is_list and not _is_first_of_lines(head):
        yield from _list_elements(_Values(blocks))
    elif not is_list and not _begins_with_a_line(head):
        yield from _documents(_Values(blocks))
    else:
        lines = _lines(blocks)
        first = next(lines, None)
        second = next(lines, None)
        if first and not second and (rows := rows_within(first[1])) is not None:
            yield from (Record(None, json.dumps(row), tuple(row)) for row in rows)
            return
        for number, line in chain(filter(None, (first, second)), lines):
            yield parse_record(line, number)


def parse_record(line: bytes, number: int | None) -> Record:
    """The row that is this JSON text, or the problem with it, in words that complete 'line 7: ...'."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        is_cut = error.reason == "unexpected end of data"  # within the bytes of its last letter
        return Record(number, None, problem=CUT if is_cut else "it is not UTF-8 text")
    return checked_record(text, number)


def checked_record(text: str, number: int | None) -> Record:
    """The same of text."""
    try:
        row = CHECKER.decode(text)
        if ("\\ud" in text or "\\uD" in text) and not _is_unicode(row):
            return Record(number, None, problem="it holds half of a surrogate pair, which is not a character")
    except json.JSONDecodeError as error:
        if error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip()):
            return Record(number, None, problem=CUT)
        reason = error.msg[:1].lower() + error.msg[1:].removesuffix(" starting at")
        return Record(number, None, problem=f"it is not JSON ({reason})")
    except _TwiceError as error:
        return Record(number, None, problem=str(error))
    except (ValueError, RecursionError) as error:
        return Record(number, None, problem=f"it is JSON that cannot be read ({error})")
    if not isinstance(row, dict):
        return Record(number, None, problem=f"it is {KINDS[type(row)]}, expected an object")
    return Record(number, text, tuple(row))


def without_mark(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The blocks without a byte order mark. Raises `BrokenFileError` for text in UTF-16 or UTF-32."""
    first = next(blocks, b"")
    encoding = json.detect_encoding(first[:4])
    if not encoding.startswith("utf-8") and _decodes(first[:64], encoding):
        raise BrokenFileError(f"the file is {encoding[:6].upper()} text, expected UTF-8; convert it")
    return chain([first.removeprefix(codecs.BOM_UTF8)], blocks)


def rows_within(text: str | bytes) -> list[dict[str, Any]] | None:
    """The rows of a file that is one object which holds rows or columns; None if the object is a row.

    Raises `BrokenFileError` for an object of several splits.
    """
    try:
        found = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not found:
        return None
    tables = [name for name, value in found.items() if _is_table(value)]
    if len(tables) > 1 and len(tables) == len(found):
        raise BrokenFileError(
            f"the file holds several lists of rows ({', '.join(tables)}), expected the rows of one split; "
            "give each split its own file in one folder, such as train.jsonl"
        )
    if tables and (len(found) == 1 or tables == ["data"]):
        return found[tables[0]]
    columns = list(found.values())
    if all(isinstance(column, dict) for column in columns):  # pandas: {"prompt": {"0": ..., "1": ...}}
        has_numbers = all(column and all(map(str.isdecimal, column)) for column in columns)
        columns = [list(column.values()) for column in columns] if has_numbers else []
    is_columns = (
        bool(columns)
        and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns)
        and any(column and all(isinstance(cell, (str, list)) for cell in column) for column in columns)
    )
    if not is_columns:
        return None
    return [dict(zip(found, cells, strict=True)) for cells in zip(*columns, strict=True)]


KINDS = {list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false"}
KINDS[type(None)] = "null"


class _TwiceError(ValueError):
    """An object has a name twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise _TwiceError(f"the name {twice!r} occurs twice in one object")
    return found


CHECKER = json.JSONDecoder(object_pairs_hook=_object, strict=False)


def _decodes(text: bytes, encoding: str) -> bool:
    try:
        return "\0" not in codecs.getincrementaldecoder(encoding)("strict").decode(text)
    except UnicodeDecodeError:
        return False


def _is_unicode(row: Any) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_table(value: Any) -> bool:
    """Return whether it is a list of rows, not of messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(row, dict) and not {"role", "from"} & set(row) for row in value)
    )


def _is_first_of_lines(head: bytes) -> bool:
    """Return whether the first line is a whole list and others follow: it is a wrong row, not the list of
    all.
    """
    first, _, rest = head.lstrip().partition(b"\n")
    if not rest.strip():
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _begins_with_a_line(head: bytes) -> bool:
    """Return whether the file is read line by line: its first line is whole JSON, or no value of several
    lines begins there.
    """
    first, newline, _ = head.lstrip().partition(b"\n")
    if not newline or checked_record(first.decode(errors="replace"), 1).text is not None:
        return True
    try:
        _, end = CHECKER.raw_decode(head.lstrip().decode(errors="replace"))
    except json.JSONDecodeError as error:
        return not _may_be_cut(error, len(error.doc))
    except (ValueError, RecursionError):
        return True
    return end < len(first)


def _may_be_cut(error: json.JSONDecodeError, num_letters: int) -> bool:
    """Return whether the text may be the beginning of a value."""
    return error.pos >= num_letters - NEAR_END or error.msg.startswith("Unterminated string")


def _lines(blocks: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the text of each line that is not blank."""
    rest, number = [b""], 0
    for block in blocks:
        *whole, tail = block.split(b"\n")
        if whole:
            whole[0] = b"".join([*rest, whole[0]])
            rest = [tail]
        else:
            rest.append(tail)
        for line in whole:
            number += 1
            if line := line.strip(b" \t\r"):
                yield number, line
    if last := b"".join(rest).strip(b" \t\r"):
        yield number + 1, last


def _list_elements(values: _Values) -> Iterator[Record]:
    values.take("[")
    while values.next_letter() != "]":
        yield values.record()
        if values.next_letter() == ",":
            values.take(",")
        elif values.next_letter() != "]":
            raise BrokenFileError("the list of rows is broken: a comma or its end is expected", values.line)
    values.take("]")
    if values.next_letter():
        raise BrokenFileError("there is text after the end of the list of rows", values.line)


def _documents(values: _Values) -> Iterator[Record]:
    first, is_first = None, True
    while values.next_letter():
        record = values.record()
        if is_first:
            first, is_first = record, False
            continue
        if first is not None:
            yield first
            first = None
        yield record
    if first is None:
        return
    rows = rows_within(first.text) if first.text is not None else None
    if rows is None:
        yield first
    else:
        yield from (Record(None, json.dumps(row), tuple(row)) for row in rows)


class _Values:
    """The JSON values of a text, one after the other; a bounded part of the text is held."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._blocks = (decode(block, not block) for block in chain(blocks, [b""]))
        self._text, self._place, self.line = "", 0, 1

    def next_letter(self) -> str:
        """The next letter that is no space; empty at the end."""
        while True:
            end = SPACE.match(self._text, self._place).end()  # type: ignore[union-attr]
            self._advance(end)
            if end < len(self._text):
                return self._text[end]
            if not self._read():
                return ""

    def take(self, letter: str) -> None:
        assert self.next_letter() == letter
        self._advance(self._place + 1)

    def record(self) -> Record:
        """The next value as a row. Raises `BrokenFileError` where it is no value."""
        if not self.next_letter():
            raise BrokenFileError("the file ends in the middle of its rows", self.line)
        while True:
            try:
                found, end = PLAIN.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                if _may_be_cut(error, len(self._text)) and self._read():
                    continue
                line = self.line + self._text.count("\n", self._place, error.pos)
                raise BrokenFileError(f"not JSON ({error.msg[:1].lower()}{error.msg[1:]})", line) from error
            except (ValueError, RecursionError) as error:
                raise BrokenFileError(f"JSON that cannot be read ({error})", self.line) from error
            if end < len(self._text) or isinstance(found, (dict, list, str)) or not self._read():
                break
        text, line = self._text[self._place : end], self.line
        self._advance(end)
        if not text.isascii() and not _is_unicode(text):
            return Record(line, None, problem="it is not UTF-8 text")
        return checked_record(text, line)

    def _advance(self, place: int) -> None:
        self.line += self._text.count("\n", self._place, place)
        self._place = place

    def _read(self) -> bool:
        """Read as much as is held, at least a block. False at the end."""
        held = self._text[self._place :]
        found: list[str] = []
        while sum(map(len, found)) <= len(held) and (block := next(self._blocks, None)) is not None:
            found.append(block)
        self._text, self._place = held + "".join(found), 0
        return bool(found)


PLAIN = json.JSONDecoder(strict=False)
