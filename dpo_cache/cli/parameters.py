"""A command's parameters, generated from its option class, so that each option is defined once.

Earlier names of options still work, with a remark. A positional argument with a flag takes either: `ls CACHE`
is `ls --cache CACHE`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, fields
from typing import Any, get_type_hints

import typer
from typer.core import TyperCommand

from dpo_cache.cli.completion import completion_of
from dpo_cache.cli.failures import MissingParameter, UsageError
from dpo_cache.cli.output import remark, verbosity
from dpo_cache.cli.signals import Interrupted
from dpo_cache.errors import OptionError
from dpo_cache.options.base import Options, flag_of, sections

BY_FLAG = "dpo_cache.by_flag"  # key of a context for the positional arguments that were given by flag
VERBOSE_HELP = "Print all details."
FLAG_SUFFIX = "__flag"  # suffix of the parameter for the flag of a positional argument


def command(
    options_class: type[Options],
    *,
    json_help: str = "Print the report as JSON.",
    complete: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make `run(options, as_json)` a typer command with the fields of the class as its options,
    `--json` and `--verbose`.

    `complete` gets the options of the command line and adds those from other sources.
    """

    def decorate(run: Callable[..., None]) -> Callable[..., None]:
        def invoke(**values: Any) -> None:
            as_json, context, verbose = (values.pop(name) for name in ("as_json", "context", "verbose"))
            given = _values(options_class, values, context, only_given=complete is not None)
            try:
                options = options_class(**(complete(given) if complete else given))
                with verbosity(verbose):
                    run(options, as_json)
            except KeyboardInterrupt as interrupt:
                raise Interrupted from interrupt

        parameters = [
            inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
            *_parameters(options_class, may_lack=complete is not None),
            _keyword("as_json", bool, typer.Option(False, "--json", help=json_help)),
            _keyword("verbose", bool, typer.Option(False, "--verbose", help=VERBOSE_HELP)),
        ]
        invoke.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        invoke.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        first, break_, rest = inspect.cleandoc(run.__doc__ or "").partition("\n\n")
        invoke.__doc__ = " ".join(first.splitlines()) + break_ + rest  # the list of commands shows the first
        invoke.options_class = options_class  # type: ignore[attr-defined]
        return invoke

    return decorate


def command_class(invoke: Callable[..., None]) -> type[TyperCommand]:
    """The class with which typer parses the command's arguments."""
    options_class: type[Options] = invoke.options_class  # type: ignore[attr-defined]

    class Command(TyperCommand):
        options_class = invoke.options_class  # type: ignore[attr-defined]

        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            try:
                return self._parse(ctx, args)
            except UsageError as error:
                error.ctx = error.ctx or ctx  # some have none, and the message names the command
                raise

        def _parse(self, ctx: Any, args: list[str]) -> list[str]:
            end = args.index("--") if "--" in args else len(args)
            words = _with_empty_values(options_class, _with_new_flags(options_class, args[:end]))
            flags = {word.partition("=")[0] for word in words}
            ctx.meta[BY_FLAG] = {
                entry.name for entry in _either(options_class) if entry.metadata["flag"] in flags
            }
            if not ctx.resilient_parsing:  # of shell completion
                _check_values(self.get_params(ctx), words)
                ctx.allow_extra_args = True  # they raise the error below
            words += args[end:]
            try:
                rest = super().parse_args(ctx, [*words])
            except MissingParameter as error:
                given, _, _ = self.make_parser(ctx).parse_args([*words])
                missing = [entry for entry in self.get_params(ctx) if _is_missing(entry, given)]
                error.missing = sorted(missing, key=lambda entry: entry.param_type_name)  # arguments first
                raise
            if rest and not ctx.resilient_parsing:
                raise UsageError(f"unexpected argument{'s' if len(rest) > 1 else ''}: {', '.join(rest)}.")
            for name in ctx.meta[BY_FLAG]:
                ctx.params[name] = ctx.params.pop(name + FLAG_SUFFIX)
            return rest

        def get_params(self, ctx: Any) -> list[Any]:
            by_flag = ctx.meta.get(BY_FLAG, set())
            unused = {
                entry.name if entry.name in by_flag else entry.name + FLAG_SUFFIX
                for entry in _either(options_class)
            }
            return without_types_of_switches(
                entry for entry in super().get_params(ctx) if entry.name not in unused
            )

    return Command


def without_types_of_switches(parameters: Iterable[Any]) -> list[Any]:
    """The parameters of a command; the help shows no type of a switch, as it takes no value."""
    parameters = list(parameters)
    for entry in parameters:
        if getattr(entry, "is_flag", False):
            entry.metavar = ""
    return parameters


# -- from the words of the command line to the options ---------------------------------------------------


def _with_new_flags(options_class: type[Options], words: list[str]) -> list[str]:
    """The words with current flags in place of earlier ones. Writes a remark for each earlier flag.

    Raises `OptionError` if an option is given by both flags.
    """
    renamed = {
        "--" + old.replace("_", "-"): flag_of(entry)
        for entry in fields(options_class)
        for old in entry.metadata["old"]
    }
    flags = {word.partition("=")[0] for word in words}
    found = []
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in renamed:
            if renamed[flag] in flags:
                raise OptionError(f"{flag} is now {renamed[flag]}: give one of them.")
            remark(f"{flag} is now {renamed[flag]}.")
        found.append(renamed.get(flag, flag) + equals + value)
    return found


def _with_empty_values(options_class: type[Options], words: list[str]) -> list[str]:
    """`--resume` without a value as `--resume=`."""
    optional = {flag_of(entry) for entry in fields(options_class) if entry.metadata["value_is_optional"]}
    return [
        f"{word}=" if word in optional and following.startswith("-") else word
        for word, following in zip(words, [*words[1:], "--"], strict=False)
    ]


def _check_values(parameters: Sequence[Any], words: Sequence[str]) -> None:
    """Raise `UsageError` for an option without a value, such as one that is followed by another option."""
    takes_value = {
        flag
        for entry in parameters
        if entry.param_type_name == "option" and not entry.is_flag
        for flag in entry.opts
    }
    following = iter(words)
    for word in following:
        if word not in takes_value:
            continue
        value = next(following, None)
        if value is None:
            raise UsageError(f"{word} needs a value.")
        if value.startswith("--"):
            raise UsageError(
                f"{word} needs a value, and {value} follows, which looks like an option.\n"
                f"Give a value, or write {word}={value} if this is the value."
            )


def _is_missing(parameter: Any, given: Mapping[str, Any]) -> bool:
    return parameter.required and given.get(parameter.name) in (None, ())


def _values(
    options_class: type[Options], values: dict[str, Any], context: typer.Context, *, only_given: bool
) -> dict[str, Any]:
    """The value of each option or, with `only_given`, of those on the command line."""
    found = {}
    for entry in fields(options_class):
        source = getattr(context.get_parameter_source(entry.name), "name", "DEFAULT")
        if only_given and source == "DEFAULT" and entry.name not in context.meta[BY_FLAG]:
            continue
        value = values[entry.name]
        value = tuple(value) if isinstance(value, list) else value
        if entry.metadata["value_is_optional"]:
            value = value is not None and (value or True)
        found[entry.name] = value
    return found


# -- from the options to the parameters ------------------------------------------------------------------


def _either(options_class: type[Options]) -> list[Field[Any]]:
    """The positional arguments that also have a flag."""
    return [
        entry for entry in fields(options_class) if entry.metadata["positional"] and entry.metadata["flag"]
    ]


def _parameters(options_class: type[Options], *, may_lack: bool) -> list[inspect.Parameter]:
    hints = get_type_hints(options_class)
    parameters = []
    for group, entries in sections(options_class).items():
        for entry in entries:
            default, annotation = _default(entry, hints[entry.name])
            declared = _declared(
                entry, group, ... if entry.metadata["required"] and not may_lack else default
            )
            parameters.append(_keyword(entry.name, annotation, declared))
    for entry in _either(options_class):
        hidden = typer.Option(None, entry.metadata["flag"], hidden=True)
        parameters.append(_keyword(entry.name + FLAG_SUFFIX, str | None, hidden))
    return parameters


def _declared(entry: Field[Any], group: str | None, default: Any) -> Any:
    """The argument or option of typer."""
    complete = completion_of(entry)
    flag, choices, help = entry.metadata["flag"], "|".join(entry.metadata["choices"]), entry.metadata["help"]
    if name := entry.metadata["positional"]:
        help += f" Also as {flag}." if flag else ""
        metavar = choices or name
        return typer.Argument(
            default, help=help, metavar=metavar, show_default=False, autocompletion=complete
        )
    return typer.Option(
        default,
        flag or flag_of(entry),
        help=help,
        metavar=choices or entry.metadata["metavar"] or None,
        show_default=not isinstance(default, list) and default not in (None, ...),
        rich_help_panel=group,
        autocompletion=complete,
    )


def _default(entry: Field[Any], hint: Any) -> tuple[Any, Any]:
    """Default and type in the form that typer expects."""
    if entry.metadata["value_is_optional"]:
        return None, str | None
    if isinstance(entry.default, tuple):
        return list(entry.default), list[bool] if hint == tuple[bool, ...] else list[str]
    return entry.default, hint


def _keyword(name: str, annotation: Any, declared: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=declared, annotation=annotation)
