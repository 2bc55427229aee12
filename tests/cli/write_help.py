"""Writes what the docs say of options: `python -m tests.cli.write_help`.

A page `docs/commands/<command>.md` holds one fenced block that begins with `$ dpo-cache <command> --help`;
what follows in that block is replaced by what the command prints, 100 columns wide and without colours.
`docs/options.md` is written whole, from the option classes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import Field
from pathlib import Path
from typing import Any

import dpo_cache
from dpo_cache.options.base import flag_of, sections
from dpo_cache.options.evaluate import EvalOptions
from dpo_cache.options.precompute import PrecomputeOptions
from dpo_cache.options.train import TrainOptions
from tests.losses import write_table

DOCS = Path(dpo_cache.__file__).parents[1] / "docs"
PAGES = DOCS / "commands"
WIDTH = 100

_PRINT_HELPS = """
import json
from typer.testing import CliRunner
from dpo_cache.cli.app import app, COMMANDS
helps = {name: CliRunner().invoke(app, [name, "--help"], prog_name="dpo-cache").stdout for name in COMMANDS}
print(json.dumps(helps))
"""


def read_helps() -> dict[str, str]:
    """The help text of every registered command, by its name."""
    # read by typer when it is imported, so a process of its own
    environment = {
        **os.environ,
        "COLUMNS": str(WIDTH),
        "TERMINAL_WIDTH": str(WIDTH),
        "NO_COLOR": "1",
        "_TYPER_FORCE_DISABLE_TERMINAL": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", _PRINT_HELPS], env=environment, capture_output=True, text=True, check=True
    )
    return {
        name: "\n".join(line.rstrip() for line in text.strip("\n").splitlines()).strip("\n")
        for name, text in json.loads(done.stdout).items()
    }


def help_block(name: str, text: str) -> str:
    """The fenced block of a page."""
    return f"```console\n$ dpo-cache {name} --help\n{text}\n```"


def with_help(page: str, name: str, text: str) -> str:
    """The page with its help block renewed. Raises `ValueError` where it has none."""
    block = re.compile(rf"```console\n\$ dpo-cache {re.escape(name)} --help\n(?:.*?\n)??```", re.DOTALL)
    renewed, found = block.subn(lambda _: help_block(name, text), page)
    if found != 1:
        raise ValueError(
            f"docs/commands/{name}.md: expected one fenced block that begins with `$ dpo-cache {name} "
            f"--help`, found {found}"
        )
    return renewed


def options_page() -> str:
    """`docs/options.md`: a table for each part of each command's help."""
    lines = [
        "# Options",
        "",
        "As flags of the command line; the Python functions take the same names, with `_` for `-`, as "
        "keyword arguments.",
    ]
    for command, options in (
        ("precompute", PrecomputeOptions),
        ("train", TrainOptions),
        ("eval", EvalOptions),
    ):
        lines += ["", f"## {command}"]
        for title, entries in sections(options).items():
            lines += [*(["", f"### {title}"] if title else []), *_TABLE, *map(_row, entries)]
    return "\n".join(lines) + "\n"


_TABLE = ("", "| option | default | |", "|---|---|---|")


def _row(entry: Field[Any]) -> str:
    flag = entry.metadata["flag"] if "/" in entry.metadata["flag"] else flag_of(entry)
    choices = "\\|".join(entry.metadata["choices"])
    default = entry.default
    if entry.metadata["required"]:
        shown = "needed"
    elif isinstance(default, bool):
        shown = "on" if default else ""
    elif isinstance(default, tuple):
        shown = ", ".join(f"`{value}`" for value in default)
    else:
        shown = "" if default is None else f"`{default}`"
    return f"| `{flag}{' ' + choices if choices else ''}` | {shown} | {entry.metadata['help']} |"


def main() -> None:
    """Renew the help block of every page, the page of options and the tables of losses."""
    (DOCS / "options.md").write_text(options_page())
    write_table.PAGE.write_text(write_table.with_tables(write_table.PAGE.read_text()))
    for name, text in read_helps().items():
        path = PAGES / f"{name}.md"
        if not path.exists():
            sys.exit(
                f"{path}: missing. Say there what `{name}` does, with an empty block: "
                f"{help_block(name, '…')!r}"
            )
        path.write_text(with_help(path.read_text(), name, text))


if __name__ == "__main__":
    main()
