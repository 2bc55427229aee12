"""The fenced blocks of a Markdown page, and the commands in them."""

from __future__ import annotations

import re
from dataclasses import dataclass

REASONS = (
    "a GPU",
    "several machines",
    "the Hub",
    "S3",
    "an account",
    "a fresh environment",  # pip install, make
)
RUN = ("console", "sh", "python")
SHOWN = ("text", "json", "jsonl", "yaml", "toml", "ini", "jinja", "diff", "mermaid")

_FENCE = re.compile(r"^( *)(`{3,})([^`]*)$")
_NOT_RUN = re.compile(r"<!-- not run: needs (.*?) -->")
_STARTS_WITH = re.compile(r"<!-- starts with: (.*?) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block: its first line is `lines[0]`, and line `number` of the page, counted from 1."""

    language: str
    lines: list[str]
    number: int
    indent: str
    not_run: str = ""  # what it needs to run
    is_output: bool = False  # of the Python block before it

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


@dataclass(frozen=True)
class Command:
    """A command with the output below it, which begins at line `output_number` of the page."""

    text: str
    number: int
    output: list[str]
    output_number: int


class PageError(Exception):
    """A page breaks the rules."""


def read_blocks(page: str) -> list[Block]:
    """The blocks of a page, in order. Raises `PageError` where one has no language, or an unknown one."""
    lines = page.splitlines()
    blocks: list[Block] = []
    reason, last_end = "", -1
    position = 0
    while position < len(lines):
        if found := _NOT_RUN.search(lines[position]):
            reason = found[1]
            if reason not in REASONS:
                raise PageError(f"line {position + 1}: `needs {reason}` is none of {', '.join(REASONS)}")
        fence = _FENCE.match(lines[position])
        if fence is None:
            position += 1
            continue
        indent, ticks, language = fence[1], fence[2], fence[3].strip()
        start = position + 1
        end = next((at for at in range(start, len(lines)) if lines[at].strip() == ticks), None)
        if end is None:
            raise PageError(f"line {start}: this block does not end")
        if language not in (*RUN, *SHOWN) and not language.startswith("{"):  # a directive of MyST
            raise PageError(f"line {start}: a block in `{language}`; use one of {', '.join((*RUN, *SHOWN))}")
        content = [line.removeprefix(indent) for line in lines[start:end]]
        is_output = (
            language == "text"
            and bool(blocks)
            and blocks[-1].language == "python"
            and not blocks[-1].not_run
            and not any(line.strip() for line in lines[last_end + 1 : position])
        )
        block = Block(language, content, start + 1, indent, reason, is_output)
        if language not in RUN and not is_output:
            _refuse_commands(block)
        blocks.append(block)
        reason, last_end = "", end
        position = end + 1
    return blocks


def _refuse_commands(block: Block) -> None:
    for number, line in enumerate(block.lines, block.number):
        if re.match(r"(\$ |dpo-cache [a-z])", line):
            raise PageError(
                f"line {number}: a command in a block of `{block.language}`, where it does not run"
            )


def starts_with(page: str) -> list[str]:
    """The names in `<!-- starts with: ... -->`."""
    return [name.strip() for names in _STARTS_WITH.findall(page) for name in names.split(",")]


def read_commands(block: Block) -> list[Command]:
    """The commands of a block of `console` or `sh`."""
    prompt = "$ " if block.language == "console" else ""
    lines, commands, position = block.lines, [], 0
    while position < len(lines):
        if not lines[position].startswith(prompt):
            number = block.number + position
            raise PageError(f"line {number}: expected a command, `$ ...`, found {lines[position]!r}")
        if not prompt and (not lines[position].strip() or lines[position].startswith("#")):
            position += 1
            continue
        number = block.number + position
        text, position = _whole_command(lines, position)
        start = position
        while prompt and position < len(lines) and not lines[position].startswith(prompt):
            position += 1
        start, end = _without_blank_ends(lines, start, position)
        commands.append(Command(text.removeprefix(prompt), number, lines[start:end], block.number + start))
    return commands


def _whole_command(lines: list[str], position: int) -> tuple[str, int]:
    """The command at a position, with the lines that continue it, and the position after these."""
    text = lines[position]
    while text.endswith("\\") and position + 1 < len(lines):
        position += 1
        text = f"{text[:-1].rstrip()} {lines[position].strip()}"
    return text, position + 1


def _without_blank_ends(lines: list[str], start: int, end: int) -> tuple[int, int]:
    """The range without empty lines at its ends."""
    while end > start and not lines[end - 1].strip():
        end -= 1
    while start < end and not lines[start].strip():
        start += 1
    return start, end
