"""Writes dpo_cache/__init__.pyi, the signatures that editors and type checkers see: `python -m tests.write_stub`."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dpo_cache

STUB = Path(dpo_cache.__file__).with_suffix(".pyi")
HEADER = '''"""Signatures of the public names. Written by `python -m tests.write_stub`; do not edit."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

'''
KNOWN = {
    "os",
    "Callable",
    "Iterator",
    "Sequence",
    "Path",
    "Any",
    "Literal",
    "None",
    "bool",
    "float",
    "int",
    "list",
    "str",
    "dict",
}


def stub() -> str:
    """The text of the stub."""
    imports, functions = [], []
    for name in dpo_cache.__all__:
        value = getattr(dpo_cache, name)
        if hasattr(value, "__signature__"):  # its options are keyword arguments
            functions.append(f"def {name}{_signature(value)}:\n{_docstring(value)}\n    ...\n")
            imports += _names_in(value)
        else:
            imports.append(f"from {dpo_cache._MODULE_OF[name]} import {name} as {name}")
    names = "".join(f'    "{name}",\n' for name in dpo_cache.__all__)
    return (
        HEADER
        + "\n".join(sorted(set(imports)))
        + f"\n\n__version__: str\n__all__ = [\n{names}]\n\n"
        + "\n".join(functions)
    )


def _signature(function: Callable[..., Any]) -> str:
    """The signature, one parameter a line."""
    signature = inspect.signature(function)
    lines, is_keyword = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not is_keyword:
            lines.append("*")
            is_keyword = True
        default = "" if parameter.default is inspect.Parameter.empty else f" = {parameter.default!r}"
        lines.append(f"{parameter.name}: {parameter.annotation}{default}")
    return "(\n" + "".join(f"    {line},\n" for line in lines) + f") -> {signature.return_annotation}"


def _docstring(function: Callable[..., Any]) -> str:
    """The docstring without the list of options, which the signature has."""
    text = str(inspect.getdoc(function)).partition("\n\nOptions:\n")[0]
    return textwrap.indent(f'"""{text}\n"""', 4 * " ")


def _names_in(function: Callable[..., Any]) -> list[str]:
    """Imports of the names in the annotations of a function, from the module that defines it."""
    signature = inspect.signature(function)
    annotations = [
        str(signature.return_annotation),
        *(re.sub(r'"[^"]*"', "", str(parameter.annotation)) for parameter in signature.parameters.values()),
    ]
    names = {name for text in annotations for name in re.findall(r"(?<![.\w])[A-Za-z_]\w*", text)}
    return [f"from {function.__module__} import {name} as {name}" for name in names - KNOWN]


if __name__ == "__main__":
    STUB.write_text(stub())
