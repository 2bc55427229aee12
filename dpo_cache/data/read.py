"""A data set's name or path, or rows that are loaded already -> its splits, whole or as a stream."""

from __future__ import annotations

import glob
import logging
import os
import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_dataset_builder, load_from_disk
from datasets.exceptions import DatasetGenerationError

from dpo_cache.data.undecoded import without_decoding
from dpo_cache.errors import DataError, OptionError, first_line
from dpo_cache.files.locations import check_dataset

JSON = (".jsonl", ".json")
DESCRIPTIONS = (
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "metadata.json",
    "config.json",
)
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
NAME_LETTERS = frozenset(string.ascii_letters + string.digits + "._-")  # of a pair set's name

# raised for damaged data
READ_ERRORS = (pa.ArrowException, DatasetGenerationError, OSError, ValueError)

Rows: TypeAlias = Dataset | IterableDataset


def read_dataset(
    location: str,
    splits: Sequence[str] = (),
    limit: int | None = None,
    *,
    streaming: bool = False,
    rename: Mapping[str, str] | None = None,
) -> dict[str, Rows]:
    """The splits of these names, cut to their first `limit` rows.

    `location` is a file (.jsonl, .json, .csv, .parquet), a folder of such files, or a Hub id. Without
    `splits`: train, or the only one there is. `streaming` reads rows as they are needed, never all of them.
    `rename` gives columns (its values) the names that a format expects (its keys). Raises `DataError`.
    """
    return _choose(_load(location, streaming), location, splits, limit, rename)


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
    found = {str(name): _as_dataset(part, place) for name, part in by_split.items()}
    return _choose(found, place, splits, limit, rename)


def first_row(rows: Rows, place: str) -> dict[str, Any]:
    """The first row. Raises `DataError` if there is none."""
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


def dataset_name(location: str) -> str:
    """The data set's file, folder or repository, with characters that a pair set's name cannot have replaced
    by hyphens.

    Raises `OptionError` where too little of it is left to tell one name from another: `日本` and `中国` would
    both be hyphens.
    """
    path = Path(os.path.abspath(location))  # `.` and `..` have the names of their folders
    stem = path.stem if path.suffix in BUILDERS else path.name
    cleaned = "".join(letter if letter in NAME_LETTERS else "-" for letter in stem).lstrip(".-")[:128]
    has_other_letters = any(letter.isalnum() and not letter.isascii() for letter in stem)
    has_own_letters = any(letter.isalpha() for letter in cleaned)
    if not cleaned.strip("-._") or (has_other_letters and not has_own_letters):
        raise OptionError(
            f"{location}: its name has no letters that the name of a pair set can have (a-z, A-Z).\n"
            "Give the pair set a `name`."
        )
    return cleaned


def _as_dataset(rows: Any, place: str) -> Rows:
    if isinstance(rows, (Dataset, IterableDataset)):
        is_formatted = isinstance(rows, Dataset) and rows.format["type"] not in (None, "custom")
        return rows.with_format(None) if is_formatted else rows
    kind = f"{type(rows).__module__.partition('.')[0]}.{type(rows).__name__}"
    try:
        if kind == "pandas.DataFrame":
            return Dataset.from_pandas(rows, preserve_index=False)
        if kind == "polars.DataFrame":
            return Dataset.from_polars(rows)
        if isinstance(rows, pa.Table):
            return Dataset(rows)
        if isinstance(rows, Sequence) and all(isinstance(row, Mapping) for row in rows):
            columns = dict.fromkeys(name for row in rows for name in row)
            return Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns})
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise DataError(
            f"{place}: the rows make no table ({first_line(error)}).\nGive each column values of one type."
        ) from error
    raise DataError(
        f"{place}: a {type(rows).__name__} is not read.\nGive a datasets.Dataset, DatasetDict or "
        "IterableDataset, a list of dicts, a pandas or polars DataFrame, or a path."
    )


def _choose(
    found: Mapping[str, Rows],
    location: str,
    splits: Sequence[str],
    limit: int | None,
    rename: Mapping[str, str] | None,
) -> dict[str, Rows]:
    """The splits of these names, each cut to its first rows, with its columns renamed."""
    names = list(splits) or _default_split(location, list(found))
    unknown = [name for name in names if name not in found]
    if unknown:
        raise DataError(f"{location}: no split {', '.join(unknown)}.\nIt has: {', '.join(found)}.")
    return {
        name: _renamed(_cut(without_decoding(found[name]), limit), rename or {}, f"{location}: split {name}")
        for name in names
    }


def _load(location: str, streaming: bool) -> Mapping[str, Rows]:
    path = Path(location).expanduser()
    try:
        check_dataset(location)
        with _no_second_report():
            if path.is_file():
                return _load_file(BUILDERS[path.suffix.lower()], path, location, streaming)
            if path.is_dir():
                return _load_folder(path, streaming)
            return load_dataset(location, streaming=streaming)
    except DatasetGenerationError as error:
        hint = (
            "One JSON object a line, or a list of objects, is expected in JSON."
            if path.suffix.lower() in JSON
            else "Repair the file and run again."
        )
        raise DataError(
            f"{location}: not readable ({first_line(error.__cause__ or error)}).\n{hint}"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{location}: cannot be opened ({first_line(error)}).\n"
            "Give a local file or folder, or the id of a data set on the Hub."
        ) from error


@contextmanager
def _no_second_report() -> Iterator[None]:
    """While open, the builders of `datasets` do not log the error that they also raise."""

    def is_kept(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Failed to ")

    loggers = [logging.getLogger(name) for name in [*logging.root.manager.loggerDict] if _is_builder(name)]
    for logger in loggers:
        logger.addFilter(is_kept)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_kept)


def _is_builder(name: str) -> bool:
    return name.startswith("datasets.packaged_modules.")


def _load_file(builder: str, path: Path, location: str, streaming: bool) -> Mapping[str, Rows]:
    if builder == "parquet" and not pq.read_metadata(path).num_rows:
        raise DataError(f"{location}: split train has no rows.")
    options: dict[str, Any] = {"data_files": glob.escape(str(path))}
    if builder == "csv":
        options["keep_default_na"] = False  # an answer may be the word None
    if streaming:
        return load_dataset(builder, streaming=True, **options)
    prepared = load_dataset_builder(builder, **options)
    prepared.download_and_prepare()
    if not prepared.info.splits["train"].num_examples:
        raise DataError(f"{location}: split train has no rows.")
    return DatasetDict(prepared.as_dataset())


def _load_folder(path: Path, streaming: bool) -> Mapping[str, Rows]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():  # written by `save_to_disk`
        saved = load_from_disk(str(path))
        return saved if isinstance(saved, DatasetDict) else {"train": saved}
    if glob.has_magic(str(path)):
        raise DataError(
            f"{path}: a folder's name with *, ? or [ would be taken for a pattern.\n"
            "Rename it, or give one file."
        )
    kinds = {
        file.suffix.lower()
        for file in path.rglob("*")
        if file.suffix.lower() in BUILDERS and file.name not in DESCRIPTIONS
    }
    if len({BUILDERS[kind] for kind in kinds}) > 1:
        raise DataError(
            f"{path}: holds files of several kinds ({', '.join(sorted(kinds))}), of which only one would "
            "be read.\nGive one file, or put them in folders of their own."
        )
    return load_dataset(str(path), streaming=streaming)


def _default_split(location: str, found: list[str]) -> list[str]:
    if "train" in found:
        return ["train"]
    if len(found) == 1:
        return found
    raise DataError(f"{location}: has the splits {', '.join(found)}.\nName one or more with `split`.")


def _cut(rows: Rows, limit: int | None) -> Rows:
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
    rows = rows.remove_columns([name for name in rename if name in columns and name not in rename.values()])
    return rows.rename_columns({old: new for new, old in rename.items() if old != new})
