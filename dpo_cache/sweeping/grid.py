r"""The grid of a sweep: the product of the values of its options.

Values, on the command line and in Python strings:

    0.05,0.1                two values
    a\,b                    one value that holds a comma
    sigmoid:0.8+sft:0.2     one value of an option that `train` accepts several times; `\+` is a literal plus
    none                    no value, if that is train's default

In Python, anything but a string is one value, and a list holds several: `beta=[0.05, 0.1]`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from dataclasses import Field, dataclass
from itertools import product
from numbers import Real
from typing import Any

from dpo_cache.errors import OptionError
from dpo_cache.options.base import EXPECTED
from dpo_cache.options.sweep import SweepOptions, shown_value, swept_fields, type_of
from dpo_cache.options.train import TrainOptions

LONGEST_NAME = 100  # characters; file systems end at 255 bytes


@dataclass(frozen=True)
class Grid:
    """Options of `train` that all runs share, and the values of the varied options by name, in alphabetical
    order.
    """

    shared: dict[str, Any]
    varied: dict[str, tuple[Any, ...]]

    def combinations(self) -> list[dict[str, Any]]:
        """The varied options of each run: the last option varies fastest."""
        return [dict(zip(self.varied, values, strict=True)) for values in product(*self.varied.values())]

    def values(self, name: str) -> tuple[Any, ...]:
        """Every value that an option takes."""
        return self.varied[name] if name in self.varied else (self.shared[name],)


def read_grid(options: SweepOptions) -> Grid:
    """The grid of the options, every combination checked. Raises `OptionError`, which names all combinations
    that make no sense.
    """
    values = {
        entry.name: read_values(entry, getattr(options, entry.name)) or (entry.default,)
        for entry in swept_fields()
    }
    shared = {name: taken[0] for name, taken in values.items() if len(taken) == 1}
    grid = Grid(shared, {name: values[name] for name in sorted(values) if len(values[name]) > 1})
    _check(grid, options)
    return grid


def read_values(entry: Field[Any], given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values that were given for an option, in the type that `train` expects. Raises `OptionError`."""
    values: list[Any] = []
    for item in given:
        is_text = isinstance(item, str)
        values += [_parse(entry, text) for text in _split(item, ",")] if is_text else [_checked(entry, item)]
    for value, number in Counter(map(json.dumps, values)).items():
        if number > 1:
            raise OptionError(
                f"`{entry.name}` {shown_value(json.loads(value))}: given {number} times.\n"
                "Give each value once."
            )
    return tuple(values)


def run_names(combinations: list[dict[str, Any]]) -> list[str]:
    """A folder's name for each run, made of the varied options, such as `beta=0.05,loss=ipo`. A digest at the
    end shortens long names and keeps equal names apart.
    """
    names = [
        ",".join(f"{name}={_safe(shown_value(value))}" for name, value in combination.items()) or "run"
        for combination in combinations
    ]
    times = Counter(name.lower() for name in names)  # some file systems ignore case
    for place, name in enumerate(names):
        if len(name) > LONGEST_NAME or times[name.lower()] > 1:
            digest = hashlib.blake2b(json.dumps(combinations[place]).encode(), digest_size=4).hexdigest()
            names[place] = f"{name[:LONGEST_NAME]}-{digest}"
    return names


def describe(combination: dict[str, Any]) -> str:
    """A combination as text for messages."""
    return ", ".join(f"{name}={shown_value(value)}" for name, value in combination.items())


def _check(grid: Grid, options: SweepOptions) -> None:
    combinations = grid.combinations()
    messages = []
    lines = []
    for combination in combinations:
        try:
            TrainOptions(cache=options.cache, output=options.output, **grid.shared, **combination)
        except OptionError as error:
            messages.append(str(error))
            lines.append(f"  {describe(combination)}: {' '.join(str(error).splitlines())}\n")
    if len(messages) == len(combinations) and len(set(messages)) == 1:
        raise OptionError(messages[0])
    if messages:
        raise OptionError(
            f"{len(messages)} of {len(combinations)} combinations make no sense, so nothing was run:\n"
            f"{''.join(lines)}Leave such values out, or run them as another sweep."
        )


def _split(text: str, separator: str) -> list[str]:
    """The parts between separators; a separator after a backslash is a character of its part."""
    parts = re.split(rf"(?<!\\){re.escape(separator)}", text)
    return [part.replace("\\" + separator, separator) for part in parts]


def _parse(entry: Field[Any], text: str) -> Any:
    name, kind, text = f"`{entry.name}`", type_of(entry), text.strip()
    if not text:
        raise OptionError(f"{name}: one of its values is empty.\nSeparate values with one comma each.")
    if text == "none" and entry.default in (None, ()):
        return entry.default
    if kind is tuple:
        return tuple(part.strip() for part in _split(text, "+"))
    if kind is bool:
        raise OptionError(f"{name} {text}: expected True or False.")
    try:
        return kind(text)
    except ValueError as error:
        raise OptionError(
            f"{name} {text}: expected {'a whole number' if kind is int else 'a number'}."
        ) from error


def _checked(entry: Field[Any], value: Any) -> Any:
    """A value from Python in the form in which the command line reads it. Raises `OptionError`."""
    kind = type_of(entry)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind is float and isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    if kind is str and type(value) is int:
        return str(value)
    if kind is tuple:
        return tuple(value)
    if value is None and entry.default is None:
        return None
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise OptionError(f"`{entry.name}` {value!r}: expected {EXPECTED[kind.__name__]}.")
    return value


def _safe(text: str) -> str:
    """The text as part of a file's name on any system."""
    return re.sub(r"[^\w.+-]+", "-", text.strip("/ "), flags=re.ASCII).rstrip(".")
