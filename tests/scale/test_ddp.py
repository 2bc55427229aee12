"""Training on two and three ranks that have a copy of the policy each ends as on one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dpo_cache
from dpo_cache.lm import policy
from dpo_cache.lm.forest.layout import count_forest_tokens
from dpo_cache.lm.self_check import AttentionChoice
from dpo_cache.losses.objective import Objective, PairLogps
from dpo_cache.training import inputs, pair_logps
from dpo_cache.training.ranks import Ranks
from dpo_cache.types import ScoredPair
from tests.conftest import make_llama, make_tokenizer
from tests.lm.families import make_model
from tests.scale.ranks import run_ranks
from tests.scale.steps import Steps, gap_of, make_cache, run_steps

MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": make_llama,
    "tied": lambda: make_llama(tie_word_embeddings=True),
    "mixture": lambda: make_model("mixtral"),
}
LAYERS = {"place": "inputs=host", "budget_tokens": "100"}
# the name of a model, and options
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"eval_pairs": "heldout"}),
    "several forests": ("llama", {"budget_tokens": "100", "batch_size": 7, "max_steps": 4}),
    # under seed 0 a gradient is about as small as AdamW's epsilon, which makes its rounding a change of the weight
    "fewer pairs than ranks": ("llama", {"batch_size": 1, "seed": 1}),
    "every pair split": ("llama", {"budget_tokens": "20", "batch_size": 3}),
    "some pairs split": ("llama", {"budget_tokens": "70", "batch_size": 5}),
    "aot": ("llama", {"loss": ("aot",), "eval_pairs": "heldout"}),
    "aot in several forests": ("llama", {"loss": ("aot",), "budget_tokens": "60", "batch_size": 7}),
    "aot of fewer pairs than ranks": ("llama", {"loss": ("aot",), "batch_size": 2}),
    "weighted losses": (
        "llama",
        {"loss": ("sigmoid", "sft:0.5"), "wpo": "clipped", "ld_alpha": 0.4, "eval_pairs": "heldout"},
    ),
    "adapter": ("llama", {"lora_r": 4, "lr": 1e-2, "eval_pairs": "heldout"}),
    "tied weights": ("tied", {"budget_tokens": "100"}),
    "router loss": ("mixture", {"router_aux_loss_coef": 0.1, "eval_pairs": "heldout"}),
    "router loss in several forests": ("mixture", {"router_aux_loss_coef": 0.1, "budget_tokens": "60"}),
    "layer by layer": ("llama", {**LAYERS, "eval_pairs": "heldout"}),
    "layer by layer, fewer pairs than ranks": ("llama", {**LAYERS, "batch_size": 1}),
    "layer by layer, aot": ("llama", {**LAYERS, "loss": ("aot",), "batch_size": 2}),
    "layer by layer, gradients on the host": ("tied", {**LAYERS, "place": "gradients=host,inputs=host"}),
    "layer by layer, no gradients kept": ("tied", {**LAYERS, "memory": "least", "max_grad_norm": 0.0}),
    "layer by layer, router loss": ("mixture", {**LAYERS, "router_aux_loss_coef": 0.1}),
    "layer by layer, adapter": ("llama", {**LAYERS, "lora_r": 4, "lr": 1e-2}),
}
for _, _options in CASES.values():
    if _options.get("memory"):
        _options.pop("place", None)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The cache of a model's pairs, made once."""
    made: dict[str, str] = {}

    def cache_of(model: str) -> str:
        if model not in made:
            made[model] = make_cache(tmp_path_factory.mktemp(model), MODELS[model]())
        return made[model]

    return cache_of


ON_TWO = ("plain", "fewer pairs than ranks", "some pairs split", "layer by layer", "adapter", "router loss")


@pytest.mark.rotating(3)
@pytest.mark.parametrize(("case", "size"), [*((case, 3) for case in CASES), *((case, 2) for case in ON_TWO)])
def test_losses_and_weights_are_those_of_one_rank(
    caches: Callable[[str], str], expected: Callable[[str], Steps], case: str, size: int
) -> None:
    model, options = CASES[case]
    check_same(run_ranks(run_steps, size, caches(model), options), expected(case))


@pytest.fixture(scope="module")
def expected(caches: Callable[[str], str]) -> Callable[[str], Steps]:
    """The run of a case on one rank, made once."""
    made: dict[str, Steps] = {}

    def run(case: str) -> Steps:
        if case not in made:
            model, options = CASES[case]
            (made[case],) = run_ranks(run_steps, 1, caches(model), options)
        return made[case]

    return run


def check_same(found: list[Steps], expected: Steps) -> None:
    """Every rank has the same numbers; they are those of one rank, up to rounding."""
    first = found[0]
    assert [one.error for one in (*found, expected)] == [""] * (len(found) + 1)
    for other in found[1:]:
        assert other.lines == first.lines and (other.gap, other.settings) == (first.gap, first.settings)
        assert all(torch.equal(values, first.weights[name]) for name, values in other.weights.items())
    for line, one in zip(first.lines, expected.lines, strict=True):
        assert line.keys() == one.keys() and line["num_pairs"] == one["num_pairs"]
        # before the first update, margins are zero up to rounding
        signs = {"rewards/accuracies"} if abs(one["rewards/margins"]) < 1e-5 else set()
        for name in line.keys() - {"num_tokens"} - signs:
            assert line[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5), name
    assert first.num_compared == expected.num_compared
    assert first.gap == pytest.approx(expected.gap, abs=1e-5)
    change = expected.largest_change
    assert change > 1e-3 and gap_of(first.weights, expected.weights) < min(1e-5, change / 100)


# -- errors, and memory ------------------------------------------------------------------------------------

ON_ONE = 1  # the rank on which something goes wrong


def with_changed_runs(change: Callable[..., Any], *args: Any) -> Steps:
    """`run_steps`, where `change` is called with the original function in place of each run of the model."""
    run = policy.completion_logps
    policy.completion_logps = lambda *given, **named: change(run, *given, **named)
    try:
        return run_steps(*args)
    finally:
        policy.completion_logps = run


def run_with_wrong_loss(ranks: Ranks, cache: str, options: dict[str, Any]) -> Steps:
    """The log-prob of one answer is not finite, on the rank that runs it."""
    compute = pair_logps.pair_logps

    def spoil(objective: Objective, scored: list[ScoredPair], *args: Any) -> PairLogps:
        found = compute(objective, scored, *args)
        is_wrong = torch.tensor([one.pair.row == WRONG_ROW for one in scored])
        return replace(found, rejected=found.rejected.masked_fill(is_wrong, torch.nan))

    pair_logps.pair_logps = spoil
    try:
        return run_steps(ranks, cache, {**options, "step_zero": "off"})
    finally:
        pair_logps.pair_logps = compute


WRONG_ROW = 4


@pytest.mark.parametrize("place", [{}, LAYERS], ids=["plain", "layer by layer"])
def test_a_loss_that_is_not_finite_is_the_same_error_on_all_ranks(
    caches: Callable[[str], str], place: dict[str, Any]
) -> None:
    found = run_ranks(run_with_wrong_loss, 2, caches("llama"), {**place, "max_steps": 4})
    assert found[0].error == found[1].error
    assert f"row {WRONG_ROW} of the data made it. The weights were not updated." in found[0].error
    assert all(torch.equal(values, found[1].weights[name]) for name, values in found[0].weights.items())


def test_a_wrong_reference_is_the_same_error_on_all_ranks(
    caches: Callable[[str], str], tmp_path: Path
) -> None:
    make_llama(seed=3).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    options = {"model": str(tmp_path / "other"), "step_zero": "strict"}
    found = run_ranks(run_steps, 2, caches("llama"), options)
    assert found[0].error.startswith("StepZeroError: step zero: the policy should start as the reference")
    assert found[1].error == found[0].error


def test_the_base_of_an_adapter_is_compared_once(caches: Callable[[str], str], tmp_path: Path) -> None:
    cache = caches("llama")
    dpo_cache.train(cache, str(tmp_path / "run"), pairs="pairs", lora_r=2, max_steps=1, lr=1e-2)
    options = {"model": str(tmp_path / "run/model"), "max_steps": 1}
    found = run_ranks(run_steps, 2, cache, options)
    (expected,) = run_ranks(run_steps, 1, cache, options)
    checked = [[text for text in one.remarks if "adapter switched off" in text] for one in (*found, expected)]
    assert len(checked[0]) == 1 and checked[0] == checked[1]
    assert re.sub("gap [^ ]+ nats", "", checked[0][0]) == re.sub("gap [^ ]+ nats", "", checked[2][0])


def run_on_other_disks(ranks: Ranks, places: list[dict[str, str]], options: dict[str, Any]) -> Steps:
    """Each rank finds another cache, or another model, at the same place."""
    given = {"cache": places[0]["cache"], **places[ranks.index]}
    try:
        return run_steps(
            ranks, given.pop("cache"), {**options, **given}, shards=options.get("parallel") == "fsdp"
        )
    except dpo_cache.DpoCacheError as error:
        return Steps(error=f"{type(error).__name__}: {error}")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_that_read_other_inputs_do_not_train_together(
    caches: Callable[[str], str], tmp_path: Path, parallel: str
) -> None:
    cache, options = caches("llama"), {"parallel": parallel, "step_zero": "off"}
    changed = make_cache(tmp_path, make_llama(), num_rows=14)
    make_llama(seed=3).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    others = {"pairs_digest": {"cache": changed}, "start.differing": {"model": str(tmp_path / "other")}}
    for differing, other in others.items():
        found = run_ranks(run_on_other_disks, 2, [{"cache": cache}, other], options)
        assert found[0].error == found[1].error
        first, *rest = found[0].error.splitlines()
        assert re.fullmatch(
            "TrainingError: rank 1, on .*, has other inputs than rank 0; they differ in", first
        )
        assert any(line.startswith(f"  {differing}: ") for line in rest)


def run_out(ranks: Ranks, cache: str, options: dict[str, Any]) -> Steps:
    """One rank has memory for so many tokens; with gradients, from a later run on."""
    num_runs = [0]

    def fail(run: Callable[..., Any], model: Any, completions: Any, *args: Any, **named: Any) -> Any:
        num_runs[0] += 1
        is_large = count_forest_tokens(completions) > options["most"]
        if ranks.index == ON_ONE and is_large and num_runs[0] > options["after"]:
            raise torch.OutOfMemoryError("out of memory")
        return run(model, completions, *args, **named)

    try:
        return with_changed_runs(fail, ranks, cache, options["options"])
    except RuntimeError as error:  # of a rank that waits for one that has ended
        return Steps(error=f"lost: {error}")


@pytest.mark.parametrize("loss", ["sigmoid", "aot"])
def test_ranks_agree_on_less_at_once_where_one_runs_out_of_memory_before_the_first_update(
    caches: Callable[[str], str], loss: str
) -> None:
    options = {"loss": (loss,), "batch_size": 8, "eval_pairs": "heldout"}
    limited = {"most": 64, "after": 0, "options": options}
    found = run_ranks(run_out, 2, caches("llama"), limited)
    (expected,) = run_ranks(run_steps, 1, caches("llama"), options)
    check_same(found, expected)
    assert found[0].settings["micro_tokens"] <= 64 < expected.settings["micro_tokens"]
    assert any("the step is repeated" in remark for remark in found[0].remarks)


def test_running_out_of_memory_in_a_step_of_all_ranks_ends_the_run(caches: Callable[[str], str]) -> None:
    options = {"batch_size": 8, "step_zero": "off"}
    found = run_ranks(run_out, 2, caches("llama"), {"most": 30, "after": 2, "options": options})
    assert re.fullmatch(
        "TrainingError: out of memory on rank 1, in a run that needs all ranks at once, so none can repeat it"
        r"\.\nContinue from the last checkpoint with `resume` and `memory` small \(.*\), `parallel` fsdp, or "
        "`budget_tokens` 512 with `gradient_checkpointing` full.",
        found[1].error,
    )
    assert found[0].error.startswith("lost: ")


# -- models that do not take the forest --------------------------------------------------------------------


def run_rows(ranks: Ranks, cache: str, options: dict[str, Any], *, shards: bool = False) -> Steps:
    """A model that runs one row at a time: several calls of the decoder in each run."""
    choose = inputs.choose_attention

    def choose_rows(*args: Any, **named: Any) -> AttentionChoice:
        return replace(choose(*args, "rows", **named), max_rows=1)

    inputs.choose_attention = choose_rows
    try:
        return run_steps(ranks, cache, options, shards=shards)
    finally:
        inputs.choose_attention = choose


def test_a_model_that_runs_one_row_at_a_time(caches: Callable[[str], str]) -> None:
    options = {"batch_size": 5, "budget_tokens": "100"}
    (expected,) = run_ranks(run_rows, 1, caches("llama"), options)
    check_same(run_ranks(run_rows, 3, caches("llama"), options), expected)
