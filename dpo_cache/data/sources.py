"""A data set's location -> its splits: text files that we read, or tables that `datasets` reads."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

import pyarrow.parquet as pq
from datasets import (
    Dataset,
    DatasetBuilder,
    DatasetDict,
    IterableDataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.json.json import Json

from dpo_cache.data.text_files import TextFiles, kept_in
from dpo_cache.errors import DataError, first_line
from dpo_cache.files.atomic import write_whole
from dpo_cache.files.locations import DATA_KINDS, check_dataset, data_files, data_suffix, expanded

# next to the data in a folder
DESCRIPTIONS = (
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "metadata.json",
    "config.json",
)
TEXT_KINDS = ("json", "csv")

Sources: TypeAlias = Mapping[str, TextFiles | Dataset | IterableDataset]


def open_location(location: str | Sequence[str], streaming: bool) -> Sources:
    """The splits of a file, a pattern or several of these (train), of a folder, or of a Hub id.

    Raises `DataError`.
    """
    check_dataset(location)
    locations = [location] if isinstance(location, str) else list(location)
    shown = ", ".join(locations)
    files = [path for one in locations for path in data_files(one)]
    path = expanded(locations[0])
    try:
        with _no_second_report():
            if files:
                return _open_files(files, shown, streaming)
            if path.is_dir():
                return _open_folder(path, streaming)
            return _open_hub(locations[0], streaming)
    except DatasetGenerationError as error:
        raise DataError(
            f"{shown}: not readable ({first_line(error.__cause__ or error)}).\nRepair the file and run again."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{shown}: cannot be opened ({first_line(error)}).\n"
            "Give a local file or folder, or the id of a data set on the Hub."
        ) from error


def _open_files(paths: list[str], shown: str, streaming: bool) -> Sources:
    kind = DATA_KINDS[data_suffix(paths[0])]
    if kind in TEXT_KINDS:
        is_tabbed = all(data_suffix(path) == ".tsv" for path in paths)
        return {"train": TextFiles(kind, tuple(paths), "\t" if is_tabbed else None)}
    if kind == "parquet" and not any(pq.read_metadata(path).num_rows for path in paths):
        raise DataError(f"{shown}: split train has no rows.")
    prepared = load_dataset_builder(kind, data_files=[glob.escape(path) for path in paths])
    if streaming:
        return prepared.as_streaming_dataset()
    prepared.download_and_prepare()
    if not prepared.info.splits["train"].num_examples:
        raise DataError(f"{shown}: split train has no rows.")
    return DatasetDict(prepared.as_dataset())


def _open_folder(path: Path, streaming: bool) -> Sources:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():  # written by `save_to_disk`
        saved = load_from_disk(str(path))
        return saved if isinstance(saved, DatasetDict) else {"train": saved}
    if glob.has_magic(str(path)):
        raise DataError(
            f"{path}: a folder's name with *, ? or [ would be taken for a pattern.\n"
            "Rename it, or give one file."
        )
    kinds = {
        suffix
        for file in path.rglob("*")
        if (suffix := data_suffix(file.name)) and file.name not in DESCRIPTIONS
    }
    if len({DATA_KINDS[kind] for kind in kinds}) > 1:
        raise DataError(
            f"{path}: holds files of several kinds ({', '.join(sorted(kinds))}), of which only one would "
            "be read.\nGive one file, or put them in folders of their own."
        )
    return _open_builder(load_dataset_builder(str(path)), streaming)


def _open_hub(location: str, streaming: bool) -> Sources:
    """The splits on the Hub. Text files that were listed before are known without a network, too."""
    record = Path(kept_in(), "hub", f"{hashlib.sha256(location.encode()).hexdigest()[:32]}.json")
    try:
        found = _open_builder(load_dataset_builder(location), streaming)
    except OSError:
        with suppress(OSError, ValueError, TypeError, KeyError):
            listed = json.loads(record.read_text(encoding="utf-8"))
            return {
                split: TextFiles(kind, tuple(paths), mark) for split, (kind, paths, mark) in listed.items()
            }
        raise
    if all(isinstance(source, TextFiles) for source in found.values()):
        listed = {split: [one.kind, one.paths, one.delimiter] for split, one in found.items()}  # type: ignore[union-attr]
        with suppress(OSError):
            record.parent.mkdir(parents=True, exist_ok=True)
            write_whole(record, json.dumps(listed), is_shared=True)
    return found


def _open_builder(builder: DatasetBuilder, streaming: bool) -> Sources:
    """The splits that `datasets` found: text files for us to read, or its own tables."""
    if isinstance(builder, (Json, Csv)) and not getattr(builder.config, "field", None):
        kind = "json" if isinstance(builder, Json) else "csv"
        is_csv_of_comma = kind == "csv" and builder.config.sep == ","
        delimiter = builder.config.sep if kind == "csv" and not is_csv_of_comma else None
        return {
            str(split): TextFiles(kind, tuple(map(str, paths)), delimiter)
            for split, paths in builder.config.data_files.items()
        }
    if streaming:
        return builder.as_streaming_dataset()
    builder.download_and_prepare()
    return builder.as_dataset()


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
