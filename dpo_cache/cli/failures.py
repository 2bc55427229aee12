"""The output of a failure: one message on stderr and, with --json, one JSON object on stdout.

    {"error": {"type": "OptionError", "message": "--beta -1: expected …", "exit_code": 2}}

`type` is a class of `errors.py`, `UsageError` for an invalid command line, `Interrupted`, `Terminated`
or the class of an error that no user can cause. A command that has printed its report, such as `verify` of a
damaged cache, prints no second object.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any, NoReturn

import typer

from dpo_cache.cli.output import has_printed_json, option_names, print_json, remark, with_flags
from dpo_cache.options.base import EXPECTED, Options, flag_of, listed, type_name
from dpo_cache.options.trl_fields import FIELDS
from dpo_cache.suggestions import nearest

# click's names, which newer versions of typer contain
UsageError: Any = typer.BadParameter.__mro__[1]
_exceptions: Any = sys.modules[UsageError.__module__]
NoSuchOption, MissingParameter = _exceptions.NoSuchOption, _exceptions.MissingParameter


def fail(
    kind: str, message: str, code: int, *, as_json: bool, is_quiet: bool = False, prefix: str = "error: "
) -> NoReturn:
    """Report the failure and exit with the code; `is_quiet` if another process has reported it."""
    if not is_quiet:
        remark(f"{prefix}{message}")
        if as_json:
            print_error(kind, message, code)
    sys.exit(code)


def print_error(kind: str, message: str, code: int) -> None:
    """Print the error as JSON, unless the command has printed its report."""
    if not has_printed_json():
        print_json({"error": {"type": kind, "message": with_flags(message), "exit_code": code}})


def wants_json(words: Sequence[str]) -> bool:
    """Return whether --json is among the words of a command line, or --json=1, which is an error."""
    end = words.index("--") if "--" in words else len(words)
    return any(word.partition("=")[0] == "--json" for word in words[:end])


def usage_message(error: Any, words: Sequence[str]) -> str:
    """The message of a `UsageError` about these words."""
    context = error.ctx
    command = context.command_path if context else "dpo-cache"
    advice = f"`{command} --help` lists the {'options' if _entries(context) else 'commands'}."
    if context:
        usage = " ".join(context.get_usage().split())
        advice = f"{usage}\n{advice}"
    if isinstance(error, NoSuchOption):
        flag = error.option_name
        if not flag.startswith("--"):  # -j of -json
            flag = next((word for word in words if word.startswith(flag)), flag)
        return f"no option {flag}.\n{_other_option(flag, context) or advice}"
    if isinstance(error, MissingParameter) and error.param is not None:
        missing = [_name(entry, _entries(context)) for entry in getattr(error, "missing", [error.param])]
        return f"{listed(missing)} {'are' if len(missing) > 1 else 'is'} needed.\n{advice}"
    if isinstance(error, typer.BadParameter) and error.param is not None:
        return f"{_wrong_value(error, words)}\n{advice}"
    text = error.format_message().strip()
    end = "" if text.endswith((".", "?", "!")) else "."
    return f"{text[:1].lower()}{text[1:]}{end}\n{advice}"


def _entries(context: Any) -> dict[str, Any]:
    """The options of the command by their names; none without a command."""
    options_class: type[Options] | None = getattr(getattr(context, "command", None), "options_class", None)
    return {entry.name: entry for entry in fields(options_class)} if options_class else {}


def _other_option(flag: str, context: Any) -> str:
    """The advice for an option that does not exist."""
    given = flag.partition("=")[0].lstrip("-").replace("-", "_").lower()
    entries = _entries(context)
    if not entries and given in {"json", "verbose", *option_names()}:
        return f"Options come after the command, as in `dpo-cache COMMAND {flag}`."
    found = nearest(given, [*entries, "json", "verbose", "help"] if entries else ["version", "help"])
    if found:
        entry = entries.get(found)
        return f"Did you mean {flag_of(entry) if entry else '--' + found}?"
    if given in FIELDS and "lr" in entries:  # only `train` and `sweep` are compared with TRL
        names, note = FIELDS[given].equal.split(", "), FIELDS[given].note
        counterpart = " and ".join(flag_of(entries[name]) for name in names if name in entries)
        if counterpart:
            return f"TRL's {given} is {counterpart} here{f' ({note})' if note else ''}."
        return f"TRL's {given}: {note}."
    word = given.partition("_")[0]
    similar = [flag_of(entry) for name, entry in entries.items() if name.partition("_")[0] == word]
    return f"Options that begin like it: {', '.join(similar)}." if similar else ""


def _name(parameter: Any, entries: dict[str, Any]) -> str:
    entry = entries.get(parameter.name)
    if entry is None:
        return str(parameter.opts[0])
    return entry.metadata["positional"] or flag_of(entry)


def _wrong_value(error: Any, words: Sequence[str]) -> str:
    """The option with its value, and the expected kind of value."""
    parameter, entries = error.param, _entries(error.ctx)
    name = _name(parameter, entries)
    kind = type_name(entries[parameter.name]) if parameter.name in entries else ""
    if kind not in EXPECTED:
        return f"{name}: {error.message}"
    values = [word.partition("=")[2] for word in words if word.partition("=")[0] in parameter.opts]
    values += [after for word, after in pairwise(words) if word in parameter.opts]
    value = f" {next(filter(None, values))}" if any(values) else ""
    return f"{name}{value}: expected {EXPECTED[kind]}."
