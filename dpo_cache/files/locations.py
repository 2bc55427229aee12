"""Check paths before anything is loaded: models, data sets and outputs. Names on the Hub pass unchecked."""

from __future__ import annotations

from pathlib import Path

from dpo_cache.errors import DataError, ModelError, OptionError

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
MODEL_FILES = ("config.json", "adapter_config.json")


def is_path(location: str) -> bool:
    """Whether the text is a path in any case: names on the Hub are NAME or OWNER/NAME."""
    return location.startswith((".", "/", "~")) or location.count("/") > 1 or Path(location).is_absolute()


def check_model(location: str) -> None:
    """Raise `ModelError` for a path without a model or an adapter."""
    folder = Path(location)
    if folder.is_dir():
        problem = "" if any((folder / name).is_file() for name in MODEL_FILES) else "no config.json in it"
    elif folder.exists():
        problem = "not a folder"
    else:
        problem = "no such folder" if is_path(location) else ""
    if problem:
        raise ModelError(
            f"{location}: no model can be loaded from it ({problem}).\n"
            "Give a local folder with config.json, or a Hub id."
        )


def check_tokenizer(location: str) -> None:
    """Raise `ModelError` for a path that does not exist."""
    if is_path(location) and not Path(location).exists():
        raise ModelError(
            f"{location}: no tokenizer can be loaded from it (no such folder).\n"
            "Say where it is with `tokenizer`."
        )


def check_dataset(location: str) -> None:
    """Raise `DataError` for a path that does not exist, and for a file that is empty or of another kind."""
    path = Path(location).expanduser()
    if path.is_file():
        if path.suffix.lower() not in DATA_SUFFIXES:
            raise DataError(
                f"{location}: files of kind {path.suffix or '(none)'} are not read.\n"
                f"Accepted: {', '.join(DATA_SUFFIXES)}."
            )
        if not path.stat().st_size:
            raise DataError(f"{location}: the file is empty.")
    elif not path.exists() and (is_path(location) or path.suffix in DATA_SUFFIXES):
        raise DataError(f"{location}: no such file or folder.")


def check_output(output: str, kind: str, *, overwrite: bool) -> None:
    """Raise `OptionError` where something is at the output that may not be replaced."""
    target = Path(output).expanduser()
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
