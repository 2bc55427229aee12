"""Formats results for stdout. Progress and remarks go to stderr: see `dpo_cache/progress.py`."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Any

from dpo_cache import progress
from dpo_cache.errors import printable, printable_lines
from dpo_cache.errors import shown_bytes as format_bytes
from dpo_cache.options.base import Options, flag_of
from dpo_cache.progress import format_seconds as format_seconds
from dpo_cache.progress import show_scoring as show_scoring

if TYPE_CHECKING:
    from dpo_cache.exchange import ImportReport
    from dpo_cache.planning.forecast import Forecast
    from dpo_cache.precomputing.run import PrecomputeReport
    from dpo_cache.store.upkeep.copy import TransferReport

NOTHING_CHANGED = "nothing was changed."
SAME_COMMAND = "Next: the same command, which continues."
NUMBER = re.compile(r"[\d,]{1,11}|[\d.]+ [kMG]?B|[+-]?\d+\.\d+|[+-]?[\d.]+%|")

_printed_json: ContextVar[bool] = ContextVar("printed_json", default=False)
_stop_note: ContextVar[str] = ContextVar("stop_note", default=NOTHING_CHANGED)
_verbose: ContextVar[bool] = ContextVar("verbose", default=False)
_command: ContextVar[type[Options] | None] = ContextVar("command", default=None)


def is_verbose() -> bool:
    """True in a command with --verbose, which prints all details and not only those needed to act."""
    return _verbose.get()


@contextmanager
def verbosity(is_verbose: bool) -> Iterator[None]:
    """While open, `is_verbose()` returns this value."""
    token = _verbose.set(is_verbose)
    try:
        yield
    finally:
        _verbose.reset(token)


class ProgressLine(progress.ProgressLine):
    """The progress line of a command, whose remarks name options by their flags."""

    def remark(self, text: str) -> None:
        super().remark(with_flags(text))


def remark(text: str) -> None:
    """Write a remark, which names options by their flags, to stderr."""
    progress.remark(with_flags(text))


def with_flags(text: str) -> str:
    """The library's text with the flags of options in place of their names: `max_length` is --max-length.

    An option that the command does not have is named in words, and an argument as in the help: `max_length`
    is "max length" in `ls`, and `kind` is KIND in `rm`.
    """
    names = _names_in_messages(_command.get())  # type: ignore[arg-type]

    def flag(match: re.Match[str]) -> str:
        name, is_off = match[1], match[2]
        if name not in names:
            return match[0]
        return names[name].replace("--", "--no-", 1) if is_off else names[name]

    return re.sub(r"`([a-z][a-z0-9_]*)(=False)?`", flag, text)


@cache
def _names_in_messages(options_class: type[Options] | None) -> dict[str, str]:
    """How messages of a command call the options of all commands; None: no command is known."""
    known = {
        entry.name: flag_of(entry)
        if entry.metadata["flag"]
        else entry.metadata["positional"] or flag_of(entry)
        for entry in (fields(options_class) if options_class else ())
    }
    others = {
        name: name.replace("_", " ") if options_class else f"--{name.replace('_', '-')}"
        for name in option_names()
    }
    return {**others, **known}


def option_names(kind: type[Options] = Options) -> set[str]:
    """The names of the options of a class and of its subclasses."""
    names = {entry.name for entry in fields(kind)}
    return names.union(*(option_names(child) for child in kind.__subclasses__()))  # type: ignore[arg-type]


def print_text(text: str = "") -> None:
    """Print a text, which may contain untrusted names."""
    print(printable_lines(text))


def print_table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print two columns, in the same way to a terminal and to a file."""
    rows = [(printable(label), printable(value)) for label, value in rows]
    width = max(len(label) for label, _ in rows)
    print_text(title)
    for label, value in rows:
        print_text(f"  {label:<{width}}  {value}")


def print_columns(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with one line for each row; columns of numbers and sizes are aligned to the right."""
    for line in format_columns(titles, rows):
        print_text(line)


def format_columns(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table for `print_columns`."""
    rows = [[printable(entry) for entry in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    numeric = [all(NUMBER.fullmatch(entry) for entry in column) for column in zip(*rows, strict=True)]
    cells = [
        [
            entry.rjust(width) if right else entry.ljust(width)
            for entry, width, right in zip(row, widths, numeric, strict=True)
        ]
        for row in (titles, *rows)
    ]
    return ["  ".join(row).rstrip() for row in cells]


def print_json(value: Any) -> None:
    """Print the value as JSON, with all characters but ASCII escaped."""
    print_text(json.dumps(value, indent=2))
    _printed_json.set(True)


@contextmanager
def output_of_one_command(options_class: type[Options] | None = None) -> Iterator[None]:
    """Set the state of a command: no JSON has been printed, nothing has been changed yet, and messages name
    the options of this class by their flags.
    """
    printed, note = _printed_json.set(False), _stop_note.set(NOTHING_CHANGED)
    command = _command.set(options_class)
    try:
        yield
    finally:
        _command.reset(command)
        _printed_json.reset(printed)
        _stop_note.reset(note)


def when_stopped(text: str) -> None:
    """Set the text that Ctrl-C and SIGTERM print from now on: the results that are kept, and the next
    command.
    """
    _stop_note.set(text)


def stop_note() -> str:
    """The text to print if the command is stopped now; see `when_stopped`."""
    return with_flags(_stop_note.get())


def has_printed_json() -> bool:
    """Return whether this command has printed JSON."""
    return _printed_json.get()


def command_line(*words: str) -> str:
    """A `dpo-cache` command for the user to copy, with words quoted as a shell needs it."""
    return shlex.join(("dpo-cache", *words))


def kept_rows(report: PrecomputeReport | ImportReport) -> list[tuple[str, str]]:
    """The first rows of a report's table: the numbers of data rows that were read, kept and dropped."""
    dropped = sorted(report.dropped.items(), key=lambda entry: -entry[1])
    return [
        ("rows read", count(report.rows_read)),
        ("pairs kept", count(report.pairs_kept)),
        ("rows dropped", count(sum(report.dropped.values()))),
        *((f"  {reason}", count(number)) for reason, number in dropped),
    ]


def print_transfer(report: TransferReport) -> None:
    """Print the report without the next command."""
    scored = set(report.scored_references)
    rows = [
        ("pair sets", ", ".join(report.pair_sets) or "none"),
        (
            "references",
            ", ".join(
                entry[:12] + ("" if entry in scored else " (without its scores)")
                for entry in report.references
            ),
        ),
        ("sent", f"{count(report.files_sent)} files, {format_bytes(report.bytes_sent)}"),
        ("there already", f"{count(report.files_present)} files, {format_bytes(report.bytes_present)}"),
        ("time", format_seconds(report.elapsed_s)),
    ]
    print_table(f"{report.source} -> {report.target}", rows)


def forecast_rows(found: Forecast | None) -> list[tuple[str, str]]:
    """The last rows of a dry run's table: time, memory and disk of the run."""
    if found is None:
        return []
    time = "not known" if found.seconds is None else f"about {format_seconds(found.seconds)}"
    each = f" on each of {found.num_workers}" if found.num_workers > 1 and found.device != "cpu" else ""
    memory = "not known" if found.device_bytes is None else f"about {format_bytes(found.device_bytes)}{each}"
    rows = [
        ("time", f"{time}, {found.source}" if found.source else time),
        ("memory", f"{memory}{_free(found.free_device_bytes)}"),
        ("disk", f"at most {format_bytes(found.disk_bytes)}{_free(found.free_disk_bytes)}"),
    ]
    return [(f"{name} of the run", shown) for name, shown in rows]


def _free(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"; {format_bytes(num_bytes)} are free"


def train_line(cache: str, pairs: str, *more: str) -> str:
    """The command that trains on a pair set."""
    return command_line("train", "--cache", cache, "--pairs", pairs, "--output", "RUN", *more)


def count(number: int) -> str:
    return f"{number:,}"
