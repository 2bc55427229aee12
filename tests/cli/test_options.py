"""Every command reads each of its options."""

import ast
import inspect
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import dpo_cache.options
from dpo_cache import upkeep
from dpo_cache.cli import (
    compact,
    diff,
    eval_,
    export,
    gc,
    import_,
    ls,
    merge,
    plan,
    precompute,
    pull,
    push,
    rm,
    sweep,
    train,
    verify,
)
from dpo_cache.options.base import Options
from dpo_cache.options.evaluate import EvalOptions
from dpo_cache.options.exchange import ExportOptions, ImportOptions
from dpo_cache.options.losses import LossOptions
from dpo_cache.options.plan import PlanOptions
from dpo_cache.options.precompute import PrecomputeOptions
from dpo_cache.options.sweep import SweepOptions
from dpo_cache.options.train import TrainOptions
from dpo_cache.options.upkeep import (
    CompactOptions,
    CopyOptions,
    DiffOptions,
    GcOptions,
    LsOptions,
    MergeOptions,
    PullOptions,
    PushOptions,
    RmOptions,
    VerifyOptions,
)

COMMANDS = {
    PlanOptions: [plan],
    PrecomputeOptions: [precompute],
    TrainOptions: [train],
    EvalOptions: [eval_],
    SweepOptions: [sweep],
    LsOptions: [ls],
    VerifyOptions: [verify, upkeep],
    CompactOptions: [compact],
    GcOptions: [gc],
    MergeOptions: [merge],
    DiffOptions: [diff],
    RmOptions: [rm],
    PullOptions: [pull],
    PushOptions: [push],
    ExportOptions: [export],
    ImportOptions: [import_],
}


def read_from_options(modules: list[ModuleType]) -> set[str]:
    """Attributes of `options` that the modules read; `*` if they pass on all of it."""
    nodes = [node for module in modules for node in ast.walk(ast.parse(inspect.getsource(module)))]
    attributes = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "options"
    }
    return attributes | {
        "*" for node in nodes if isinstance(node, ast.Call) and ast.unparse(node) == "asdict(options)"
    }


@pytest.mark.parametrize("options_class", COMMANDS, ids=lambda kind: kind.__name__)
def test_every_option_is_read(options_class: type[Options]) -> None:
    found = read_from_options(COMMANDS[options_class])
    assert "*" in found or {entry.name for entry in fields(options_class)} <= found  # type: ignore[arg-type]


def test_every_command_is_checked() -> None:
    folder = Path(dpo_cache.options.__file__).parent
    kinds = {
        kind
        for path in folder.glob("*.py")
        for kind in vars(import_module(f"dpo_cache.options.{path.stem}")).values()
        if isinstance(kind, type) and issubclass(kind, Options) and not kind.__name__.startswith("_")
    }
    assert set(COMMANDS) == kinds - {Options, CopyOptions, LossOptions}
