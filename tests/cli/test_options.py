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
from dpo_cache.errors import OptionError
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


@pytest.mark.parametrize(
    ("given", "num_ranks", "problem"),
    [
        ({"parallel": "fsdp", "optimizer": "adafactor"}, 1, ""),
        ({"parallel": "fsdp", "optimizer": "adafactor"}, 2, "`optimizer` adafactor and `parallel` fsdp"),
        ({"parallel": "fsdp", "optimizer": "adamw-8bit-paged"}, 2, "`optimizer` adamw-8bit-paged and `parallel` fsdp"),
        ({"parallel": "fsdp", "optimizer": "adamw-bf16"}, 2, ""),
        ({"parallel": "fsdp", "memory": "small"}, 2, "`memory` small and `parallel` fsdp"),
        ({"parallel": "fsdp", "memory": "least", "lora_r": 2}, 2, "`memory` least and `parallel` fsdp"),
        ({"parallel": "fsdp", "place": "weights=host,optimizer=host,gradients=host"}, 2, "and `parallel` fsdp"),
        ({"parallel": "fsdp", "place": "gradients=none", "max_grad_norm": 0}, 2, ""),
        ({"parallel": "fsdp", "place": "inputs=host"}, 2, ""),
        ({"parallel": "fsdp", "memory": "fast"}, 2, ""),
        ({"parallel": "ddp", "memory": "least", "optimizer": "adafactor"}, 2, ""),
        ({"device": "mps"}, 1, ""),
        ({"device": "mps"}, 2, "`device` mps: 2 processes train on CUDA devices or on the CPU"),
    ],
)  # fmt: skip
def test_what_several_processes_can_use(given: dict, num_ranks: int, problem: str) -> None:
    options = TrainOptions(cache="cache", output="run", **given)
    if not problem:
        options.check_ranks(num_ranks)
        return
    with pytest.raises(OptionError) as error:
        options.check_ranks(num_ranks)
    assert problem in str(error.value)
