"""Check paths before anything is loaded: models, data sets and outputs. Names on the Hub pass unchecked."""

from __future__ import annotations

import glob
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath

from dpo_cache.errors import DataError, DpoCacheError, ModelError, OptionError, StorageError
from dpo_cache.files.atomic import refused_writes

DATA_KINDS = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".arrow": "arrow",
}  # fmt: skip
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # endings of compressed text files
MODEL_FILES = ("config.json", "adapter_config.json")
TOKENIZER_FILES = ("tokenizer_config.json", "config.json")  # the first that is there names the class
TOKENIZER_PATTERNS = ("*token*", "*vocab*", "*merges*", "*.model", "config.json")  # of files of a tokenizer


def is_path(location: str) -> bool:
    """Return whether the text is a path in any case: names on the Hub are NAME or OWNER/NAME."""
    return location.startswith((".", "/", "~")) or location.count("/") > 1 or is_windows_path(location)


def is_windows_path(location: str) -> bool:
    """Return whether the text can only be a path of Windows: with a drive or a backslash."""
    return "\\" in location or bool(PureWindowsPath(location).drive)


def is_absolute(location: str) -> bool:
    """Return whether the text is an absolute path, here or on another system."""
    return os.path.isabs(location) or PureWindowsPath(location).is_absolute() or location.startswith("/")


def is_url(text: str) -> bool:
    """Return whether the text has a scheme; one letter before `://` is a drive of Windows."""
    return len(text.partition("://")[0]) > 1 if "://" in text else False


def check_model(location: str) -> None:
    """Raise `ModelError` for a path without a model or an adapter, and for a config that is not JSON."""
    folder = Path(location)
    if folder.is_dir():
        present = [folder / name for name in MODEL_FILES if (folder / name).is_file()]
        problem = next(filter(None, map(json_problem, present)), "") if present else "no config.json in it"
    elif folder.exists():
        problem = "not a folder"
    else:
        problem = "no such folder" if is_path(location) else ""
    if problem:
        raise ModelError(
            f"{location}: no model can be loaded from it ({problem}).\n"
            "Give a local folder with config.json, or a Hub id."
        )


def check_revision(location: str, revision: str | None) -> None:
    """Raise `OptionError` for a revision of a local folder, which has none."""
    if revision is not None and Path(location).is_dir():
        raise OptionError(
            f"`revision` {revision}: {location} is a local folder, and only models of the Hub have one.\n"
            "Leave it out, or give a Hub id."
        )


def check_tokenizer(location: str) -> None:
    """Raise `ModelError` for a path that does not exist, and for a config that is not JSON."""
    folder, problem = Path(location), ""
    if folder.is_dir():
        present = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
        problem = json_problem(present[0]) if present else ""
        if not any(next(folder.glob(pattern), None) for pattern in TOKENIZER_PATTERNS):
            problem = "no files of a tokenizer in it"
    elif folder.is_file():
        problem = "not a folder"
    elif is_path(location) and not folder.exists():
        problem = "no such folder"
    if problem:
        raise ModelError(
            f"{location}: no tokenizer can be loaded from it ({problem}).\n"
            "Give a folder with a tokenizer, or a Hub id, as `tokenizer`."
        )


def check_peft_config(location: str) -> None:
    """Raise `OptionError` for a file that is no PEFT config; PEFT itself checks its fields."""
    path, problem = Path(location), "no such file"
    if path.is_file():
        problem = json_problem(path) or (
            "" if "peft_type" in json.loads(path.read_bytes()) else "no peft_type"
        )
    if problem:
        raise OptionError(
            f"`peft_config` {location}: no PEFT config can be read from it ({problem}).\n"
            "Give a file like adapter_config.json."
        )


def json_problem(path: Path) -> str:
    """Why a file is not a JSON object; empty if it is one."""
    try:
        is_object = isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    except (ValueError, RecursionError):
        return f"{path.name} is not JSON"
    return "" if is_object else f"{path.name} is not a JSON object"


def data_suffix(name: str) -> str:
    """The ending by which the kind of a data file is known: `.jsonl` of `a.jsonl` and `a.JSONL.gz`; empty if
    no such files are read.
    """
    path = Path(name.lower())
    is_compressed = path.suffix in COMPRESSED
    suffix = path.with_suffix("").suffix if is_compressed else path.suffix
    is_read = suffix in DATA_KINDS and not (is_compressed and DATA_KINDS[suffix] in ("parquet", "arrow"))
    return suffix if is_read else ""


def expanded(location: str) -> Path:
    """The path with the home folder in place of `~`; as it is for a user that does not exist."""
    return Path(os.path.expanduser(location))  # noqa: PTH111  (pathlib raises there)


def data_files(location: str) -> list[str]:
    """The files that a path or a pattern such as `data/*.jsonl` names; none for a folder or a Hub id."""
    path = expanded(location)
    if path.exists() or not glob.has_magic(location):
        return [str(path)] if path.is_file() else []
    return sorted(file for file in glob.glob(str(path), recursive=True) if Path(file).is_file())  # noqa: PTH207


def check_dataset(location: str | Sequence[str]) -> None:
    """Raise `DataError` for a path that does not exist, for a file that is empty or of another kind, and for
    files of different kinds.
    """
    locations = [location] if isinstance(location, str) else list(location)
    found = [path for one in locations for path in _check_location(one, is_only=len(locations) == 1)]
    kinds = {DATA_KINDS[data_suffix(path)]: path for path in reversed(found)}
    if len(kinds) > 1:
        raise DataError(
            f"{', '.join(reversed(kinds.values()))}: files of several kinds cannot be read as one data set.\n"
            "Give files of one kind."
        )


def _check_location(location: str, *, is_only: bool) -> list[str]:
    """The files that it names. Raises `DataError`."""
    files, path = data_files(location), expanded(location)
    for file in files:
        if not data_suffix(file):
            name = location if len(files) == 1 else file
            suffix = Path(file).suffix
            kind = f"files of kind {suffix} are not read" if suffix else "its name has no ending"
            raise DataError(
                f"{name}: {kind}.\nAccepted: {', '.join(DATA_KINDS)}; text also with {', '.join(COMPRESSED)}."
            )
        if not Path(file).stat().st_size:
            raise DataError(f"{location if len(files) == 1 else file}: the file is empty.")
    if files or (is_only and path.is_dir()):
        return files
    if path.is_dir():
        raise DataError(f"{location}: is a folder, which cannot be one of several data sets.\nGive files.")
    if glob.has_magic(location):
        raise DataError(f"{location}: no file matches this pattern.")
    if is_path(location) or data_suffix(location) or not is_only:
        raise DataError(f"{location}: no such file or folder.")
    return []


def check_output(output: str, kind: str, *, overwrite: bool) -> None:
    """Raise `OptionError` where something is at the output that may not be replaced, and for a URL;
    `StorageError` where nothing can be written.
    """
    check_no_url(output)
    target = Path(output).expanduser()
    check_writable(target)
    if not target.exists():
        return
    if not overwrite:
        raise OptionError(
            f"{target} is there already.\nChoose another output, or replace it with `overwrite`."
        )
    is_ours = (target / "state.json").is_file() if kind == "datasets" else target.is_file()
    if not is_ours:
        found = "a folder" if target.is_dir() else "a file"
        raise OptionError(
            f"{target}: is {found}, which output in the format {kind} is not; it is not replaced.\n"
            "Choose another output."
        )


def check_no_url(output: str) -> None:
    """Raise `OptionError` for an output that is a URL, which would be a folder of that name here."""
    if is_url(output):
        raise OptionError(f"`output` {output}: expected a path, found a URL.\nOnly caches may be at a URL.")


def check_writable(
    target: Path,
    kind: type[DpoCacheError] = StorageError,
    advice: str = "Or choose another `output`.",
    *,
    is_folder: bool = False,
) -> None:
    """Make a folder where the target would be, or in a target that is a folder, as a test, and remove it.

    Raises an error of this kind, with the advice, where the file system refuses.
    """
    with refused_writes(target, kind, advice):
        inside = target.absolute() / "_" if is_folder else target.absolute()
        existing = next(folder for folder in inside.parents if folder.exists())
        probe = existing / f".{secrets.token_hex(8)}.tmp"
        probe.mkdir()
        probe.rmdir()
