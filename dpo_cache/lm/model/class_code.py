"""The digest of classes that no library holds: those of a caller, or of a checkpoint's own code, in memory.

It covers their files, all that these import from outside of the installed packages, recursively, and what no
file shows: the plain values of class attributes, of variables that a method closes over, of its defaults, and
of the variables of its module that it names. A class that holds anything else has no digest.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import logging
import sys
import types
from collections.abc import Iterable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch

from dpo_cache.errors import ModelError, first_line

LIBRARIES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "dpo_cache")
INSTALLED = {"site-packages", "dist-packages"}  # folders of packages
SCALARS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def class_code_digest(classes: Iterable[type]) -> str | None:
    """Hex sha256 over the classes that no library holds, and their bases; None if there are none.

    Raises `ModelError` for a class whose source cannot be read, or that holds values that have no digest.
    """
    foreign = foreign_classes(classes)
    lines = {f"{kind.__qualname__} {line}" for kind in foreign for line in _source_lines(kind)}
    for kind in foreign:
        facts = json.dumps(_Facts().of_class(kind), sort_keys=True)
        lines.add(f"{kind.__qualname__} {hashlib.sha256(facts.encode()).hexdigest()}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest() if lines else None


def foreign_classes(classes: Iterable[type]) -> set[type]:
    """Those of the classes and of their bases that no library holds."""
    return {one for kind in classes for one in kind.__mro__ if not is_of_library(one.__module__)}


def is_of_library(module: str) -> bool:
    top = module.partition(".")[0]
    return top in LIBRARIES or top == "builtins" or top in sys.stdlib_module_names


def foreign_function(value: Any) -> types.FunctionType | None:
    """The first function that no library holds, in a callable or what it wraps; None if there is none.

    A function belongs to the module in whose variables it runs: `functools.wraps` does not change that.
    """
    waiting, seen = [value], set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, functools.partial):
            waiting += [one.func, *one.args, *one.keywords.values()]
        elif isinstance(one, types.MethodType | staticmethod | classmethod):
            waiting.append(one.__func__)
        elif isinstance(one, property):
            waiting.append(one.fget)
        elif isinstance(one, types.FunctionType):
            if not is_of_library(home_of(one)):
                return one
            waiting += [*_closure(one).values(), getattr(one, "__wrapped__", None)]
    return None


def home_of(function: types.FunctionType) -> str:
    """The name of the module in whose variables a function runs."""
    return str(function.__globals__.get("__name__", ""))


def describe_callable(value: Any) -> Any:
    """A description of the code and values with which a callable computes, JSON-ready. Raises `ModelError`
    where that cannot be described.
    """
    return _Facts().of(value)


def code_files(module: str) -> dict[str, str]:
    """Names of modules -> sha256 of their files: the module, and what it imports from outside of packages."""
    found: dict[str, str] = {}
    own, waiting = module.partition(".")[0], [module]
    while waiting:
        name = waiting.pop()
        path = _find_file(name)
        if name in found or path is None or not (name == module or _is_followed(name, path, own)):
            continue
        content = path.read_bytes()
        found[name] = hashlib.sha256(content).hexdigest()
        waiting += _imported(content, name, is_package=path.name == "__init__.py")
    return found


def _source_lines(kind: type) -> list[str]:
    """Lines for the file of a class and what that imports; without a file, for the class."""
    if getattr(sys.modules.get(kind.__module__), "__file__", None):
        return [f"{_short(name)} {digest}" for name, digest in code_files(kind.__module__).items()]
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError) as error:
        raise ModelError(
            f"{kind.__module__}.{kind.__qualname__}: its source cannot be read ({first_line(error)}), so the "
            "model cannot be identified.\nDefine the class in a file."
        ) from error
    return [hashlib.sha256(source.encode()).hexdigest()]


def _short(module: str) -> str:
    """The name of a module; of a checkpoint's code without the names of the folders that hold it."""
    return module.rpartition(".")[2] if module.startswith("transformers_modules.") else module


def _is_followed(name: str, path: Path, own: str) -> bool:
    """Return whether a file counts that is imported: it belongs to no installed package but the own one."""
    top = name.partition(".")[0]
    return not is_of_library(name) and (top == own or not INSTALLED & set(path.parts))


def _find_file(module: str) -> Path | None:
    """The file of a module, which is not imported for that."""
    loaded = getattr(sys.modules.get(module), "__file__", None)
    if loaded is not None:
        return Path(loaded) if str(loaded).endswith(".py") else None
    folders: Any = None
    origin: str | None = None
    parts = module.split(".")
    try:
        for end in range(1, len(parts) + 1):
            spec = PathFinder.find_spec(".".join(parts[:end]), folders)
            if spec is None:
                return None
            folders, origin = spec.submodule_search_locations, spec.origin
    except (ImportError, ValueError, AttributeError, KeyError):
        return None
    return Path(origin) if origin and origin.endswith(".py") else None


def _imported(content: bytes, module: str, *, is_package: bool) -> Iterator[str]:
    """The modules that a file may import, by their full names."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):  # importing it fails
        return
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - (node.level - 1)] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            yield from [source, *(f"{source}.{alias.name}" for alias in node.names)] if source else ()


def _closure(function: types.FunctionType) -> dict[str, Any]:
    """The variables that a function closes over, without the class that `super()` needs."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # empty
            found[name] = None
    found.pop("__class__", None)
    return found


def _names_in(code: types.CodeType) -> set[str]:
    """The names that code looks up in its module, also in functions inside."""
    inner = [one for one in code.co_consts if isinstance(one, types.CodeType)]
    return {*code.co_names, *(name for one in inner for name in _names_in(one))}


class _Facts:
    """Values -> what can be hashed of them; each class and function once."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def of_class(self, kind: type) -> dict[str, Any]:
        self._seen.add(id(kind))
        return {
            name: self.of(value, f"{kind.__qualname__}.{name}")
            for name, value in sorted(vars(kind).items())
            if not name.startswith(("_abc_", "__")) or isinstance(value, types.FunctionType)
        }

    def of(self, value: Any, place: str = "a function") -> Any:
        """Raises `ModelError` for a value that cannot be described."""
        if isinstance(value, SCALARS):
            return repr(value)
        if isinstance(value, list | tuple):
            return [self.of(one, place) for one in value]
        if isinstance(value, set | frozenset):
            return sorted(json.dumps(self.of(one, place)) for one in value)
        if isinstance(value, dict):
            return sorted(
                [json.dumps(self.of(key, place)), self.of(one, place)] for key, one in value.items()
            )
        if isinstance(value, torch.Tensor) and not value.is_meta:
            content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            return [str(value.dtype), list(value.shape), hashlib.sha256(content.data).hexdigest()]
        if isinstance(value, functools.partial):
            return [self.of(one, place) for one in (value.func, value.args, value.keywords)]
        if isinstance(value, property):
            return self.of(value.fget, place)
        if isinstance(value, types.MethodType | staticmethod | classmethod):
            return self.of(value.__func__, place)
        if isinstance(value, types.FunctionType):
            return self._of_function(value, place)
        if isinstance(value, types.ModuleType):
            return "" if is_of_library(value.__name__) else self._of_code(value.__name__)
        if isinstance(value, type):
            return self._of_type(value)
        if isinstance(value, functools.cached_property):
            return self.of(value.func, place)
        if is_of_library(type(value).__module__) and not getattr(value, "is_meta", False):
            return self._of_library_object(value, place)
        raise ModelError(
            f"{place} holds a {type(value).__module__}.{type(value).__qualname__}, and a model whose code "
            "does so cannot be identified.\nUse plain values there: numbers, texts, lists, tensors."
        )

    def _of_library_object(self, value: Any, place: str) -> Any:
        name = type(value).__qualname__
        if callable(value) and hasattr(value, "__qualname__"):  # a function of C
            return f"{name} {value.__qualname__}"
        if isinstance(value, logging.Logger) or id(value) in self._seen:
            return name
        self._seen.add(id(value))
        text = repr(value)
        return [
            name,
            self.of(vars(value), place) if hasattr(value, "__dict__") else text.partition(" at 0x")[0],
        ]

    def _of_type(self, kind: type) -> Any:
        name = f"{_short(kind.__module__)}.{kind.__qualname__}"
        if is_of_library(kind.__module__) or id(kind) in self._seen:
            return name
        return [name, self._of_code(kind.__module__), self.of_class(kind)]

    def _of_function(self, function: types.FunctionType, place: str) -> Any:
        name = f"{_short(home_of(function))}.{function.__qualname__}"
        if id(function) in self._seen:
            return name
        self._seen.add(id(function))
        if is_of_library(home_of(function)):  # a decorator, say
            inner = [one for one in _closure(function).values() if foreign_function(one) is not None]
            return [name, *(self.of(one, place) for one in inner)]
        named = {
            key: function.__globals__[key]
            for key in sorted(_names_in(function.__code__))
            if key in function.__globals__ and not key.startswith("__")
        }
        return [
            name,
            self._of_code(home_of(function)),
            self.of(_closure(function), f"{function.__qualname__}, a function, in its closure"),
            self.of([function.__defaults__, function.__kwdefaults__], f"{function.__qualname__}, as default"),
            {key: self.of(one) for key, one in named.items() if _is_plain(one) or _is_code(one)},
        ]

    def _of_code(self, module: str) -> list[str]:
        key = hash(("module", module))
        if key in self._seen or not getattr(sys.modules.get(module), "__file__", None):
            return []
        self._seen.add(key)
        return sorted(f"{_short(name)} {digest}" for name, digest in code_files(module).items())


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(_is_plain(one) for pair in value.items() for one in pair)
    return isinstance(value, (*SCALARS, torch.Tensor))


def _is_code(value: Any) -> bool:
    """Return whether it is a function or a class of the caller's."""
    if isinstance(value, type):
        return not is_of_library(value.__module__)
    return isinstance(value, types.FunctionType) and foreign_function(value) is not None
