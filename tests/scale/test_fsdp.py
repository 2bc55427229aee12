"""Training on two and three ranks that have a shard of every weight each ends as on one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import dpo_cache
from dpo_cache.errors import DpoCacheError
from dpo_cache.lm.layerwise.streamed import StreamedWeights
from dpo_cache.options.train import TrainOptions
from dpo_cache.training.gradient_check import GradientCheck, Sketch
from dpo_cache.training.output.checkpoint import save_checkpoint
from dpo_cache.training.output.run_start import find_checkpoints
from dpo_cache.training.ranks import Ranks
from dpo_cache.training.setup import open_setup
from tests.conftest import make_llama
from tests.scale.ranks import run_ranks
from tests.scale.steps import SHARED, Steps, gap_of, make_cache, run_steps
from tests.scale.test_ddp import CASES as COPIES
from tests.scale.test_ddp import MODELS, check_same, run_rows

Caches = Callable[[str], str]

FREED = {"place": "gradients=none", "max_grad_norm": 0.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: case for name, case in COPIES.items() if not name.startswith("layer by layer")},
    # weights change by 1e-3: Adam's first update of a tiny gradient magnifies its rounding
    "fewer pairs than ranks": ("llama", {"batch_size": 1, "lr": 4e-4}),
    "recomputed layers": ("llama", {"gradient_checkpointing": "full", "budget_tokens": "100"}),
    "cheap outputs computed again": ("llama", {"gradient_checkpointing": "cheap"}),
    "no gradients kept": ("tied", {**FREED, "eval_pairs": "heldout"}),
    "no gradients kept, several forests": ("tied", {**FREED, "budget_tokens": "100"}),
    "no gradients kept, recomputed layers": ("llama", {**FREED, "gradient_checkpointing": "selective"}),
    "an adapter, no gradients kept": ("llama", {**FREED, "lora_r": 4, "lr": 1e-2}),
}


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Caches:
    """The cache of a model's pairs, made once."""
    made: dict[str, str] = {}

    def cache_of(model: str) -> str:
        if model not in made:
            made[model] = make_cache(tmp_path_factory.mktemp(model), MODELS[model]())
        return made[model]

    return cache_of


@pytest.fixture(scope="module")
def expected(caches: Caches) -> Callable[[str], Steps]:
    """The run of a case on one rank, made once; with all gradients, which does not change the result."""
    made: dict[str, Steps] = {}

    def run(case: str) -> Steps:
        if case not in made:
            model, options = CASES[case]
            (made[case],) = run_ranks(run_steps, 1, caches(model), without_place(options))
        return made[case]

    return run


def without_place(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "place"}


def run_shards(ranks: Ranks, cache: str, options: dict[str, Any]) -> Steps:
    return run_steps(ranks, cache, options, shards=True)


# each case on 2 or 3 ranks, and a few on both
SIZES = [(case, 2 + place % 2) for place, case in enumerate(CASES)]
SIZES += [("plain", 3), ("several forests", 2), ("some pairs split", 3), ("adapter", 2)]


@pytest.mark.rotating(3)
@pytest.mark.parametrize(("case", "size"), sorted({*SIZES}))
def test_losses_and_weights_are_those_of_one_rank(
    caches: Caches, expected: Callable[[str], Steps], case: str, size: int
) -> None:
    model, options = CASES[case]
    check_same(run_ranks(run_shards, size, caches(model), options), expected(case))


@pytest.mark.parametrize("options", [{}, FREED], ids=["plain", "no gradients kept"])
def test_a_model_that_runs_one_row_at_a_time(caches: Caches, options: dict[str, Any]) -> None:
    options = {**options, "batch_size": 5, "budget_tokens": "100"}
    (expected,) = run_ranks(run_rows, 1, caches("llama"), without_place(options))
    check_same(run_ranks(run_rows_of_shards, 2, caches("llama"), options), expected)


def run_rows_of_shards(ranks: Ranks, cache: str, options: dict[str, Any]) -> Steps:
    """The decoder is called several times in each run, and each call adds up gradients."""
    return run_rows(ranks, cache, options, shards=True)


@pytest.mark.rotating(3)
@pytest.mark.parametrize(
    "options",
    [{"rounding": "stochastic"}, {"rounding": "compensated"}, {"lora_r": 4, "lr": 1e-2}],
    ids=["stochastic", "compensated", "adapter"],
)
def test_bf16_weights_learn_as_on_one_rank(caches: Caches, options: dict[str, Any]) -> None:
    options = {**options, "precision": "bf16", "step_zero": "off", "max_steps": 6}
    in_fp32 = {**options, "precision": "fp32", "rounding": "auto"}

    def losses(steps: Steps) -> list[float]:
        return [line["loss"] for line in steps.lines]

    def gap(some: list[float], others: list[float]) -> float:
        return max(abs(one - other) for one, other in zip(some, others, strict=True))

    exact, rounded = [], []
    for seed in range(3):  # how far rounding takes the losses on one rank differs from run to run
        for values, chosen in ((exact, in_fp32), (rounded, options)):
            (one,) = run_ranks(run_steps, 1, caches("llama"), {**chosen, "seed": seed})
            values.append(losses(one))
    found, other = run_ranks(run_shards, 2, caches("llama"), options)
    assert found.lines == other.lines and gap_of(found.weights, other.weights) == 0
    assert 0 < gap(losses(found), exact[0]) <= 2 * max(map(gap, rounded, exact))


# -- checks before the first step ----------------------------------------------------------------------------


def run_without_forest(ranks: Ranks, cache: str, options: dict[str, Any], shards: bool) -> Steps:
    """A layer fails in the forest, in the midst of a pass; the model runs as rows instead."""
    forward = LlamaDecoderLayer.forward

    def fail(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if layer.self_attn.layer_idx == 1 and kwargs.get("forest_plan") is not None:
            raise ValueError("no forest")
        return forward(layer, *args, **kwargs)

    LlamaDecoderLayer.forward = fail
    try:
        return run_steps(ranks, cache, options, shards=shards)
    finally:
        LlamaDecoderLayer.forward = forward


def test_a_check_that_fails_in_a_layer_leaves_the_shards_in_order(caches: Caches) -> None:
    options = {"budget_tokens": "100"}
    (expected,) = run_ranks(run_without_forest, 1, caches("llama"), options, False)
    found = run_ranks(run_without_forest, 2, caches("llama"), options, True)
    check_same(found, expected)


def run_with_wrong_gradient(ranks: Ranks, cache: str, options: dict[str, Any]) -> Steps:
    """On one rank, recomputation gives another gradient in the rows of that rank."""
    gradient = GradientCheck._gradient

    def change(check: GradientCheck, mode: str) -> dict[str, Sketch]:
        found = gradient(check, mode)
        if ranks.index == 1 and mode == "full":
            for sketch in found.values():
                sketch.sums += 1.0
        return found

    GradientCheck._gradient = change
    try:
        return run_steps(ranks, cache, options, shards=True)
    finally:
        GradientCheck._gradient = gradient


def test_a_wrong_gradient_in_the_rows_of_one_rank_counts_for_all(caches: Caches) -> None:
    found = run_ranks(run_with_wrong_gradient, 2, caches("llama"), {"gradient_checkpointing": "full"})
    assert found[0].settings["mode"] == found[1].settings["mode"] != "full"
    assert any("full gives another gradient than none" in remark for remark in found[0].remarks)


# -- loading -----------------------------------------------------------------------------------------------


def load_and_watch(ranks: Ranks, cache: str) -> tuple[list[int], list[int], dict[str, torch.Size]]:
    """While each layer is cut: how many other layers have whole weights, and how many have none yet. And the
    shapes of this rank's shards.
    """
    ranks.shards = True
    whole: list[int] = []
    empty: list[int] = []
    keep = StreamedWeights.keep

    def watch(weights: StreamedWeights, layer: torch.nn.Module) -> None:
        keep(weights, layer)
        others = [next(one.parameters()) for one in weights.layers if one is not layer]
        whole.append(sum(not (one.is_meta or isinstance(one, DTensor)) for one in others))
        empty.append(sum(one.is_meta for one in others))

    StreamedWeights.keep = watch
    try:
        with open_setup(TrainOptions(cache=cache, **SHARED), lambda _: None, ranks=ranks) as setup:
            assert setup.policy.sharded is not None
            shapes = {name: shard.parameter.shape for name, shard in setup.policy.sharded.shards.items()}
    finally:
        StreamedWeights.keep = keep
    return whole, empty, shapes


def test_a_layer_is_whole_only_while_it_is_cut(caches: Caches) -> None:
    found = run_ranks(load_and_watch, 3, caches("llama"))
    shapes = {name: parameter.shape for name, parameter in make_llama().named_parameters()}
    assert all(whole == [0, 0] and empty == [1, 0] for whole, empty, _ in found)
    for name, shape in shapes.items():
        per_rank = -(-shape[0] // 3)
        for rank, (_, _, shards) in enumerate(found):
            assert shards[name] == (min(per_rank, max(0, shape[0] - per_rank * rank)), *shape[1:])


def refuse(ranks: Ranks, cache: str, options: dict[str, Any]) -> str:
    """The error with which a run of shards does not start."""
    ranks.shards = True
    try:
        with open_setup(TrainOptions(cache=cache, **{**SHARED, **options}), lambda _: None, ranks=ranks):
            return ""
    except DpoCacheError as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.rotating(2)
@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"optimizer": "adafactor"},
            "OptionError: `optimizer` adafactor: it is not tested on shards of weights",
        ),
        (
            {"place": "gradients=host"},
            "OptionError: `memory` auto and `parallel` fsdp: gradients=host needs",
        ),
        (
            {"lora_r": 2, "merge_adapter": True},
            "OptionError: `merge_adapter` and `parallel` fsdp: merging needs",
        ),
    ],
)
def test_what_is_refused_is_the_same_error_on_all_ranks(
    caches: Caches, options: dict[str, Any], problem: str
) -> None:
    found = run_ranks(refuse, 2, caches("llama"), options)
    assert found[0] == found[1] and found[0].startswith(problem)


def train_loaded(ranks: Ranks, cache: str, output: str) -> str:
    try:
        dpo_cache.train(cache, output, model=make_llama(), parallel="fsdp", pairs="pairs")
    except DpoCacheError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_model_in_memory_is_refused(caches: Caches, tmp_path: Path) -> None:
    found = run_ranks(train_loaded, 2, caches("llama"), str(tmp_path / "run"))
    problem = "LlamaForCausalLM in memory: `parallel` fsdp reads weights from files, and this model is loaded"
    assert found[0].startswith(f"OptionError: {problem}") and problem in found[1]


# -- checkpoints -------------------------------------------------------------------------------------------

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "whole": ("tied", {"eval_pairs": "heldout", "sample": 2}),
    "adapter": ("llama", {"lora_r": 3, "lr": 1e-2}),
    "experts": ("mixture", {}),
}


def train_part(
    ranks: Ranks, cache: str, output: str, options: dict[str, Any], stop_after: int | None, resume: bool
) -> bool:
    """Start or resume a run, which stops after a step; whether it has ended."""
    lines: list[dict[str, Any]] = []
    report = dpo_cache.train(
        cache,
        resume=resume,
        parallel="fsdp",
        on_metrics=lines.append,
        should_stop=lambda: bool(lines) and lines[-1]["step"] == stop_after,  # the main rank has lines
        **{**SHARED, "max_steps": 4, **options, "output": output},
    )
    return report.finished


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved model or adapter."""
    (path,) = folder.glob("*model*.safetensors")
    return load_file(path)


def lines_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(caches: Caches, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run on one rank that is not interrupted, made once."""
    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in made:
            model, options = RUNS[name]
            made[name] = tmp_path_factory.mktemp(name) / "run"
            run_ranks(train_part, 1, caches(model), str(made[name]), options, None, False)
        return made[name]

    return run


@pytest.mark.rotating(2)
@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("whole", 2, 1),
        ("whole", 1, 2),
        ("whole", 2, 3),
        ("adapter", 2, 1),
        ("adapter", 1, 3),
        ("experts", 2, 3),
    ],
)
def test_a_run_resumes_on_another_number_of_ranks(
    caches: Caches, uninterrupted: Callable[[str], Path], tmp_path: Path, name: str, first: int, second: int
) -> None:
    (model, options), folder = RUNS[name], tmp_path / "run"
    assert not any(run_ranks(train_part, first, caches(model), str(folder), options, 2, False))
    (checkpoint,) = find_checkpoints(folder)
    kinds = {path.suffix for path in checkpoint.rglob("*") if path.is_file()}
    assert {".safetensors", ".json"} <= kinds <= {".safetensors", ".json", ".jinja"}
    assert all(run_ranks(train_part, second, caches(model), str(folder), options, None, True))
    expected = uninterrupted(name)
    assert gap_of(weights_in(folder / "model"), weights_in(expected / "model")) < 1e-5
    for line, other in zip(lines_in(folder), lines_in(expected), strict=True):
        assert line["step"] == other["step"]
        for key in {"loss", "eval/loss", "grad_norm"} & {*line, *other}:
            assert line[key] == pytest.approx(other[key], rel=1e-5, abs=1e-5)
    if "sample" in options:
        assert (folder / "samples.jsonl").read_text() == (expected / "samples.jsonl").read_text()
    if "lora_r" not in options:
        AutoModelForCausalLM.from_pretrained(folder / "model")


@pytest.mark.rotating(2)
@pytest.mark.parametrize("options", [{}, {"lora_r": 3, "lr": 1e-2}], ids=["whole", "adapter"])
def test_the_best_policy_is_the_one_in_the_model_folder(
    caches: Caches, tmp_path: Path, options: dict[str, Any]
) -> None:
    measured = {"eval_pairs": "heldout", "eval_every": "1", "best": "accuracy", "patience": 1}
    options = {"lr": 1e-3, **options, **measured, "max_steps": 8}
    for size in (1, 2):
        assert all(
            run_ranks(train_part, size, caches("llama"), str(tmp_path / f"{size}"), options, None, False)
        )
        assert not (tmp_path / f"{size}" / "best").exists()
    steps = [[line["step"] for line in lines_in(tmp_path / f"{size}")] for size in (1, 2)]
    assert steps[0] == steps[1] and steps[0][-1] < options["max_steps"]
    found, expected = (weights_in(tmp_path / f"{size}" / "model") for size in (2, 1))
    assert gap_of(found, expected) < options["lr"] / 100


def save_again(ranks: Ranks, cache: str, output: str, options: dict[str, Any], target: str) -> None:
    """Resume a run, and save its state once more, elsewhere."""
    ranks.shards = ranks.size > 1
    given = {**SHARED, "max_steps": 4, **options, "output": output, "resume": True}
    with open_setup(TrainOptions(cache=cache, **given), lambda _: None, ranks=ranks) as setup:
        position = replace(setup.position, step=setup.position.step + 1)
        save_checkpoint(Path(target), setup.policy, setup.optimizer, position, keep=1, ranks=ranks)


@pytest.mark.rotating(2)
@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, (2, 3)),
        ({"precision": "bf16", "rounding": "compensated", "step_zero": "off"}, (3, 1)),
        ({"precision": "bf16", "rounding": "compensated", "step_zero": "off"}, (1, 2)),
        ({"optimizer": "adamw-bf16"}, (3, 2)),
    ],
)
def test_a_checkpoint_has_the_same_bits_on_any_number_of_ranks(
    caches: Caches, tmp_path: Path, options: dict[str, Any], sizes: tuple[int, int]
) -> None:
    cache, folder = caches("tied"), tmp_path / "run"
    run_ranks(train_part, sizes[0], cache, str(folder), options, 1, False)
    run_ranks(save_again, sizes[1], cache, str(folder), options, str(tmp_path / "other"))
    (saved,), (again,) = find_checkpoints(folder), find_checkpoints(tmp_path / "other")
    for file in ("model.safetensors", "optimizer.safetensors"):
        tensors, others = load_file(saved / file), load_file(again / file)
        assert tensors.keys() == others.keys() and tensors
        for name, tensor in tensors.items():
            assert tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]), name
