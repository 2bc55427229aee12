"""docs/troubleshooting.md has a section for every class of error, and quotes messages that the code has."""

from __future__ import annotations

import ast
import inspect
import re
from functools import cache
from pathlib import Path

import pytest

import dpo_cache
from dpo_cache import errors
from dpo_cache.cli.app import COMMANDS
from dpo_cache.cli.output import option_names, with_flags

PACKAGE = Path(dpo_cache.__file__).parent
PAGE = (PACKAGE.parent / "docs" / "troubleshooting.md").read_text()
CLASSES = [
    name
    for name, found in inspect.getmembers(errors, inspect.isclass)
    if issubclass(found, errors.DpoCacheError) and found.__module__ == errors.__name__
]


def rows_below(heading: str) -> list[list[str]]:
    """The rows of the table of a section: its cells."""
    section = re.search(rf"^#+ `?{heading}`?\n(.*?)(?=^#|\Z)", PAGE, re.M | re.S)
    assert section, f"there is no section {heading}"
    lines = [line for line in section[1].splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@cache
def texts_of_the_code() -> list[str]:
    """Every text in the package, with flags as the command line shows them, and `\\0` for what is filled in."""

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(map(text, node.values))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return text(node.left) + text(node.right)
        return "\0"

    found = {
        text(node)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp))
    }
    assert COMMANDS  # whose options `with_flags` knows
    return [with_flags(one) for one in found if len(one) > 5]


def quoted_messages() -> list[str]:
    sections = [*CLASSES, "Remarks"]
    return [
        quote for name in sections for row in rows_below(name) for quote in re.findall(r"^`([^`]+)`", row[0])
    ]


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_of_error_has_causes_and_cures(name: str) -> None:
    rows = rows_below(name)
    assert rows and all(len(row) == 3 and all(row) for row in rows), rows
    assert hasattr(dpo_cache, name)


def test_every_section_is_a_class() -> None:
    assert sorted(re.findall(r"^### `(\w+)`", PAGE, re.M)) == sorted(CLASSES)


def test_flags_and_extras_exist() -> None:
    """The flags that cures name are options, and the extras to install are those of the package."""
    assert COMMANDS
    flags = {f"--{name.replace('_', '-')}" for name in option_names()} | {"--json", "--verbose", "--version"}
    for code in re.findall(r"`([^`]+)`", PAGE):
        if not code.startswith(("pip ", "python ", "cp ", "iconv ")):
            assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", code)) <= flags, code
    (extras,) = re.findall(r"the extras are (.*?) \|", PAGE)
    project = (PACKAGE.parent / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    assert {*re.findall(r"`(\w+)`", extras)} <= {*re.findall(r"^(\w+) = \[", project, re.M)}


@pytest.mark.parametrize("quote", quoted_messages())
def test_a_quoted_message_is_in_the_code(quote: str) -> None:
    parts = [part.strip() for part in quote.split("…") if part.strip()]
    assert sum(map(len, parts)) >= 11, "too short to be recognised"
    pattern = re.compile(".*".join(map(re.escape, parts)), re.S)
    assert any(pattern.search(text) for text in texts_of_the_code()), f"no message of the code reads {quote}"
