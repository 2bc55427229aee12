"""The base of every command's option class: each option has its name, type, default, unit, help and check in
one place.

The command line is generated from these classes, the Python functions take the same names as keyword
arguments, and a run writes them as JSON next to its output.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar

from dpo_cache.errors import OptionError

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "8bit", "4bit")
ATTENTIONS = ("auto", "forest", "rows")
EXPECTED = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
NO_LIMIT = (lambda _: True, "")
ABOVE_0 = (lambda value: 0 < value < math.inf, "a number above 0")
AT_LEAST_0 = (lambda value: 0 <= value < math.inf, "0 or more")


def option(
    default: Any,
    help: str,
    *,
    positional: str = "",
    choices: tuple[str, ...] = (),
    limit: tuple[Callable[[Any], bool], str] | None = None,
    flag: str = "",
    required: bool = False,
    metavar: str = "",
    old: tuple[str, ...] = (),
    value_is_optional: bool = False,
) -> Any:
    """A dataclass field with its help text, its accepted values, and its flag and metavar where they differ
    from name and type. `limit` is a test of the values, and the values that pass it in words.

    With `positional` the command line takes the option by its position, under this name in the help, and also
    by its `flag` if it has one. An option whose default is a tuple may be given several times; a positional
    tuple takes all positions that are left. `old` lists earlier names of the option, which still work. With
    `value_is_optional` the flag works as a switch, too.
    """
    metadata = {
        "help": help,
        "positional": positional,
        "choices": choices,
        "range": limit,
        "flag": flag,
        "required": required,
        "metavar": metavar,
        "old": old,
        "value_is_optional": value_is_optional,
    }
    return field(default=default, metadata=metadata)


def cache_argument(help: str) -> Any:
    """The cache of a command: CACHE by its position, or `--cache CACHE`."""
    return option(None, help, positional="CACHE", flag="--cache", required=True)


def switch(name: str) -> str:
    """The flags that turn an option on and off, for an option that a config file may have turned on."""
    return f"--{name}/--no-{name}"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of the option classes: checks types and choices, then calls `check`.

    `groups` maps the first option of each part of a long help to the title of the part. See `sections`.
    """

    groups: ClassVar[dict[str, str]] = {}

    def __post_init__(self) -> None:
        if missing := [f"`{entry.name}`" for entry in fields(self) if self._lacks(entry)]:
            raise OptionError(f"{listed(missing)} {'are' if len(missing) > 1 else 'is'} needed.")
        for entry in fields(self):
            value = _normalized(entry, getattr(self, entry.name))
            object.__setattr__(self, entry.name, value)
            _check_type(entry, value)
            if (entry.type == "str | None" and value == "") or (isinstance(value, tuple) and "" in value):
                raise OptionError(f"`{entry.name}` is empty.\nGive a value, or leave it out.")
            choices = entry.metadata["choices"]
            if choices and value is not None and value not in choices:
                raise OptionError(f"`{entry.name}` {value}: expected one of {', '.join(choices)}.")
            allows, expected = entry.metadata.get("range") or NO_LIMIT
            if value is not None and not allows(value):
                raise OptionError(f"`{entry.name}` {value}: expected {expected}.")
        self.check()

    def check(self) -> None:
        """Raise `OptionError` for values, or combinations of values, that make no sense."""

    def _lacks(self, entry: Field[Any]) -> bool:
        """Return whether a required option is not given, or is empty."""
        value = getattr(self, entry.name)
        is_empty = value is None or (isinstance(value, (str, tuple, list)) and not value)
        return entry.metadata["required"] and is_empty

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise OptionError(message)


def _normalized(entry: Field[Any], value: Any) -> Any:
    """The value as the command line would give it: a path as text, one of several values in a tuple."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(entry.default, tuple):  # may be given several times
        several = (value,) if isinstance(value, str) else value
        is_text = isinstance(several, (tuple, list)) and all(isinstance(one, str) for one in several)
        if not is_text and entry.type == "tuple[str, ...]":
            raise OptionError(f"`{entry.name}` {value!r}: expected text, or a list of texts.")
        return tuple(several)
    if entry.type in ("str", "str | None") and type(value) is int:
        return str(value)
    return value


def type_name(entry: Field[Any]) -> str:
    """The name of the field's type, such as `int`; the first one of several."""
    return _types_of(entry)[0]


def _types_of(entry: Field[Any]) -> tuple[str, str]:
    """The name of the first type and, after it, those of the others."""
    name = entry.type.__name__ if isinstance(entry.type, type) else str(entry.type)
    kind, _, others = name.partition(" | ")
    return kind, others


def _check_type(entry: Field[Any], value: Any) -> None:
    """Raise `OptionError` for a value of another type than the field's."""
    kind, may_be_none = _types_of(entry)
    if value is None:
        if not (may_be_none or entry.metadata["required"]) and kind in ("int", "float", "str", "bool"):
            raise OptionError(f"`{entry.name}` None: expected a value.")
        return
    is_right = {
        "int": type(value) is int,
        "float": isinstance(value, (int, float)) and not isinstance(value, bool),
        "bool": isinstance(value, bool),
        "str": isinstance(value, str),
    }.get(kind, True)
    if may_be_none in ("", "None") and not is_right:
        raise OptionError(f"`{entry.name}` {value!r}: expected {EXPECTED[kind]}.")


def old_names(options_class: type[Options]) -> dict[str, str]:
    """Earlier names of options -> their current names. The earlier ones still work, see `with_new_names`."""
    return {old: entry.name for entry in fields(options_class) for old in entry.metadata["old"]}


def with_new_names(
    options_class: type[Options], given: dict[str, Any], log: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """The given options under their current names. `log` gets a remark for each option with an earlier name.

    Raises `OptionError` for an option that is given under both names.
    """
    names = old_names(options_class)
    renamed = {names[old]: value for old, value in given.items() if old in names}
    if both := [old for old in given if names.get(old) in given]:
        raise OptionError(f"{both[0]} is now {names[both[0]]}: give one of them.")
    for old in given:
        if old in names:
            log(f"{old} is now {names[old]}.")
    return {**{name: value for name, value in given.items() if name not in names}, **renamed}


def sections(options_class: type[Options]) -> dict[str | None, list[Field[Any]]]:
    """The options in the order of the help, by the title of their part: None, then as in `groups`.

    Within the class that defines it, an option belongs to the last title at or before it. Inherited options
    thus keep together, and `groups` of the inheriting class decides where their part comes.
    """
    known = {entry.name: entry for entry in fields(options_class)}
    found: dict[str | None, list[Field[Any]]] = {None: []}
    found.update((title, []) for title in options_class.groups.values())
    for definer in reversed(options_class.__mro__):
        title = None
        for name in inspect.get_annotations(definer):
            title = options_class.groups.get(name, title)
            if name in known:
                found[title].append(known.pop(name))
    return found


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def flag_of(entry: Any) -> str:
    """The option's flag on the command line, or the name of a positional argument."""
    return entry.metadata["flag"].split("/")[0] or "--" + entry.name.replace("_", "-")


def number_or_auto(name: str, value: str) -> int | None:
    """The number, or None for `auto`. Raises `OptionError`."""
    if value == "auto":
        return None
    if not str(value).isdecimal() or int(value) < 1:
        raise OptionError(f"`{name}` {value}: expected auto or a positive number.")
    return int(value)
