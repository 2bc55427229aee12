"""The options of a command as keyword arguments of its function: names, types, defaults and help.

    @keywords_of(TrainOptions)
    def train(cache, output, *, on_metrics=None, **options): ...

`help`, notebooks and `inspect.signature` then show every option; `dpo_cache/__init__.pyi` shows the same to
editors and type checkers (`python -m tests.write_stub` writes it).
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import Field, fields
from functools import wraps
from typing import Any, TypeVar

from dpo_cache.log import Log, log_remark
from dpo_cache.options.base import Options, old_names, sections, with_new_names
from dpo_cache.options.sweep import SweepOptions, swept_fields, type_of
from dpo_cache.suggestions import unknown_option

Result = TypeVar("Result")
Chosen = TypeVar("Chosen", bound=Options)

PATHS = {
    "cache", "chat_template", "config", "dataset", "destination", "local", "model", "out", "output",
    "peft_config", "plot", "run", "tokenizer", "trl_config",
}  # fmt: skip
PERIODS = {"eval_every", "save_every"}  # a number of steps, or text with a number of epochs
_FLAG = re.compile(r"--([a-z][a-z0-9-]*)")


def keywords_of(options_class: type[Options]) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Decorator: the function takes the options of the class as keyword arguments.

    Its signature and docstring show them, and a name that is no option raises `UnknownOptionError`, which
    suggests the nearest one. Earlier names are accepted: `make_options` renames them.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        signature = _with_options(inspect.signature(function), options_class)
        names, old = list(signature.parameters), old_names(options_class)

        @wraps(function)
        def run(*args: Any, **given: Any) -> Result:
            for name in given:
                if name not in names and name not in old:
                    raise unknown_option(name, function.__name__, names, old)
            return function(*args, **given)

        run.__signature__ = signature  # type: ignore[attr-defined]
        run.__doc__ = f"{inspect.getdoc(function)}\n\n{_option_help(options_class, function)}"
        return run

    return decorate


def make_options(options_class: type[Chosen], given: dict[str, Any], log: Log | None = None) -> Chosen:
    """The options with these values, for which earlier names still work. `log` gets a remark for each."""
    return options_class(**with_new_names(options_class, given, log or log_remark))


def _with_options(signature: inspect.Signature, options_class: type[Options]) -> inspect.Signature:
    """The signature with the options between its positional parameters and its other keywords."""
    own = [
        entry for entry in signature.parameters.values() if entry.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    num_positional = sum(entry.kind is not inspect.Parameter.KEYWORD_ONLY for entry in own)
    options = [
        inspect.Parameter(
            entry.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if entry.metadata["required"] else entry.default,
            annotation=Annotation(annotation_of(options_class, entry)),
        )
        for entry in fields(options_class)
        if entry.name not in signature.parameters
    ]
    return signature.replace(parameters=[*own[:num_positional], *options, *own[num_positional:]])


class Annotation(str):
    """Source text of a type, which `inspect.signature` shows without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def annotation_of(options_class: type[Options], entry: Field[Any]) -> str:
    """The values that an option takes, as source text."""
    if options_class is SweepOptions:
        for swept in swept_fields():
            if swept.name == entry.name:
                return _several(swept)
    kind = entry.type if isinstance(entry.type, str) else getattr(entry.type, "__name__", str(entry.type))
    base, _, rest = kind.partition(" | ")
    if entry.metadata["choices"]:
        base = "Literal[" + ", ".join(f'"{choice}"' for choice in entry.metadata["choices"]) + "]"
    elif base.startswith("tuple"):
        base = "str | Sequence[str]"
    elif base == "str" and entry.name in PATHS:
        base = "str | os.PathLike[str]"
    elif base == "str" and (entry.default == "auto" or entry.name in PERIODS):
        base = "int | str"
    return f"{base} | {rest}" if rest else base


def _several(entry: Field[Any]) -> str:
    """One value of an option of `train`, several of them, or text with commas."""
    kind = type_of(entry)
    if kind is bool:
        return "bool | Sequence[bool]"
    one = f"{kind.__name__} | str" if kind in (int, float) else "str"
    several = f"{one} | None" if entry.type.endswith("| None") else one
    return f"{one} | Sequence[{several}]"


def _option_help(options_class: type[Options], function: Callable[..., Any]) -> str:
    """A line for each option with its default, then its help; groups as on the command line."""
    lines, skipped = ["Options:"], inspect.signature(function).parameters
    for title, entries in sections(options_class).items():
        lines += ["", f"{title}:"] if title and entries else []
        for entry in entries:
            if entry.name in skipped:
                continue
            default = "" if entry.metadata["required"] else f" = {entry.default!r}"
            help = _FLAG.sub(lambda flag: flag[1].replace("-", "_"), entry.metadata["help"])
            lines.append(f"    {entry.name}: {annotation_of(options_class, entry)}{default}")
            lines.append(textwrap.indent(textwrap.fill(help, 98), 8 * " "))
    return "\n".join(lines)
