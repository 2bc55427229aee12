"""No command takes an option and leaves it aside."""

import ast
import inspect
from dataclasses import fields
from types import ModuleType

import pytest

from dpo_cache import cache_options, eval_options, options, sweep_options, train_options
from dpo_cache.cli import compact, copying, diff, eval_, export, gc, import_, ls, merge, precompute, pull, push, rm, sweep, train, verify

COMMANDS = {
    options.PrecomputeOptions: [precompute],
    train_options.TrainOptions: [train],
    eval_options.EvalOptions: [eval_],
    sweep_options.SweepOptions: [sweep],
    cache_options.LsOptions: [ls],
    cache_options.VerifyOptions: [verify],
    cache_options.CompactOptions: [compact],
    cache_options.GcOptions: [gc],
    cache_options.MergeOptions: [merge],
    cache_options.DiffOptions: [diff],
    cache_options.RmOptions: [rm],
    cache_options.PullOptions: [pull, copying],
    cache_options.PushOptions: [push, copying],
    cache_options.ExportOptions: [export],
    cache_options.ImportOptions: [import_],
}


def read_from_options(modules: list[ModuleType]) -> set[str]:
    """Attributes of `options` that the modules read; `*` where they hand on all of it."""
    nodes = [node for module in modules for node in ast.walk(ast.parse(inspect.getsource(module)))]
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "options"}
    return attributes | {"*" for node in nodes if isinstance(node, ast.Call) and ast.unparse(node) == "asdict(options)"}


@pytest.mark.parametrize("options_class", COMMANDS, ids=lambda kind: kind.__name__)
def test_every_option_is_read(options_class: type[options.Options]) -> None:
    found = read_from_options(COMMANDS[options_class])
    assert "*" in found or {entry.name for entry in fields(options_class)} <= found  # type: ignore[arg-type]


def test_every_command_is_looked_at() -> None:
    kinds = {
        kind
        for kind in {**vars(options), **vars(cache_options), **vars(train_options), **vars(eval_options), **vars(sweep_options)}.values()
        if isinstance(kind, type) and issubclass(kind, options.Options)
    }
    assert set(COMMANDS) == kinds - {options.Options, cache_options.CopyOptions}
