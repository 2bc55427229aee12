"""Writes dpo_cache/__init__.pyi, the signatures that editors and type checkers see: `python -m tests.write_stub`."""

from __future__ import annotations

import builtins
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
    *re.findall(r"\w+", HEADER.split('"""')[2]),
    *dir(builtins),
}  # names that need no import of their own


def stub() -> str:
    """The text of the stub."""
    public, functions = [], []
    others: dict[
        str, tuple[str, Any]
    ] = {}  # names in annotations -> the module that has them, and the object
    for name in dpo_cache.__all__:
        value = getattr(dpo_cache, name)
        if hasattr(value, "__signature__"):  # its options are keyword arguments
            functions.append(f"def {name}{_signature(value)}:\n{_docstring(value)}\n")
            for other in _names_in(value):
                found = inspect.unwrap(value).__globals__.get(other)
                known = others.setdefault(other, (value.__module__, found))
                assert known[1] == found, f"{other} is not the same in {known[0]} and {value.__module__}"
        else:
            public.append(f"from {dpo_cache._MODULE_OF[name]} import {name} as {name}")
    imports = [
        f"from {module} import {name}"
        for name, (module, _) in others.items()
        if name not in dpo_cache.__all__
    ]
    names = "".join(f'    "{name}",\n' for name in dpo_cache.__all__)
    return (
        HEADER
        + "\n".join(sorted(imports) + sorted(public))
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


def _names_in(function: Callable[..., Any]) -> set[str]:
    """The names in the annotations of a function that its module defines or imports."""
    signature = inspect.signature(function)
    texts = [str(entry.annotation) for entry in signature.parameters.values()] + [
        str(signature.return_annotation)
    ]
    texts = [re.sub(r"Literal\[.*?\]", "", text) for text in texts]
    return {name for text in texts for name in re.findall(r"(?<![.\w])[A-Za-z_]\w*", text)} - KNOWN


if __name__ == "__main__":
    STUB.write_text(stub())
