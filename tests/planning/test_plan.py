"""Which ways a plan names, in which order, and what fits."""

import shlex
from dataclasses import asdict
from typing import Any

import pytest
import torch
import typer

import dpo_cache
from dpo_cache.cli.app import app
from dpo_cache.errors import ModelError, OptionError
from dpo_cache.options.plan import PlanOptions
from dpo_cache.options.train import TrainOptions
from dpo_cache.planning import plan as plan_module
from dpo_cache.planning.counts import Counts
from dpo_cache.planning.layer_major import PhasePeaks
from dpo_cache.planning.parts import LORA_RANK, Parts
from dpo_cache.planning.ways import CONTEXT_BYTES, PROCESS_BYTES, device_need, host_need, methods_of

PEAKS = PhasePeaks(forward=10**8, top=3 * 10**8, backward=2 * 10**8, bottom=10**8, state=10**6)


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted takes seconds, and has tests of its own."""

    def plain(_: Any, method: Any, recomputation: str, tokens: int, *, alike: bool, gradients: int) -> int:
        assert alike and gradients > 0
        return 10**9 * {"cheap": 8, "full": 2}[recomputation] * tokens // 4096

    monkeypatch.setattr(Counts, "plain", plain)
    monkeypatch.setattr(Counts, "layer_major", lambda *_, **__: PEAKS)
    monkeypatch.setattr(Counts, "live_reference", lambda *_, **__: 5 * 10**9)

    class Scoring:
        def __init__(self, *_: Any):
            pass

        def resident(self, tokens: int) -> Parts:
            return Parts(weights=10**9, activations=10**6 * tokens)

        def streamed(self, tokens: int) -> Parts:
            return Parts(activations=10**5 * tokens)

    monkeypatch.setattr(plan_module, "ScoringCounts", Scoring)


def test_ways_come_from_the_fastest_down_with_smaller_settings_where_needed(model_folder: str) -> None:
    report = dpo_cache.plan(model_folder, tflops=1.0, lora_r=8, quantize="4bit")
    found = [(way.memory, way.gradient_checkpointing, way.budget_tokens, way.fits) for way in report.train]
    assert found == [
        ("fast", "cheap", 4096, ["12GiB", "16GiB", "24GiB", "48GiB", "80GiB"]),
        ("fast", "full", 4096, ["8GiB"]),
        ("small", None, 4096, report.cards),
        ("least", None, 4096, report.cards),
    ]
    assert {way.method for way in report.train} == {"LoRA r=8 on 4 bits"}
    assert "--gradient-checkpointing full" in report.train[1].command
    assert "--gradient-checkpointing" not in report.train[0].command
    assert [way.step_seconds for way in report.train] == sorted(way.step_seconds or 0 for way in report.train)
    assert [(way.budget_tokens, way.is_streamed, way.fits) for way in report.precompute] == [
        (32768, False, ["48GiB", "80GiB"]),
        (16384, False, ["24GiB"]),
        (8192, False, ["12GiB", "16GiB"]),
        (4096, False, ["8GiB"]),
    ]
    assert "--budget-tokens 4096" in report.precompute[-1].command
    assert "--budget-tokens" not in report.precompute[0].command


def test_weights_are_streamed_where_nothing_else_fits(model_folder: str) -> None:
    report = dpo_cache.plan(model_folder, tflops=1.0, gpu="1GiB", lora_r=8, quantize="4bit", memory="least")
    (way,) = report.precompute
    assert way.is_streamed and way.fits == ["1GiB"] and "--stream-weights on" in way.command


def test_a_gpu_and_the_host_bound_what_fits(model_folder: str) -> None:
    options = {"tflops": 1.0, "lora_r": 8, "quantize": "4bit", "memory": "small"}
    (way,) = dpo_cache.plan(model_folder, gpu="8GiB", ram="64GiB", **options).train
    assert way.fits == ["8GiB"] and "--memory small" in way.command
    (way,) = dpo_cache.plan(model_folder, gpu="8GiB", ram="1GiB", **options).train
    assert way.fits == [] and way.host_bytes > 2**30
    (way,) = dpo_cache.plan(model_folder, gpu="500MiB", **options).train
    assert way.fits == []


def test_a_fixed_number_of_tokens_is_not_changed(model_folder: str) -> None:
    report = dpo_cache.plan(
        model_folder, tflops=1.0, gpu="1GiB", memory="fast", lora_r=8, quantize="4bit", budget_tokens=2048
    )
    assert [(way.gradient_checkpointing, way.budget_tokens) for way in report.train] == [("full", 2048)]


def test_what_the_options_leave_open() -> None:
    def names(**options: Any) -> list[str]:
        return [str(method) for method in methods_of(PlanOptions(model="m", **options))]

    assert names() == ["full", f"LoRA r={LORA_RANK}", f"LoRA r={LORA_RANK} on 4 bits"]
    assert names(lora_r=8) == ["LoRA r=8", "LoRA r=8 on 4 bits"]
    assert names(quantize="8bit") == [f"LoRA r={LORA_RANK} on 8 bits"]
    assert {method.precision for method in methods_of(PlanOptions(model="m"))} == {"bf16-mixed"}
    assert {method.precision for method in methods_of(PlanOptions(model="m", device="cpu"))} == {"fp32"}


def test_a_placement_is_kept(model_folder: str) -> None:
    place = "weights=host,gradients=host,optimizer=host,inputs=device"
    report = dpo_cache.plan(model_folder, tflops=1.0, gpu="80GiB", place=place)
    assert [way.place for way in report.train[:1]] == [place]
    assert f"--place {place}" in report.train[0].command and "--memory" not in report.train[0].command


@pytest.mark.parametrize(
    "options", [{"place": "Gradients = none"}, {"place": "inputs=device", "memory": "least"}], ids=str
)
def test_a_placement_without_gradients_comes_with_what_train_needs(
    model_folder: str, options: dict[str, str]
) -> None:
    way = dpo_cache.plan(model_folder, tflops=1.0, gpu="80GiB", **options).train[0]
    assert way.method == "full" and "gradients=none" in way.place
    _, command, *words = shlex.split(way.command)
    given = typer.main.get_command(app).commands[command].make_context(command, words).params  # type: ignore[attr-defined]
    assert (given["place"], given["max_grad_norm"]) == (options["place"], 0.0)
    assert TrainOptions(cache="c", output="o", **options, max_grad_norm=0.0).placement()
    with pytest.raises(OptionError, match="Give `max_grad_norm` 0"):
        TrainOptions(cache="c", output="o", **options)


def test_a_paged_optimizer_is_a_placement_of_weights_that_are_all_trained(model_folder: str) -> None:
    """As `train` reads it, next to other entries, too."""
    options = {"optimizer": "adamw-paged", "place": "inputs=host"}
    report = dpo_cache.plan(model_folder, tflops=1.0, gpu="80GiB", **options)
    places = {way.method: way.place for way in report.train}
    for method, is_adapted in (("full", False), (f"LoRA r={LORA_RANK}", True)):
        trained = TrainOptions(cache="c", output="o", **options, lora_r=LORA_RANK if is_adapted else None)
        assert places[method] == str(trained.placement())
    report = dpo_cache.plan(model_folder, tflops=1.0, gpu="80GiB", optimizer="adamw-paged", lora_r=2)
    assert {way.memory for way in report.train} == {"fast", "small", "least"}


def test_the_memory_of_this_machine_counts_only_if_it_has_the_device(
    model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"tflops": 1.0, "lora_r": 8, "quantize": "4bit", "memory": "fast"}
    monkeypatch.setattr(plan_module, "total_host_bytes", lambda: 10**9)
    (way,) = dpo_cache.plan(model_folder, device="cpu", **options).train
    assert way.fits == []
    assert dpo_cache.plan(model_folder, device="cpu", ram="64GiB", **options).train[0].fits == ["64GiB"]
    assert dpo_cache.plan(model_folder, gpu="80GiB", **options).train[0].fits == ["80GiB"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert dpo_cache.plan(model_folder, gpu="80GiB", **options).train[0].fits == []


def test_a_paged_optimizer_is_on_the_host(model_folder: str) -> None:
    way = dpo_cache.plan(model_folder, tflops=1.0, gpu="80GiB", optimizer="adamw-paged").train[0]
    assert way.method == "full" and "optimizer=host" in way.place
    assert way.host.optimizer > 0 and "--optimizer adamw-paged" in way.command


def test_the_need_has_context_and_fragmentation() -> None:
    parts = Parts(weights=100, gradients=10, inputs=20, activations=30)
    assert device_need(parts) == 160 + CONTEXT_BYTES + 5
    assert host_need(parts) == 160 + PROCESS_BYTES


def test_disk_and_steps(model_folder: str) -> None:
    report = dpo_cache.plan(
        model_folder, tflops=1.0, gpu="80GiB", lora_r=8, quantize="4bit", batch_size=16, epochs=2.0
    )
    assert report.num_steps == 2 * 625 and report.data.is_assumed
    assert report.cache_bytes == 13 * report.data.data_tokens
    way = report.train[0]
    assert way.model_bytes == way.device.gradients
    assert way.checkpoint_bytes == way.device.gradients + way.device.optimizer
    assert way.seconds == pytest.approx(report.num_steps * (way.step_seconds or 0))
    assert asdict(report)["train"][0]["device"]["weights"] > 0


def test_a_model_whose_code_needs_values_is_one_error(
    model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> int:
        raise RuntimeError("needs the value of a tensor")

    monkeypatch.setattr(Counts, "plain", fail)
    with pytest.raises(ModelError, match=r"its memory cannot be predicted \(needs the value of a tensor\)"):
        dpo_cache.plan(model_folder, tflops=1.0, memory="fast", lora_r=8, quantize="4bit")


def test_a_remark_that_holds_for_several_methods_is_logged_once(
    model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> int:
        raise ValueError("no such attention")

    monkeypatch.setattr(Counts, "live_reference", fail)
    report = dpo_cache.plan(model_folder, tflops=1.0, gpu="80GiB", memory="fast")
    assert len(report.train) == 3 and all(way.live_reference_bytes is None for way in report.train)
    assert report.remarks == [
        f"DPO with a live reference is not counted for {model_folder}: no such attention"
    ]


@pytest.mark.parametrize(("streams", "expected"), [("on", {True}), ("off", {False})])
def test_streaming_is_planned_as_it_is_asked_for(
    model_folder: str, streams: str, expected: set[bool]
) -> None:
    options = {"tflops": 1.0, "gpu": "1GiB", "lora_r": 8, "quantize": "4bit", "memory": "least"}
    found = dpo_cache.plan(model_folder, stream_weights=streams, **options)
    assert {way.is_streamed for way in found.precompute} == expected


@pytest.mark.parametrize("targets", ["nosuch", "q_proj,nosuch"])
def test_layers_that_the_model_lacks_are_named(model_folder: str, targets: str) -> None:
    with pytest.raises(OptionError, match=r"has no layer called nosuch (?s:.*)linear layers: .*q_proj"):
        dpo_cache.plan(model_folder, tflops=1.0, lora_r=8, lora_targets=targets)
