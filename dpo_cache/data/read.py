"""A data set's name or path -> its splits as `datasets.Dataset`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError

from dpo_cache.errors import DataError, first_line

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def read_dataset(location: str, splits: Sequence[str] = (), limit: int | None = None) -> dict[str, Dataset]:
    """The asked-for splits, cut to their first `limit` rows.

    `location` is a file (.jsonl, .json, .csv, .parquet), a folder of such files, or a Hub id. Without
    `splits`: train, or the only one there is. Raises `DataError`.
    """
    found = _load(location)
    names = list(splits) or _default_split(location, list(found))
    unknown = [name for name in names if name not in found]
    if unknown:
        raise DataError(f"{location}: no split {', '.join(unknown)}.\nIt has: {', '.join(found)}.")
    chosen = {name: found[name] for name in names}
    for name, dataset in chosen.items():
        if not len(dataset):
            raise DataError(f"{location}: split {name} has no rows.")
    return {name: dataset.select(range(min(limit or len(dataset), len(dataset)))) for name, dataset in chosen.items()}


def dataset_name(location: str) -> str:
    """A short name for a data set: its file, folder or repository, in letters that a pair set's name may have."""
    path = Path(location.rstrip("/"))
    stem = path.stem if path.suffix in BUILDERS else path.name
    cleaned = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in stem)
    return cleaned.lstrip(".-")[:128] or "data"


def _load(location: str) -> DatasetDict:
    path = Path(location).expanduser()
    try:
        if path.is_file():
            builder = BUILDERS.get(path.suffix)
            if builder is None:
                raise DataError(f"{location}: files of kind {path.suffix or '(none)'} are not read.\nAccepted: {', '.join(BUILDERS)}.")
            if not path.stat().st_size:
                raise DataError(f"{location}: the file is empty.")
            return _load_file(builder, path, location)
        if not path.exists() and (path.suffix in BUILDERS or location.startswith((".", "/", "~")) or location.count("/") > 1):
            raise DataError(f"{location}: no such file or folder.")
        return load_dataset(str(path) if path.is_dir() else location)
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise DataError(
            f"{location}: not readable ({first_line(cause)}).\nOne JSON object a line, or a list of objects, is expected in JSON."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{location}: cannot be opened ({first_line(error)}).\nGive a local file or folder, or the id of a data set on the Hub."
        ) from error


def _load_file(builder: str, path: Path, location: str) -> DatasetDict:
    prepared = load_dataset_builder(builder, data_files=str(path))
    prepared.download_and_prepare()
    if not prepared.info.splits["train"].num_examples:
        raise DataError(f"{location}: split train has no rows.")
    return DatasetDict(prepared.as_dataset())


def _default_split(location: str, found: list[str]) -> list[str]:
    if "train" in found:
        return ["train"]
    if len(found) == 1:
        return found
    raise DataError(f"{location}: has the splits {', '.join(found)}.\nSay which with --split (it may be repeated).")
