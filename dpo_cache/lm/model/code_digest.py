"""The digest of a checkpoint's own code, which `trust_remote_code` runs.

It covers the files that `auto_map` names, also that of a config inside, for configs and for models of every
kind, since a causal LM may make its parts by `AutoModel`, and all modules that they import relatively,
recursively. Names of classes and contents count, the name of a file only where another one imports it. Code
for tokenizers and processors does not count. Data files that such code opens by itself, and modules that it
finds in another way than by an import statement or `auto_map`, are not covered.
"""

from __future__ import annotations

import ast
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import cached_file

from dpo_cache.errors import ModelError, first_line
from dpo_cache.lm.model.class_code import code_files, foreign_classes
from dpo_cache.lm.model.unchanged import commit_of, note_files

CAUSAL_LM = "AutoModelForCausalLM"
ENTRIES = ("AutoConfig", CAUSAL_LM)  # the classes that transformers requests to load a causal LM
INERT_ENTRIES = ("Tokenizer", "Processor", "FeatureExtractor")  # in names of classes that make no model


def uses_remote_code(config: PreTrainedConfig, trust_remote_code: bool) -> bool:
    """Return whether the checkpoint's own code makes its model; without trust, transformers' code does."""
    return trust_remote_code and bool(_references(config))


def remote_code_digest(location: str, revision: str | None, config: PreTrainedConfig) -> str:
    """Hex sha256 over the classes and files that make the model. Raises `ModelError` for a missing file."""
    if not _references(config):
        raise ModelError(f"{location}: its auto_map in config.json names no class of a causal LM.")
    lines = []
    for entry, reference in _all_references(config):
        files = _files_of(location, revision, reference, is_needed=entry in ENTRIES)
        first, *imported = files.items()
        lines.append(f"{entry} {reference.rpartition('.')[2]} {first[1]}")
        lines += [f"{name} {digest}" for name, digest in imported]
    return hashlib.sha256("\n".join(sorted(set(lines))).encode()).hexdigest()


def code_options(location: str, config: PreTrainedConfig, trust_remote_code: bool) -> dict[str, Any]:
    """The keywords for transformers that choose the code: whether to run the checkpoint's own, and its commit
    where another repository than that of the weights holds it.
    """
    repositories = {reference.rpartition("--")[0] for reference in _references(config).values()}
    others = sorted(repositories - {"", location})
    commit = commit_of(others[0], None) if others and not os.path.isdir(others[0]) else None
    return {"trust_remote_code": trust_remote_code} | ({"code_revision": commit} if commit else {})


def is_remote_code(
    kind: type, classes: Iterable[type], location: str, revision: str | None, config: PreTrainedConfig
) -> bool:
    """Return whether a class in memory is the causal LM of the checkpoint's code, as that is on disk now, and
    the classes of its modules are of that code, too.
    """
    reference = _references(config).get(CAUSAL_LM, "")
    modules = {one.__module__ for one in foreign_classes(classes)}
    if not reference or not all(module.startswith("transformers_modules.") for module in modules):
        return False
    if reference.rpartition("--")[2] != f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}":
        return False
    known = {
        digest
        for entry, one in _all_references(config)
        for digest in _files_of(location, revision, one, is_needed=entry in ENTRIES).values()
    }
    return all(digest in known for module in modules for digest in code_files(module).values())


def _references(config: PreTrainedConfig) -> dict[str, str]:
    """`file.Class` or `repository--file.Class`, by the class of transformers that requests it first."""
    mapped = _auto_map(getattr(config, "auto_map", None))
    return {entry: mapped[entry] for entry in ENTRIES if entry in mapped}


def _all_references(config: PreTrainedConfig) -> list[tuple[str, str]]:
    """Class of transformers, and what it is to find, for everything of which a model may be made."""
    found = {entry for fields in _configs_in(config.to_dict()) for entry in _auto_map(fields).items()}
    return sorted(
        {(entry, one) for entry, one in found if not entry.endswith(INERT_ENTRIES)}
        | {*_references(config).items()}
    )


def _configs_in(fields: Any) -> Iterator[Any]:
    """Every `auto_map` in a config and in the configs inside."""
    if isinstance(fields, dict):
        yield fields.get("auto_map")
        for name, value in fields.items():
            if name != "auto_map":
                yield from _configs_in(value)


def _auto_map(mapped: Any) -> dict[str, str]:
    """The entries of an `auto_map` that name a class in a file."""
    entries = mapped.items() if isinstance(mapped, dict) else ()
    return {str(entry): one for entry, one in entries if isinstance(one, str) and "." in one}


def _files_of(location: str, revision: str | None, reference: str, *, is_needed: bool) -> dict[str, str]:
    """Path -> sha256 of the file of a class, first, and of what it imports."""
    repository, _, name = reference.rpartition("--")
    is_own = repository in ("", location)
    place, commit = (location, revision) if is_own else (repository, commit_of(repository, None))
    return _digests(place, commit, f"{name.partition('.')[0]}.py", is_needed=is_needed)


def _digests(location: str, revision: str | None, first: str, *, is_needed: bool) -> dict[str, str]:
    """Path -> sha256 of a file of a checkpoint, and of all that it imports from the same checkpoint."""
    found: dict[str, str] = {}
    waiting = [first]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        path = _locate(location, revision, name)
        if path is None:
            if name == first and not is_needed:
                return {first: "missing"}
            if name == first:
                raise ModelError(
                    f"{location}: {name}, which auto_map in its config.json names, is missing.\n"
                    "Download the model again."
                )
            continue  # one of two places where an import may be; if both are empty, importing it fails
        note_files([path])
        content = path.read_bytes()
        found[name] = hashlib.sha256(content).hexdigest()
        waiting += _imported_files(path, content, Path(name).parent)
    return found


def _imported_files(path: Path, content: bytes, folder: Path) -> list[str]:
    """Where the modules may be that a file imports relatively, by paths from the checkpoint's folder."""
    modules = [(1, name) for name in get_relative_imports(path)]  # as transformers finds the files to load
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):  # importing it fails
        return []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [f"{node.module}.{alias.name}" if node.module else alias.name for alias in node.names]
            modules += [(node.level, name) for name in [node.module, *names] if name]
    files = []
    for level, name in modules:
        parts = [*folder.parts[: len(folder.parts) - (level - 1)], *name.split(".")]
        files += ["/".join(parts) + ".py", "/".join([*parts, "__init__.py"])]
    return files


def _locate(location: str, revision: str | None, name: str) -> Path | None:
    if os.path.isdir(location):
        path = Path(location, name)
        return path if path.is_file() else None
    try:
        found = cached_file(
            location,
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError as error:
        raise ModelError(f"{location}: {name} cannot be read ({first_line(error)}).") from error
    return Path(found) if found else None
