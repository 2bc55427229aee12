"""A data set's name or path, or rows that are loaded already -> its splits, whole or as a stream."""

from __future__ import annotations

import os
import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetGenerationError

from dpo_cache.data.frames import rows_of_frame
from dpo_cache.data.sources import open_location
from dpo_cache.data.text_files import TextFiles, first_row_of, read_stream, read_whole
from dpo_cache.data.text_rows import TextRows, TextStream, rows_in_memory
from dpo_cache.data.undecoded import without_decoding
from dpo_cache.errors import DataError, OptionError, first_line
from dpo_cache.files.locations import data_files, data_suffix, expanded

NAME_LETTERS = frozenset(string.ascii_letters + string.digits + "._-")  # letters of a pair set's name

# raised for damaged data
READ_ERRORS = (pa.ArrowException, DatasetGenerationError, OSError, ValueError)

Rows: TypeAlias = Dataset | IterableDataset | TextRows | TextStream


def read_dataset(
    location: str | Sequence[str],
    splits: Sequence[str] = (),
    limit: int | None = None,
    *,
    streaming: bool = False,
    rename: Mapping[str, str] | None = None,
) -> dict[str, Rows]:
    """The splits of these names, cut to their first `limit` rows.

    `location` is a file (.jsonl, .json, .csv, .tsv, .parquet, .arrow; text may be compressed), a pattern such
    as `data/*.jsonl` or several of these, whose rows follow one another; a folder of such files; or a Hub id.
    Without `splits`: train, or the only one there is. `streaming` reads rows as they are needed, never all of
    them. `rename` gives columns (its values) the names that a format expects (its keys).

    JSON and CSV are read as text: strings stay strings to the letter, and a row's values have the types of
    its own JSON. Raises `DataError`.
    """
    place = location if isinstance(location, str) else ", ".join(location)

    def opened(source: TextFiles | Dataset | IterableDataset, split: str) -> Rows:
        if not isinstance(source, TextFiles):
            return source
        return read_stream(source) if streaming else read_whole(source, f"{place}: split {split}")

    found = open_location(location, streaming)
    return {
        name: _limited(opened(found[name], name), limit, rename, f"{place}: split {name}")
        for name in _choose(list(found), place, splits)
    }


def take_rows(
    rows: Any,
    splits: Sequence[str] = (),
    limit: int | None = None,
    *,
    rename: Mapping[str, str] | None = None,
    place: str = "the rows",
) -> dict[str, Rows]:
    """The same splits of rows that are loaded already.

    `rows` is a `Dataset` or `IterableDataset`, a list of dicts, a pandas or polars `DataFrame` or a pyarrow
    `Table`, each of which is the split train, or a dict from split to one of these, such as a `DatasetDict`.
    Raises `DataError`.
    """
    by_split = rows if isinstance(rows, Mapping) else {"train": rows}
    found = {str(name): _as_rows(part, place) for name, part in by_split.items()}
    return {
        name: _limited(found[name], limit, rename, f"{place}: split {name}")
        for name in _choose(list(found), place, splits)
    }


def first_row(rows: Rows, place: str) -> dict[str, Any]:
    """The first row that can be read. Raises `DataError` if there is none.

    Of a stream of text, it has the columns of the rows that are read at once.
    """
    found: dict[str, Any] | None = None
    if isinstance(rows, TextStream):
        block = rows.first_block()
        found = None if block is None else first_row_of(block, place)
    elif isinstance(rows, TextRows):
        found = first_row_of(rows, place) if len(rows) else None
    else:
        with reading(place):
            found = next(iter(rows), None)
    if found is None:
        raise DataError(f"{place} has no rows.")
    return found


@contextmanager
def reading(place: str) -> Iterator[None]:
    """Raise `DataError` for errors that damaged data raises."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise not_utf8(place, error) from error
    except READ_ERRORS as error:
        raise DataError(
            f"{place} is not readable ({first_line(error)}).\n"
            "Repair the data and run again; the scores so far are kept."
        ) from error


def not_utf8(place: str, error: UnicodeDecodeError) -> DataError:
    return DataError(f"{place} is not UTF-8 text ({error.reason}).\nConvert it to UTF-8 and run again.")


def dataset_name(location: str | Sequence[str]) -> str:
    """The data set's file, folder or repository, with characters that a pair set's name cannot have replaced
    by hyphens; of a pattern or several files, the folder that has them all.

    Raises `OptionError` where too little of it is left to distinguish two names: `日本` and `中国` would
    both be hyphens.
    """
    locations = [location] if isinstance(location, str) else list(location)
    files = [file for one in locations for file in data_files(one)]
    if len(locations) > 1 or files not in ([], [str(expanded(locations[0]))]):
        named = _common_folder(files)
        path = Path(named)
    else:
        named, path = locations[0], Path(os.path.abspath(locations[0]))  # `.` and `..` are names of folders
    stem = path.name
    if suffix := data_suffix(path.name):
        stem = path.name[: path.name.lower().rindex(suffix)]
    cleaned = "".join(letter if letter in NAME_LETTERS else "-" for letter in stem).lstrip(".-")[:128]
    has_other_letters = any(letter.isalnum() and not letter.isascii() for letter in stem)
    has_own_letters = any(letter.isalpha() for letter in cleaned)
    if not cleaned.strip("-._") or (has_other_letters and not has_own_letters):
        raise OptionError(
            f"{named}: its name has no letters that the name of a pair set can have (a-z, A-Z).\n"
            "Give the pair set a `name`."
        )
    return cleaned


def _common_folder(files: Sequence[str]) -> str:
    """The folder that has all of the files. Raises `OptionError` for files on several drives of Windows."""
    try:
        return os.path.commonpath([Path(os.path.abspath(file)).parent for file in files])
    except ValueError as error:
        raise OptionError(
            "files on several drives have no folder in common that could name the pair set.\nGive `name`."
        ) from error


def _as_rows(rows: Any, place: str) -> Rows:
    if isinstance(rows, (Dataset, IterableDataset)):
        is_formatted = isinstance(rows, Dataset) and rows.format["type"] not in (None, "custom")
        return rows.with_format(None) if is_formatted else rows
    kind = f"{type(rows).__module__.partition('.')[0]}.{type(rows).__name__}"
    try:
        if kind == "pandas.DataFrame":
            return rows_of_frame(rows)
        if kind == "polars.DataFrame":
            return Dataset.from_polars(rows)
        if isinstance(rows, pa.Table):
            return Dataset(rows)
        if isinstance(rows, Sequence) and all(isinstance(row, Mapping) for row in rows):
            return rows_in_memory(rows)
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise DataError(
            f"{place}: the rows do not form a table ({first_line(error)}).\n"
            "Give each column values of one type."
        ) from error
    raise DataError(
        f"{place}: a value of type {type(rows).__name__} is not read.\nGive a datasets.Dataset, DatasetDict "
        "or IterableDataset, a list of dicts, a pandas or polars DataFrame, or a path."
    )


def _choose(found: Sequence[str], place: str, splits: Sequence[str]) -> list[str]:
    """The names of the splits to be read. Raises `DataError` for one that there is not."""
    names = list(splits) or _default_split(place, list(found))
    unknown = [name for name in names if name not in found]
    if unknown:
        raise DataError(f"{place}: no split {', '.join(unknown)}.\nIt has: {', '.join(found)}.")
    return names


def _limited(rows: Rows, limit: int | None, rename: Mapping[str, str] | None, place: str) -> Rows:
    """The first rows, with their columns renamed."""
    return _renamed(_cut(without_decoding(rows), limit), rename or {}, place)


def _default_split(location: str, found: list[str]) -> list[str]:
    if "train" in found:
        return ["train"]
    if len(found) == 1:
        return found
    raise DataError(f"{location}: has the splits {', '.join(found)}.\nName one or more with `split`.")


def _cut(rows: Rows, limit: int | None) -> Rows:
    if isinstance(rows, (TextRows, TextStream)):
        return rows.head(limit) if limit else rows
    if isinstance(rows, IterableDataset):
        return rows.take(limit) if limit else rows
    return rows.select(range(min(limit or len(rows), len(rows))))


def _renamed(rows: Rows, rename: Mapping[str, str], place: str) -> Rows:
    if not rename:
        return rows
    columns = rows.column_names or list(first_row(rows, place))
    absent = [name for name in rename.values() if name not in columns]
    if absent:
        raise DataError(f"`map`: {place} has no column {', '.join(absent)}.\nIt has: {', '.join(columns)}.")
    if isinstance(rows, (TextRows, TextStream)):
        return replace(rows, rename=rename)
    rows = rows.remove_columns([name for name in rename if name in columns and name not in rename.values()])
    return rows.rename_columns({old: new for new, old in rename.items() if old != new})
