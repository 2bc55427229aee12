"""The weights' files of a checkpoint, in the order and by the rules by which transformers chooses them."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import snapshot_download

from dpo_cache.errors import ModelError, first_line
from dpo_cache.files.locations import is_absolute, is_windows_path
from dpo_cache.lm.model.adapter import CONFIG_FILE
from dpo_cache.lm.model.unchanged import note_files

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.py"]  # the files that a model is read from


def checkpoint_files(
    location: str, *, revision: str | None = None, weights_file: str | None = None
) -> list[Path]:
    """The safetensors files of a local folder or Hub id. Raises `ModelError` where there are none.

    `weights_file` is the config's `transformers_weights`: a file, or an index, in place of the usual ones.
    """
    folder = checkpoint_folder(location, revision)
    if (folder / CONFIG_FILE).is_file():
        raise ModelError(
            f"{location}: holds an adapter, where a base with weights of its own is expected.\n"
            "Merge it into its base (peft)."
        )
    if weights_file is not None:
        chosen: Path | None = _named_file(folder, weights_file)
    else:
        present = [name for name in (WHOLE, INDEX) if (folder / name).is_file()]
        chosen = folder / present[0] if present else None
    # one that appears meanwhile is loaded in place of the other
    note_files([folder / WHOLE, folder / INDEX, *([chosen] if chosen else [])])
    if chosen is None:
        names = []
    elif chosen.name.endswith(".index.json"):
        names = _names_in(chosen)
    else:
        names = [str(chosen.relative_to(folder))]
    missing = [name for name in names if not (folder / name).is_file()]
    if not names or missing:
        raise ModelError(
            f"{location}: {'no safetensors weights' if not names else f'{missing[0]} is missing'}.\n"
            "Pickled checkpoints (.bin) can run code and are not read: load and `save_pretrained` the "
            "model once to convert it."
        )
    return [folder / name for name in names]


def checkpoint_folder(location: str, revision: str | None) -> Path:
    """The folder itself, or that of a Hub model's files, which are fetched if needed. Raises `ModelError`."""
    folder = Path(location)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(location, revision=revision, allow_patterns=PATTERNS))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{location}: no such folder, and the Hub does not have it or cannot be reached."
        ) from error


def _named_file(folder: Path, name: str) -> Path:
    """The file that a config names. Raises `ModelError` unless it is a safetensors file in the folder."""
    path, parts = folder / str(name), Path(str(name)).parts
    is_inside = ".." not in parts and not is_absolute(str(name)) and not is_windows_path(str(name))
    if not is_inside or not path.name.endswith((".safetensors", ".safetensors.index.json")):
        raise ModelError(
            f"{folder / 'config.json'}: transformers_weights is {name!r}; expected a safetensors file, or an "
            "index of some, in the same folder.\nCorrect it, or take it out."
        )
    return path


def _names_in(index: Path) -> list[str]:
    """The names of the files in an index, sorted."""
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        if strange := [name for name in names if not isinstance(name, str)]:
            raise TypeError(f"weight_map holds {strange[0]!r} in place of the name of a file")
        return sorted(names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{index}: not an index of safetensors files ({first_line(error)}).\n"
            "Download or save the model again."
        ) from error
