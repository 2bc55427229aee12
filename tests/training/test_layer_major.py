"""Runs layer by layer end like plain runs: under every placement, for full models and adapters."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_cache.errors import ModelError, OptionError, TrainingError
from dpo_cache.lm.forest import varlen
from dpo_cache.lm.forest.kernels import KERNELS
from dpo_cache.lm.layerwise import frozen_tables
from dpo_cache.lm.layerwise.passes import LayerPasses
from dpo_cache.lm.layerwise.record import NotLayerMajorError
from dpo_cache.lm.memory.recompute import Recomputation
from dpo_cache.options.placement import ADAPTER_PRESETS, Placement
from dpo_cache.options.train import TrainOptions
from dpo_cache.training import inputs, layer_major, placing, step
from dpo_cache.training.step import TrainingStep
from tests.lm.layerwise.transfers import FakeTransfer
from tests.training.test_loop import comparable, metrics, train, weights

STEPS = {"max_steps": 3, "budget_tokens": "100", "lr": 1e-4}  # several forests a step


def assert_same_runs(one: Path, other: Path, *, tolerance: float = 1e-5) -> None:
    """Losses and weights agree up to rounding."""
    for found, expected in zip(metrics(one), metrics(other), strict=True):
        for name in ("loss", "grad_norm", "rewards/margins"):
            if name in expected:
                assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    found_weights, expected_weights = weights(one / "model"), weights(other / "model")
    assert found_weights.keys() == expected_weights.keys()
    for name, expected in expected_weights.items():
        assert torch.allclose(found_weights[name], expected, rtol=tolerance, atol=tolerance), name


PLACES: list[dict[str, Any]] = [
    {"place": "weights=device"},
    {"place": "inputs=host"},
    {"memory": "small"},
    {"memory": "least", "max_grad_norm": 0.0},
]
ADAPTERS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora_r": 2}}


@pytest.fixture(scope="module")
def plain(cache: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A run with all on the device, of these options; made once."""
    made: dict[str, Path] = {}

    def run(**options: Any) -> Path:
        name = repr(sorted(options.items()))
        if name not in made:
            made[name] = tmp_path_factory.mktemp("plain")
            train(cache, made[name], memory="fast", **{**STEPS, **options})
        return made[name]

    return run


@pytest.mark.rotating(3)
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("is_apart", [False, True], ids=["one memory", "two memories"])
@pytest.mark.parametrize("places", PLACES, ids=str)
def test_a_run_layer_by_layer_ends_like_a_plain_run(
    cache: str,
    tmp_path: Path,
    plain: Callable[..., Path],
    places: dict[str, Any],
    adapter: str,
    is_apart: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a device that is the host, and on one with a memory of its own, as far as a CPU can show it."""
    if is_apart:
        transfers = pretend_two_memories(monkeypatch)
    expected = plain(
        **ADAPTERS[adapter], **({"max_grad_norm": 0.0} if places.get("memory") == "least" else {})
    )
    train(cache, tmp_path / "layers", **{**STEPS, **ADAPTERS[adapter], **places})
    assert_same_runs(tmp_path / "layers", expected)
    if is_apart:
        has_copies = places.get("memory") == "least" or ("memory" in places and adapter == "full")
        assert len(transfers) == has_copies


@pytest.mark.rotating(2)
@pytest.mark.parametrize("quantize", ["none", "4bit"])
@pytest.mark.parametrize("memory", [{"memory": "small"}, {"place": "inputs=host", "merge_adapter": True}])
def test_a_frozen_table_on_the_host_changes_no_bit(
    cache: str, tmp_path: Path, memory: dict[str, Any], quantize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if quantize != "none":
        pytest.importorskip("bitsandbytes")
        memory = {**memory, "merge_adapter": False}
    looked_up, look_up = [], frozen_tables.look_up
    monkeypatch.setattr(
        frozen_tables, "look_up", lambda *args, **named: looked_up.append(1) or look_up(*args, **named)
    )
    options = {**STEPS, **memory, "lora_r": 2, "quantize": quantize, "step_zero": "off"} | {
        "eval_pairs": "heldout",
        "sample": 2,
    }
    for name, is_apart in (("here", False), ("apart", True)):
        monkeypatch.setattr(inputs, "keeps_tables_on_host", lambda *_, apart=is_apart: apart)
        train(cache, tmp_path / name, **options)
        assert bool(looked_up) == is_apart
    assert comparable(tmp_path / "apart") == comparable(tmp_path / "here")
    expected = weights(tmp_path / "here/model")
    for name, found in weights(tmp_path / "apart/model").items():
        assert torch.equal(found, expected[name])


@pytest.mark.parametrize(
    ("device", "placement", "expected"),
    [
        ("cuda", ADAPTER_PRESETS["small"], True),
        ("mps", ADAPTER_PRESETS["small"], True),
        ("cpu", ADAPTER_PRESETS["small"], False),
        ("cuda", ADAPTER_PRESETS["least"], False),  # streamed weights keep the ends on the host themselves
        ("cuda", Placement(), False),
    ],
)
def test_where_tables_are_kept(device: str, placement: Placement, expected: bool) -> None:
    assert layer_major.keeps_tables_on_host(placement, torch.device(device)) == expected


def test_a_run_whose_model_is_refused_says_that_it_is_fast(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = "it gives another gradient"
    monkeypatch.setattr(layer_major.LayerMajorModel, "problem", lambda *_, **__: problem)
    train(cache, tmp_path / "run", place="inputs=host", **STEPS)
    assert json.loads((tmp_path / "run/config.json").read_text())["resolved"]["memory"] == "fast"


@pytest.mark.rotating(2)
@pytest.mark.parametrize("quantize", ["none", "4bit"])
def test_a_base_on_disk_is_read_layer_by_layer(
    cache: str, tmp_path: Path, quantize: str, plain: Callable[..., Path]
) -> None:
    if quantize != "none":
        pytest.importorskip("bitsandbytes")
    options = {"lora_r": 2, "quantize": quantize, "step_zero": "off"}
    train(cache, tmp_path / "layers", **STEPS, **options, place="weights=disk")
    assert_same_runs(tmp_path / "layers", plain(**options))


def pretend_two_memories(monkeypatch: pytest.MonkeyPatch) -> list[FakeTransfer]:
    """Let a run copy weights to its device, though that is the host; returns what moves them."""
    transfers: list[FakeTransfer] = []

    def make() -> FakeTransfer:
        transfers.append(FakeTransfer())
        return transfers[-1]

    def has_copies(placement: Placement, _: torch.device) -> bool:
        return placement.weights != "device" or placement.optimizer == "host"

    monkeypatch.setattr(inputs, "has_copies", has_copies)
    monkeypatch.setattr(layer_major, "has_copies", has_copies)
    for module in (inputs, layer_major):
        monkeypatch.setattr(module, "make_transfer", make)
    return transfers


def test_mixed_precision_multiplies_rounded_copies_of_weights_on_the_host(
    cache: str, tmp_path: Path, plain: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers as autocast, whose copies are made anew for each product."""
    pretend_two_memories(monkeypatch)
    options = {"precision": "bf16-mixed", "step_zero": "off", "max_steps": 2}
    train(cache, tmp_path / "layers", **{**STEPS, **options, "memory": "small"})
    assert_same_runs(tmp_path / "layers", plain(**options))


@pytest.mark.rotating(3)
@pytest.mark.parametrize(
    "loss",
    [{"loss": ("ipo",)}, {"loss": ("aot",)}, {"wpo": "clipped"}, {"loss": ("sigmoid:0.5", "sft:0.5")}],
    ids=str,
)
def test_every_kind_of_loss(
    cache: str, tmp_path: Path, plain: Callable[..., Path], loss: dict[str, Any]
) -> None:
    """Some compare the pairs of a step with each other, and some need more of the head."""
    train(cache, tmp_path / "layers", place="inputs=host", **STEPS, **loss)
    assert_same_runs(tmp_path / "layers", plain(**loss))


def test_a_pair_that_is_split_into_its_answers(
    cache: str, tmp_path: Path, plain: Callable[..., Path]
) -> None:
    options = {**STEPS, "budget_tokens": "20"}
    train(cache, tmp_path / "layers", place="inputs=host", **options)
    assert_same_runs(tmp_path / "layers", plain(**options))


def test_evaluations_and_a_resumed_run(cache: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        **STEPS,
        "eval_pairs": "heldout",
        "eval_every": "1",
        "save_every": "2",
        "place": "gradients=host,inputs=host",
    }
    train(cache, tmp_path / "whole", **options)
    stops = iter([False, True])
    train(cache, tmp_path / "cut", should_stop=lambda: next(stops), **options)
    train(cache, tmp_path / "cut", resume=True, **options)
    for name, expected in weights(tmp_path / "whole/model").items():
        assert torch.equal(weights(tmp_path / "cut/model")[name], expected)


def test_gradients_that_are_dropped_cannot_be_clipped(cache: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="Give `max_grad_norm` 0"):
        train(cache, tmp_path / "run", place="gradients=none")


def test_code_that_treats_long_rows_in_another_way_is_one_clear_error(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check at the start runs short rows."""

    class Refusing(layer_major.LayerMajorRun):
        def forward(self, pieces: Any) -> None:
            raise NotLayerMajorError("its code changes the hidden states before a LlamaDecoderLayer")

    monkeypatch.setattr(layer_major, "LayerMajorRun", Refusing)
    with pytest.raises(ModelError) as caught:
        train(cache, tmp_path / "run", place="inputs=host", **STEPS)
    assert re.fullmatch(
        r"LlamaForCausalLM cannot run layer by layer in a step whose longest row has \d+ tokens, though it can "
        r"on short rows: its code changes the hidden states before a LlamaDecoderLayer\.\nUse `memory` fast\.",
        str(caught.value),
    )


@pytest.mark.rotating(2)
@pytest.mark.parametrize("memory", ["small", "least"])
def test_a_step_that_does_not_fit_is_repeated_without_a_trace(
    cache: str,
    tmp_path: Path,
    plain: Callable[..., Path],
    memory: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory runs out in the midst of a backward pass, when some copies have gradients already."""
    pretend_two_memories(monkeypatch)
    backward, left = LayerPasses._layer_backward, [-1]

    def run_out(self: LayerPasses, *args: Any, **named: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise torch.OutOfMemoryError("no memory")
        backward(self, *args, **named)

    def start(*_: Any) -> None:
        left[0] = 2  # after the check of the model

    monkeypatch.setattr(LayerPasses, "_layer_backward", run_out)
    monkeypatch.setattr(TrainingStep, "compare", start)
    remarks: list[str] = []
    options = {**STEPS, "max_grad_norm": 0.0, "budget_tokens": "200"}
    train(cache, tmp_path / "layers", **options, memory=memory, log=remarks.append)
    assert any("the step is repeated" in remark for remark in remarks)
    assert_same_runs(tmp_path / "layers", plain(**options))


def test_a_loss_that_is_not_finite_ends_the_run(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = step.policy_losses

    def spoil(*args: Any) -> dict[str, torch.Tensor]:
        found = losses(*args)
        return {**found, "loss": found["loss"] * torch.nan}

    monkeypatch.setattr(step, "policy_losses", spoil)
    with pytest.raises(TrainingError, match="step 1: loss nan"):
        train(cache, tmp_path / "run", place="gradients=host,inputs=host")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"optimizer": "adamw-paged", "place": "inputs=host"}, "gradients=host,optimizer=host,inputs=host"),
        (
            {"free_gradients": True, "max_grad_norm": 0.0, "place": "Inputs = host"},
            "gradients=none,optimizer=device,inputs=host",
        ),
        ({"offload_activations": True}, "gradients=device,optimizer=device,inputs=host"),
        (
            {"optimizer": "adamw-paged", "lora_r": 2, "memory": "least"},
            "gradients=device,optimizer=device,inputs=host",
        ),
        (
            {"place": "gradients=host,optimizer=host", "lora_r": 2},
            "gradients=device,optimizer=device,inputs=device",
        ),
    ],
    ids=str,
)
def test_earlier_names_are_entries_of_the_placement(options: dict[str, Any], expected: str) -> None:
    chosen = TrainOptions(cache="cache", output="run", **options)
    assert str(chosen.placement()).partition(",")[2] == expected
    is_old = options.keys() & {"free_gradients", "offload_activations"} or options.keys() >= {"optimizer"}
    assert bool(chosen.earlier_names()) == bool(is_old and "lora_r" not in options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"memory": "least"}, "`memory` least"),
        (
            {"memory": "least", "place": "inputs=device"},
            "`place` weights=host,gradients=device,optimizer=device,inputs=device",
        ),
    ],
    ids=str,
)
def test_errors_name_the_preset_only_where_no_entry_changes_it(
    cache: str, tmp_path: Path, options: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing, "has_copies", lambda *_: True)
    with pytest.raises(OptionError, match=rf"^`merge_adapter` and {expected}: merging needs"):
        train(cache, tmp_path / "run", lora_r=2, merge_adapter=True, **options)


def test_an_entry_is_given_once() -> None:
    with pytest.raises(OptionError, match="inputs is given twice"):
        TrainOptions(cache="cache", output="run", place="inputs=device", offload_activations=True)


def test_a_model_may_have_an_adapter_that_no_option_names() -> None:
    assert TrainOptions(cache="cache", output="run", model="adapter", place="weights=host").placement(
        is_adapted=True
    )
    with pytest.raises(OptionError, match="all weights are trained"):
        TrainOptions(cache="cache", output="run", place="weights=host")


@pytest.mark.parametrize("requested", ["auto", "full"])
def test_a_mode_of_recomputation_that_gives_another_gradient_is_not_used(
    cache: str, tmp_path: Path, requested: str, plain: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The modes apply to layers that run again for their gradients."""
    run = Recomputation._run_recorded

    def spoil(self: Recomputation, forward: Any, *args: Any, **kwargs: Any) -> Any:
        output = run(self, forward, *args, **kwargs)
        return output if self.mode == "none" else output + 0.1 * (output - output.detach())

    monkeypatch.setattr(Recomputation, "_run_recorded", spoil)
    remarks: list[str] = []
    options = {**STEPS, "gradient_checkpointing": requested}
    train(cache, tmp_path / "layers", **options, memory="small", log=remarks.append)
    mode = "cheap" if requested == "auto" else requested
    words = f"`gradient_checkpointing` {mode} gives another gradient than the plain run ("
    assert any(remark.startswith(words) and remark.endswith("continuing with none.") for remark in remarks)
    assert_same_runs(tmp_path / "layers", plain(gradient_checkpointing="none"))


def test_a_kernel_that_gives_another_gradient_is_not_used_where_weights_travel(
    cache: str, tmp_path: Path, plain: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = plain()
    pretend_two_memories(monkeypatch)
    monkeypatch.setitem(KERNELS, "cpu", ("varlen", "segments"))
    remarks: list[str] = []
    train(cache, tmp_path / "right", **STEPS, memory="small", log=remarks.append)
    assert not any("attention by varlen" in remark for remark in remarks)
    backward = varlen._Gather.backward
    monkeypatch.setattr(
        varlen._Gather, "backward", lambda ctx, grad: (backward(ctx, grad)[0] * 0.9, None, None, None)
    )
    train(cache, tmp_path / "layers", **STEPS, memory="small", log=remarks.append)
    assert any("attention by varlen gives another gradient than segments (" in remark for remark in remarks)
    for name in ("right", "layers"):
        assert_same_runs(tmp_path / name, expected)


def test_a_resumed_run_is_clipped_as_before(cache: str, tmp_path: Path) -> None:
    remarks: list[str] = []
    train(cache, tmp_path / "run", **STEPS, memory="least", should_stop=lambda: True, log=remarks.append)
    assert any("the gradient is not clipped to `max_grad_norm` 1.0" in remark for remark in remarks)
    with pytest.raises(TrainingError, match="clips: False before, True now"):
        train(cache, tmp_path / "run", **STEPS, memory="small", resume=True)
