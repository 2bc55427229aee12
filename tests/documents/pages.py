"""Runs the blocks of a page, and compares or renews their output."""

from __future__ import annotations

import ast
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from tests.documents.accepted import check_accepted
from tests.documents.blocks import Block, Command, PageError, read_blocks, read_commands, starts_with
from tests.documents.compare import difference, matched, renewed, stripped
from tests.documents.execute import Done, end_accelerate, run_code, run_command
from tests.documents.folder import READY, ROOT, SHOWN_AS, Workplace
from tests.documents.object_store import make_bucket

PAGES = (
    "README.md",
    *(
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "docs").rglob("*.md"))
        if "_build" not in path.parts
    ),
)
_ENVIRONMENT = {"COLUMNS": "100", "NO_COLOR": "1", "DPO_CACHE_PROGRESS": "off"}
_CODE = re.compile(r"# exit code (\d+)")


@contextmanager
def workplace(model: str = "") -> Iterator[Workplace]:
    """A place to run pages in, with a tiny model, or with the model in a folder."""

    def run(text: str) -> None:
        done = run_command(text)
        if done.code:
            raise RuntimeError(f"{text}\n{done.output}")

    # with the length of SHOWN_AS in /tmp, so that columns of output stay aligned
    with _environment(), TemporaryDirectory(prefix="p") as path, TemporaryDirectory() as kept:
        yield Workplace(Path(path).resolve(), Path(kept), run, model)


class _Output(NamedTuple):
    """`length` lines of output from line `number` of a page, and the real ones."""

    number: int
    length: int
    real: list[str]
    is_same: bool


class Page:
    """A page, and what a run of it found."""

    def __init__(self, name: str):
        self.name = name
        self.text = (ROOT / name).read_text()
        self.problems: list[str] = []
        self._outputs: list[_Output] = []

    def run(self, workplace: Workplace) -> None:
        """Run the page, and collect its problems."""
        try:
            blocks = read_blocks(self.text)
            names = starts_with(self.text)
            if unknown := set(names) - {*READY, "bucket"}:
                raise PageError(
                    f"starts with: {', '.join(sorted(unknown))}: none of {', '.join(READY)}, bucket"
                )
        except PageError as error:
            self.problems.append(f"{self.name}: {error}")
            return
        with _environment():
            if "bucket" in names:
                make_bucket()
            folder = workplace.fresh(names)
            before = Path.cwd()
            os.chdir(folder)
            try:
                self._run_blocks(blocks, str(folder))
            finally:
                os.chdir(before)
                end_accelerate()

    def _run_blocks(self, blocks: list[Block], folder: str) -> None:
        names: dict[str, Any] = {"__name__": "__main__"}
        printed: list[str] = []
        for block in blocks:
            if block.not_run:
                self._check_unrun(block)
            elif block.is_output:
                output = Command("the code above", block.number, block.lines, block.number)
                self._compare(output, printed, block.indent)
            elif block.language == "python":
                done = run_code(block.text, self.name, block.number, names)
                printed = shown(done, folder)
                if done.code:
                    self._add(block.number, "this code fails:", "\n".join(printed))
                    return
            elif block.language in ("console", "sh"):
                for command in self._commands(block):
                    if not self._run(command, folder, block):
                        return

    def _run(self, command: Command, folder: str, block: Block) -> bool:
        """Run a command, and return whether the page can continue after it."""
        done = run_command(command.text)
        lines = shown(done, folder)
        wanted = _CODE.search(command.text)
        is_error = any(line.lstrip().startswith("error: ") for line in command.output)
        if done.code != (int(wanted[1]) if wanted else 0) and not (done.code and is_error and not wanted):
            self._add(command.number, command.text, f"exit code {done.code}\n" + "\n".join(lines))
            return False
        if command.output:
            self._compare(command, lines, block.indent)
        return True

    def _compare(self, command: Command, real: list[str], indent: str) -> None:
        is_same = matched(command.output, real) is not None
        new = [f"{indent}{line}".rstrip() for line in renewed(command.output, real)]
        self._outputs.append(_Output(command.output_number, len(command.output), new, is_same))
        if not is_same:
            self._add(command.number, command.text, difference(command.output, real))

    def _check_unrun(self, block: Block) -> None:
        if block.language == "python":
            self._check(block.number, "this code", lambda: ast.parse(block.text))
        elif block.language in ("console", "sh"):
            for command in self._commands(block):
                self._check(command.number, command.text, lambda text=command.text: check_accepted(text))

    def _check(self, number: int, title: str, check: Callable[[], object]) -> None:
        try:
            check()
        except Exception as error:
            self._add(number, title, f"is not accepted: {type(error).__name__}: {error}")

    def _commands(self, block: Block) -> list[Command]:
        try:
            return read_commands(block)
        except PageError as error:
            self.problems.append(f"{self.name}: {error}")
            return []

    def _add(self, number: int, title: str, text: str) -> None:
        self.problems.append(f"{self.name}:{number}: {title}\n{text}")

    def write(self, *, everything: bool) -> None:
        """Write the real outputs into the page; what somebody edited elsewhere during the run stays."""
        path = ROOT / self.name
        with TemporaryDirectory() as folder:
            before, after = Path(folder, "before"), Path(folder, "after")
            before.write_text(self.text)
            after.write_text(self.renewed(everything=everything))
            subprocess.run(["git", "merge-file", "--theirs", path, before, after], check=True)

    def renewed(self, *, everything: bool) -> str:
        """The page with the real outputs: where they differ, or everywhere, with new numbers."""
        lines = self.text.splitlines()
        for output in reversed(self._outputs):
            if everything or not output.is_same:
                lines[output.number - 1 : output.number - 1 + output.length] = output.real
        return "\n".join(lines) + "\n"


def shown(done: Done, folder: str) -> list[str]:
    """The lines of an output, as a page shows them."""
    return stripped(done.output.replace(folder, SHOWN_AS))


@contextmanager
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
