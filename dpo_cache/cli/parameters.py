"""A command's parameters, made from its option class, so that each option is written down once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Any, get_type_hints

import typer

from dpo_cache.cli.signals import Interrupted
from dpo_cache.options.base import Options


def command(
    options_class: type[Options],
    *,
    json_help: str,
    complete: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make `run(options, as_json)` a typer command with the fields of the class as its options, and `--json`.

    `complete` adds to the options that were given on the command line what they leave open.
    """
    hints = get_type_hints(options_class)

    def decorate(run: Callable[..., None]) -> Callable[..., None]:
        def invoke(**values: Any) -> None:
            as_json, context = values.pop("as_json"), values.pop("context")
            values = {
                name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
            }
            options = options_class(**(complete(_given(values, context)) if complete else values))
            try:
                run(options, as_json)
            except KeyboardInterrupt as interrupt:
                raise Interrupted from interrupt

        parameters, group = (
            [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)],
            None,
        )
        for entry in fields(options_class):  # type: ignore[arg-type]
            group = options_class.groups.get(entry.name, group)
            parameters.append(_parameter(entry, hints[entry.name], group, may_lack=complete is not None))
        json_option = typer.Option(False, "--json", help=json_help)
        parameters.append(
            inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=json_option, annotation=bool)
        )
        invoke.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        invoke.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        invoke.__doc__ = run.__doc__
        return invoke

    return decorate


def _given(values: dict[str, Any], context: typer.Context) -> dict[str, Any]:
    """The options that stand on the command line, without those that have their default."""
    sources = {name: context.get_parameter_source(name) for name in values}
    return {
        name: value
        for name, value in values.items()
        if getattr(sources[name], "name", "DEFAULT") != "DEFAULT"
    }


def _parameter(entry: Field[Any], hint: Any, group: str | None, *, may_lack: bool) -> inspect.Parameter:
    default = list(entry.default_factory()) if callable(entry.default_factory) else entry.default
    is_list = isinstance(default, list)
    annotation = (list[bool] if hint == tuple[bool, ...] else list[str]) if is_list else hint
    choices = entry.metadata["choices"]
    if entry.metadata["positional"]:
        shown = "|".join(choices) or entry.metadata["positional"]
        needed = ... if entry.metadata["required"] else default
        declared = typer.Argument(needed, help=entry.metadata["help"], metavar=shown, show_default=False)
        return inspect.Parameter(
            entry.name, inspect.Parameter.KEYWORD_ONLY, default=declared, annotation=annotation
        )
    flag = entry.metadata["flag"] or "--" + entry.name.replace("_", "-")
    declared = typer.Option(
        ... if entry.metadata["required"] and not may_lack else default,
        flag,
        help=entry.metadata["help"],
        metavar="|".join(choices) or entry.metadata["metavar"] or None,
        show_default=not is_list and default is not None,
        rich_help_panel=group,
    )
    return inspect.Parameter(
        entry.name, inspect.Parameter.KEYWORD_ONLY, default=declared, annotation=annotation
    )
