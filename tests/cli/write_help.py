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
from dpo_cache.options.exchange import ExportOptions, ImportOptions
from dpo_cache.options.plan import PlanOptions
from dpo_cache.options.precompute import PrecomputeOptions
from dpo_cache.options.sweep import SweepOptions, swept_fields
from dpo_cache.options.train import TrainOptions
from dpo_cache.options.upkeep import (
    CompactOptions,
    DiffOptions,
    GcOptions,
    LsOptions,
    MergeOptions,
    PullOptions,
    PushOptions,
    RmOptions,
    VerifyOptions,
)
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
        "keyword arguments. Every command also takes `--json` (print the report as JSON), `--verbose` (print "
        "all details) and `--help`.",
    ]
    for command, options in OPTIONS.items():
        lines += ["", f"## {command}", "", f"[The command]({PAGES.name}/{command}.md)."]
        if options is SweepOptions:
            lines[-1] += " It takes every option of [`train`](#train) as well, each with several values."
        for title, entries in sections(options).items():
            shown = [entry for entry in entries if options is not SweepOptions or not is_swept(entry)]
            if shown:
                lines += [*(["", f"### {title}"] if title else []), *_TABLE, *map(_row, shown)]
    return "\n".join(lines) + "\n"


OPTIONS = {
    "precompute": PrecomputeOptions,
    "train": TrainOptions,
    "eval": EvalOptions,
    "sweep": SweepOptions,
    "plan": PlanOptions,
    "ls": LsOptions,
    "verify": VerifyOptions,
    "compact": CompactOptions,
    "gc": GcOptions,
    "rm": RmOptions,
    "diff": DiffOptions,
    "merge": MergeOptions,
    "push": PushOptions,
    "pull": PullOptions,
    "export": ExportOptions,
    "import": ImportOptions,
}


def is_swept(entry: Field[Any]) -> bool:
    """Whether it is an option of `train`, of which a sweep takes several values."""
    return entry.name in {swept.name for swept in swept_fields()}


_TABLE = ("", "| option | default | |", "|---|---|---|")


def _row(entry: Field[Any]) -> str:
    flag = entry.metadata["flag"] if "/" in entry.metadata["flag"] else flag_of(entry)
    names = [f"`{entry.metadata['positional']}`"] if entry.metadata["positional"] else []
    if entry.metadata["flag"] or not names:
        names.append(f"`{flag}`")
    default = entry.default
    if entry.metadata["required"]:
        shown = "needed"
    elif isinstance(default, bool):
        shown = "on" if default else ""
    elif isinstance(default, tuple):
        shown = ", ".join(f"`{value}`" for value in default)
    else:
        shown = "" if default is None else f"`{default}`"
    text = entry.metadata["help"].replace("|", "\\|")
    if choices := entry.metadata["choices"]:
        text += f" Values: {', '.join(f'`{choice}`' for choice in choices)}."
    return f"| {' or '.join(names)} | {shown} | {text} |"


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
