"""The digest of a model's own code, where it brings some: `trust_remote_code`, or a class of the caller's.

Of a checkpoint, it covers the files that `auto_map` names for the config and the causal LM, and all modules
that they import relatively, recursively. Data files that such code opens by itself are not covered.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import sys
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import cached_file

from dpo_cache.errors import ModelError, first_line
from dpo_cache.lm.model.unchanged import commit_of, note_files

ENTRIES = ("AutoConfig", "AutoModelForCausalLM")
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes")


def uses_remote_code(config: PreTrainedConfig, trust_remote_code: bool) -> bool:
    """Whether the checkpoint's own code makes its model; without trust, transformers' code does."""
    return trust_remote_code and bool(_references(config))


def remote_code_digest(location: str, revision: str | None, config: PreTrainedConfig) -> str:
    """Hex sha256 over the classes and files that make the model. Raises `ModelError` for a missing file."""
    lines = []
    for entry, reference in _references(config).items():
        repository, _, name = reference.rpartition("--")
        is_own = repository in ("", location)
        place = location if is_own else repository
        commit = revision if is_own else commit_of(repository, None)
        lines.append(f"{entry} {name}")
        lines += _file_lines(place, commit, f"{name.partition('.')[0]}.py")
    if not lines:
        raise ModelError(f"{location}: its auto_map in config.json names no class of a causal LM.")
    return hashlib.sha256("\n".join(sorted(set(lines))).encode()).hexdigest()


def remote_code_revision(location: str, config: PreTrainedConfig) -> str | None:
    """The commit of the code, where another repository than that of the weights holds it."""
    repositories = {reference.rpartition("--")[0] for reference in _references(config).values()}
    others = sorted(repositories - {"", location})
    return commit_of(others[0], None) if others and not os.path.isdir(others[0]) else None


def is_remote_code(kind: type, location: str, revision: str | None, config: PreTrainedConfig) -> bool:
    """Whether a class in memory is the causal LM of the checkpoint's code, as that is on disk now."""
    reference = _references(config).get("AutoModelForCausalLM", "")
    repository, _, name = reference.rpartition("--")
    if not kind.__module__.startswith("transformers_modules.") or not reference:
        return False
    if name != f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}":
        return False
    is_own = repository in ("", location)
    place, commit = (location, revision) if is_own else (repository, commit_of(repository, None))
    return _file_lines(place, commit, f"{name.partition('.')[0]}.py") == _lines_of_module(kind.__module__)


def class_code_digest(classes: set[type]) -> str | None:
    """Hex sha256 over the source of the classes that no library holds; None if there are none.

    Raises `ModelError` for a class whose source cannot be read.
    """
    foreign = {one for kind in classes for one in kind.__mro__ if not _is_of_library(one)}
    lines = {f"{one.__qualname__} {line}" for one in foreign for line in _source_lines(one)}
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest() if lines else None


def _source_lines(kind: type) -> list[str]:
    """Lines for the file of a class and what that imports relatively; without a file, for the class."""
    if getattr(sys.modules.get(kind.__module__), "__file__", None):
        return _lines_of_module(kind.__module__)
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError) as error:
        raise ModelError(
            f"{kind.__module__}.{kind.__qualname__}: its source cannot be read ({first_line(error)}), so the "
            "model cannot be identified.\nDefine the class in a file."
        ) from error
    return [hashlib.sha256(source.encode()).hexdigest()]


def _lines_of_module(module: str) -> list[str]:
    path = Path(str(sys.modules[module].__file__))
    return _file_lines(str(path.parent), None, path.name)


def _references(config: PreTrainedConfig) -> dict[str, str]:
    """`file.Class` or `repository--file.Class`, by the class of transformers that asks for it."""
    mapped = getattr(config, "auto_map", None) or {}
    return {entry: mapped[entry] for entry in ENTRIES if isinstance(mapped.get(entry), str)}


def _is_of_library(kind: type) -> bool:
    return kind.__module__ == "builtins" or kind.__module__.partition(".")[0] in (
        *LIBRARIES,
        *sys.stdlib_module_names,
    )


def _file_lines(location: str, revision: str | None, first: str) -> list[str]:
    """`path sha256` for a file of a checkpoint, and for all that it imports from the same checkpoint."""
    found: dict[str, str] = {}
    waiting = [first]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        path = _locate(location, revision, name)
        if path is None:
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
    return [f"{name} {digest}" for name, digest in found.items()]


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
