"""Checks a command that is not run: `dpo-cache` accepts its options."""

from __future__ import annotations

import re
import shlex

import typer

from dpo_cache.cli.app import COMMANDS, app
from dpo_cache.cli.parameters import _values
from dpo_cache.options.base import Options

_LAUNCHERS = r"(?:torchrun|accelerate launch|srun|python) [^\n]*?-m dpo_cache|srun dpo-cache|ray \S+ [^\n\"]*\"dpo-cache|dpo-cache"
_COMMAND = re.compile(rf"^(?:\w+=\S* )*(?:{_LAUNCHERS}) ([a-z]+ [^\n]*)$")


def shown_command(text: str) -> list[str] | None:
    """The words after `dpo-cache` of a command, which a launcher may start. None of another command."""
    found = _COMMAND.match(text)
    if found is None:
        return None
    words = shlex.split(found[1].removesuffix('"'), comments=True)
    return words if words[0] in COMMANDS and words[-1] != "--help" else None


def parsed(words: list[str]) -> Options:
    """The options of `dpo-cache WORDS`, checked, as before a run. Raises what the command line raises."""
    name, *rest = words
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    with command.make_context(name, rest) as context:
        options_class = COMMANDS[name].options_class
        values = {key: value for key, value in context.params.items() if key not in ("as_json", "context")}
        given = _values(options_class, values, context, only_given=bool(values.get("resume")))
        return options_class(**given)


def check_accepted(text: str) -> None:
    """Raise if the command is one of `dpo-cache` that it does not accept."""
    words = shown_command(text)
    if words is not None and words[:2] != ["train", "--resume"]:  # a run in a folder that is not there
        parsed(words)
