"""The library names options by their keywords: flags occur only in whole shell commands."""

import ast
import re
from pathlib import Path

import dpo_cache

PACKAGE = Path(dpo_cache.__file__).parent
WITH_FLAGS = {"cli", "options"}
TABLES = {PACKAGE / "losses" / "table.py"}  # the help and the flags of loss settings
COMMAND = re.compile(r"`(?:dpo-cache|pip|ray) [^`]*`?")
FLAG = re.compile(r"(?<![\w-])--[a-z]")


def messages(path: Path) -> list[tuple[int, str]]:
    """Line and text of each string with words in it, without docstrings; `…` stands for inserted values."""
    tree = ast.parse(path.read_text())
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            pieces = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
            found.append((node.lineno, "".join(map(str, pieces))))
        elif isinstance(node, ast.Constant) and id(node) not in parts | docstrings:
            found.append((node.lineno, str(node.value)))
    return [(line, text) for line, text in found if " " in text]


def test_no_message_of_the_library_has_a_flag_outside_a_command() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path not in TABLES]
    library = [path for path in files if path.relative_to(PACKAGE).parts[0] not in WITH_FLAGS]
    assert len(library) > 100
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line}: {text}"
        for path in library
        for line, text in messages(path)
        if FLAG.search(COMMAND.sub("", text))
    ]
    assert not wrong, "\n".join(wrong)


def test_flags_in_messages_are_found(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        '"""Doc with --flag."""\nraise E(f"{x}: use `--model M`")\nraise E("run `dpo-cache ls --json` now")\n'
    )
    assert messages(path) == [(2, "…: use `--model M`"), (3, "run `dpo-cache ls --json` now")]
    assert [bool(FLAG.search(COMMAND.sub("", text))) for _, text in messages(path)] == [True, False]
