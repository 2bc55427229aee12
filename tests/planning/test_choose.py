"""The preset of a run that names none is the first one that `plan` finds to fit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

import dpo_cache
from dpo_cache.options.placement import ADAPTER_PRESETS, PRESETS
from dpo_cache.options.plan import PlanOptions
from dpo_cache.planning import choose
from dpo_cache.planning import plan as plan_module
from dpo_cache.planning.choose import choose_placement, staying_bytes
from dpo_cache.planning.counts import Counts
from dpo_cache.planning.layer_major import PhasePeaks
from dpo_cache.planning.parts import Method
from dpo_cache.planning.placed import measure_model
from dpo_cache.planning.ways import CONTEXT_BYTES
from dpo_cache.types import Pair
from tests.planning.test_footprint import pairs

EIGHT_B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, tie_word_embeddings=False,
)  # fmt: skip
FULL, LORA = Method(precision="bf16"), Method(precision="bf16", lora_r=16)
CUDA = torch.device("cuda")
OPTIONS = PlanOptions(model="m", batch_size=4)


def some_pairs(number: int = 4) -> list[Pair]:
    sides = pairs(number)
    return [Pair(row, *sides[2 * row : 2 * row + 2]) for row in range(number)]


def have_free(monkeypatch: pytest.MonkeyPatch, num_bytes: float) -> None:
    monkeypatch.setattr(choose, "free_bytes", lambda _: int(num_bytes))
    monkeypatch.setattr(choose, "free_host_bytes", lambda: 2**50)


@pytest.mark.rotating(2)
@pytest.mark.parametrize(
    ("method", "free_gb", "expected"),
    [
        (FULL, 140, "fast"),  # 2 + 2 + 8 bytes a weight: 96.4 GB
        (FULL, 80, "small"),  # 16.1 GB of weights
        (FULL, 24, "small"),
        (FULL, 14, "least"),
        (FULL, 1, "least"),  # nothing is smaller
        (LORA, 24, "fast"),
        (LORA, 12, "least"),
    ],
    ids=str,
)
def test_the_first_preset_that_fits(
    method: Method, free_gb: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the peaks of short pairs, which are small."""
    monkeypatch.setattr(Counts, "plain", lambda *_, gradients, **__: gradients + 10**9)
    monkeypatch.setattr(Counts, "layer_major", lambda *_, **__: PhasePeaks(*[10**9] * 4, state=10**6))
    have_free(monkeypatch, free_gb * 1e9)
    name, placement = choose_placement(EIGHT_B, method, CUDA, OPTIONS, some_pairs())
    assert name == expected
    assert placement == (PRESETS if method.lora_r is None else ADAPTER_PRESETS)[name]


def remembered(count: Callable[..., Any]) -> Callable[..., Any]:
    """The same for `Counts` of one workload, each argument counted once, because counting takes seconds."""
    known: dict[Any, Any] = {}

    def call(counts: Counts, *args: Any, **named: Any) -> Any:
        key = args, tuple(sorted(named.items()))
        return known[key] if key in known else known.setdefault(key, count(counts, *args, **named))

    return call


@pytest.mark.rotating(2)
@pytest.mark.parametrize("lora_r", [None, 4])
@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
def test_near_each_limit_it_is_the_one_of_the_plan(
    lora_r: int | None, precision: str, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One byte decides: what `plan` needs for each of its ways, and one less."""
    if lora_r:
        pytest.importorskip("peft")
    given = some_pairs()
    for name in ("plain", "layer_major"):
        monkeypatch.setattr(Counts, name, remembered(getattr(Counts, name)))
    monkeypatch.setattr(Counts, "live_reference", lambda *_, **__: 0)
    monkeypatch.setattr(plan_module._Planner, "_scoring", lambda *_: iter(()))
    monkeypatch.setattr(
        plan_module, "read_workload", lambda options, _: choose.measure(given, "", options.batch_size)
    )
    config = LlamaConfig.from_pretrained(model_folder)
    method = Method(precision, lora_r=lora_r)
    options: dict[str, Any] = {"precision": precision, "lora_r": lora_r, "quantize": "none", "batch_size": 4}

    def planned(gpu: int) -> list[Any]:
        report = dpo_cache.plan(
            model_folder, tflops=1.0, gpu=f"{gpu}B", ram="1TiB", log=lambda _: None, **options
        )
        return [way for way in report.train if way.method == str(method)]

    needs = {way.device_bytes for size in (2**40, 2**20) for way in planned(size)}
    chosen = set()
    for gpu in [need - less for need in needs for less in (0, 1)]:
        have_free(monkeypatch, gpu - CONTEXT_BYTES)
        fitting = [way.memory for way in planned(gpu) if way.fits]
        name, _ = choose_placement(config, method, CUDA, OPTIONS, given)
        assert name == (fitting[0] if fitting else "least")
        chosen.add(name)
    assert chosen >= {"fast", "least"}


def test_weights_that_are_there_already_do_not_count_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counts, "plain", lambda *_, gradients, **__: gradients)
    monkeypatch.setattr(Counts, "layer_major", lambda *_, **__: PhasePeaks(0, 0, 0, 0, 0))
    have_free(monkeypatch, 100e9 - 16.1e9)
    for present, expected in ((0, "small"), (16.1e9, "fast")):
        found = choose_placement(EIGHT_B, FULL, CUDA, OPTIONS, some_pairs(), present_bytes=int(present))
        assert found[0] == expected


def test_a_model_whose_activations_cannot_be_counted_is_placed_by_its_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> int:
        raise RuntimeError("needs the value of a tensor")

    monkeypatch.setattr(Counts, "plain", fail)
    for free, expected in ((140e9, "fast"), (24e9, "small"), (16e9, "least")):
        have_free(monkeypatch, free)
        assert choose_placement(EIGHT_B, FULL, CUDA, OPTIONS, some_pairs())[0] == expected


def test_presets_keep_less_and_less_on_the_device() -> None:
    sizes = measure_model(EIGHT_B, FULL)
    kept = [staying_bytes(sizes, placement) for placement in PRESETS.values()]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == pytest.approx(12 * 8.03e9, rel=1e-3)


def test_a_device_with_the_hosts_memory_keeps_everything_and_reads_no_pair() -> None:
    def unread() -> Any:
        raise AssertionError
        yield

    assert choose_placement(EIGHT_B, FULL, torch.device("cpu"), OPTIONS, unread())[0] == "fast"
