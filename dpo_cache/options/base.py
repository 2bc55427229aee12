"""The base of every command's option class: each option has its name, type, default, unit, help and check in
one place.

The command line is generated from these classes, the Python functions take the same names as keyword
arguments, and a run writes them as JSON next to its output.
"""

from __future__ import annotations

import os
from dataclasses import MISSING, field, fields
from typing import Any, ClassVar

from dpo_cache.errors import OptionError

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "8bit", "4bit")
ATTENTIONS = ("auto", "forest", "rows")


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    flag: str = "",
    required: bool = False,
    metavar: str = "",
) -> Any:
    """A dataclass field with its help text, accepted values and, where they differ from name and type, its
    flag and what the help calls its value.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "flag": flag,
        "required": required,
        "positional": "",
        "metavar": metavar,
    }
    if isinstance(default, tuple):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


def switch(name: str) -> str:
    """The flag of an option that can be turned off as well, as one from a config file may have to be."""
    return f"--{name}/--no-{name}"


def argument(
    default: Any, help: str, *, name: str, choices: tuple[str, ...] = (), required: bool = False
) -> Any:
    """A dataclass field that is given by its place on the command line, under this name in the help; a tuple
    takes all that is left.
    """
    metadata = {"help": help, "choices": choices, "flag": name, "required": required, "positional": name}
    if isinstance(default, tuple):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


class Options:
    """Base of the option classes: checks choices, then what `check` adds.

    `groups` names the parts of a long help: the first option of a part -> its title.
    """

    groups: ClassVar[dict[str, str]] = {}

    def __post_init__(self) -> None:
        for entry in fields(self):  # type: ignore[arg-type]
            value, choices = getattr(self, entry.name), entry.metadata["choices"]
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
                object.__setattr__(self, entry.name, value)
            if entry.default_factory is not MISSING:  # may be given several times
                several = (value,) if isinstance(value, str) else value
                is_text = isinstance(several, (tuple, list)) and all(isinstance(one, str) for one in several)
                if not is_text and entry.type == "tuple[str, ...]":
                    raise OptionError(f"{flag_of(entry)} {value!r}: expected text, or a list of texts.")
                object.__setattr__(self, entry.name, tuple(several))
            if entry.type in ("str", "str | None") and type(value) is int:
                value = str(value)
                object.__setattr__(self, entry.name, value)
            if entry.type in ("int", "int | None") and value is not None and type(value) is not int:
                raise OptionError(f"{flag_of(entry)} {value!r}: expected a whole number.")
            if (
                value is None
                and not entry.metadata["required"]
                and entry.type in ("int", "float", "str", "bool")
            ):
                raise OptionError(f"{flag_of(entry)} None: expected a value.")
            if entry.type == "bool" and not isinstance(value, bool):
                raise OptionError(f"{flag_of(entry)} {value!r}: expected true or false.")
            if (
                entry.type in ("float", "float | None")
                and value is not None
                and (isinstance(value, bool) or not isinstance(value, (int, float)))
            ):
                raise OptionError(f"{flag_of(entry)} {value!r}: expected a number.")
            if entry.type in ("str", "str | None") and value is not None and not isinstance(value, str):
                raise OptionError(f"{flag_of(entry)} {value!r}: expected text.")
            if choices and value not in choices and (value is not None or entry.metadata["required"]):
                raise OptionError(f"{flag_of(entry)} {value}: expected one of {', '.join(choices)}.")
            if entry.metadata["required"] and value in (None, "", ()):
                raise OptionError(f"{flag_of(entry)} is needed.")
        self.check()

    def check(self) -> None:
        """Raise `OptionError` for values that make no sense, alone or together."""

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise OptionError(message)


def flag_of(entry: Any) -> str:
    """The option's flag on the command line, or the name of a positional argument."""
    return entry.metadata["flag"].split("/")[0] or "--" + entry.name.replace("_", "-")


def number_or_auto(flag: str, value: str) -> int | None:
    """The number, or None for `auto`. Raises `OptionError`."""
    if value == "auto":
        return None
    if not str(value).isdecimal() or int(value) < 1:
        raise OptionError(f"{flag} {value}: expected auto or a positive number.")
    return int(value)
