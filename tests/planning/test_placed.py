"""The parts of a step's memory under each placement."""

import dataclasses

import pytest
from transformers import LlamaConfig

from dpo_cache.options.placement import FAST, Placement, placement_of
from dpo_cache.planning.layer_major import PhasePeaks
from dpo_cache.planning.optimizer import stream_bytes
from dpo_cache.planning.parts import Method, Parts
from dpo_cache.planning.placed import (
    live_reference_parts,
    measure_model,
    placed_footprint,
    placed_parts,
    placement_there,
    plain_parts,
    waiting_inputs,
)
from dpo_cache.planning.workload import typical
from tests.conftest import make_llama
from tests.planning.test_footprint import pairs

SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
PEAKS = PhasePeaks(forward=1000, top=3000, backward=2000, bottom=1500, state=400)
FORESTS = [pairs(2), pairs(1)]


def parts(method: Method, placement: Placement) -> tuple[Parts, Parts]:
    sizes = measure_model(make_llama(**SIZES).config, method)
    return placed_parts(sizes, PEAKS, placement, FORESTS, method)


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("bf16", 2)])
def test_all_weights_are_trained(precision: str, size: int) -> None:
    model, method = make_llama(**SIZES), Method(precision)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    head, norm = model.lm_head.weight.numel(), model.model.norm.weight.numel()
    inputs = waiting_inputs(measure_model(model.config, method), PEAKS, FORESTS)
    assert inputs == 5 * (400 + 200)
    here = Placement()
    device, host = parts(method, here)
    assert device.weights == device.gradients == size * numbers and host == Parts()
    assert device.optimizer == 8 * numbers + 4 * len(list(model.parameters()))
    assert device.inputs == inputs
    device, host = parts(method, placement_of("small"))
    assert device.weights == size * (4 * layer + norm)  # the table of embeddings stays on the host
    assert (device.gradients, device.optimizer, device.inputs) == (0, 0, 0)
    assert (device.activations, device.buffers) == (3000, size * head)  # the head is there while it runs
    assert (host.weights, host.gradients, host.inputs) == (size * numbers, size * numbers, inputs)
    assert host.optimizer == 8 * numbers + 4 * len(list(model.parameters()))
    device, host = parts(method, placement_of("least"))
    assert device.weights == size * norm and device.buffers == size * (2 * layer + head)
    assert (host.weights, host.gradients) == (size * numbers, 0)
    assert host.buffers == size * 2 * layer + stream_bytes(
        model.bfloat16().parameters() if size == 2 else model.parameters(), "adamw", "stochastic"
    )


def test_mixed_precision_has_masters_on_the_host_and_halves_on_the_device() -> None:
    method, whole = Method("bf16-mixed"), Method("fp32")
    device, host = parts(method, placement_of("small"))
    other, _ = parts(whole, placement_of("small"))
    norms = 4 * 64 * 9  # vectors, which stay in float32
    assert device.weights - norms == (other.weights - norms) // 2
    assert host.weights == parts(whole, placement_of("small"))[1].weights


def test_frozen_weights_wait_on_the_host_or_on_disk() -> None:
    pytest.importorskip("peft")
    method = Method("bf16-mixed", lora_r=4)
    sizes = measure_model(make_llama(**SIZES).config, method)
    device, host = parts(method, placement_of("small", is_adapted=True))
    table = 2 * 264 * 64  # of which the device gets rows only
    assert device.weights == sizes.weights - table and host == Parts(weights=table, inputs=host.inputs)
    device, host = parts(method, placement_of("least", is_adapted=True))
    assert host.weights == sizes.weights - sizes.trained and device.weights < sizes.largest_layer
    on_disk = parts(method, placement_of("least", "weights=disk", is_adapted=True))
    assert on_disk[0] == device and on_disk[1] == dataclasses.replace(host, weights=0)


@pytest.mark.parametrize(
    ("place", "lora_r", "tied", "is_apart"),
    [
        ("inputs=host", 4, False, True),
        ("inputs=device", 4, False, False),
        ("inputs=host", 4, True, False),  # the head multiplies by it
        ("inputs=host,gradients=none", None, False, False),  # it is trained
    ],
)
def test_a_frozen_table_waits_on_the_host_with_the_inputs(
    place: str, lora_r: int | None, tied: bool, is_apart: bool
) -> None:
    pytest.importorskip("peft")
    method, config = Method("bf16", lora_r=lora_r), make_llama(**SIZES, tie_word_embeddings=tied).config
    placement = placement_of("auto", place, is_adapted=lora_r is not None)
    assert placement is not None
    sizes = measure_model(config, method)
    device, host = placed_parts(sizes, PEAKS, placement, FORESTS, method)
    table = 2 * 264 * 64 if is_apart else 0
    assert (device.weights, host.weights) == (sizes.weights - table, table)
    other = placed_parts(sizes, PEAKS, FAST, FORESTS, method)[0]
    assert other.weights == sizes.weights  # each forest runs through all layers: nothing moves


def test_quantized_weights_are_whole_one_at_a_time() -> None:
    pytest.importorskip("peft")
    whole = measure_model(make_llama(**SIZES).config, Method("bf16-mixed", lora_r=4))
    small = measure_model(make_llama(**SIZES).config, Method("bf16-mixed", lora_r=4, quantize="4bit"))
    assert small.dequantized == 2 * 64 * 192 and whole.dequantized == 0
    assert small.weights < whole.weights and small.trained == whole.trained
    assert plain_parts(small, small.trained).buffers == small.dequantized


def test_a_reference_is_frozen_and_may_be_quantized() -> None:
    sizes = [
        measure_model(make_llama(**SIZES).config, Method("bf16", optimizer="none", quantize=bits))
        for bits in (None, "8bit", "4bit")
    ]
    assert sizes[0].weights > sizes[1].weights > sizes[2].weights
    assert {one.trained for one in sizes} == {one.optimizer for one in sizes} == {0}


def test_a_live_reference_is_a_second_copy_unless_it_is_the_adapters_base() -> None:
    sizes = measure_model(make_llama(**SIZES).config, Method("bf16"))
    assert live_reference_parts(sizes, 5).weights == 2 * sizes.weights
    assert live_reference_parts(sizes, 5).optimizer < sizes.optimizer  # its moments are bfloat16
    pytest.importorskip("peft")
    adapted = measure_model(make_llama(**SIZES).config, Method("bf16", lora_r=4))
    assert live_reference_parts(adapted, 5).weights == adapted.weights


def test_the_peak_is_that_of_the_passes_or_of_the_update() -> None:
    assert (
        Parts(weights=5, gradients=4, optimizer=3, inputs=1, buffers=1, activations=7, update=8).total == 21
    )
    assert Parts(weights=5, activations=7, update=8).total == 13


def test_a_cpu_has_one_memory() -> None:
    least = placement_of("least")
    assert least is not None
    assert placement_there(least, "cuda") == least
    assert placement_there(least, "cpu") == Placement(gradients="none")


def test_a_step_that_is_not_layer_major_has_nothing_on_the_host() -> None:
    method = Method("fp32")
    device, host = placed_footprint(make_llama(**SIZES).config, method, FAST, [pairs(1), pairs(1)])
    sizes = measure_model(make_llama(**SIZES).config, method)
    assert (device.weights, device.gradients, device.optimizer) == (
        sizes.weights,
        sizes.trained,
        sizes.optimizer,
    )
    assert host == Parts() and device.activations > 0


@pytest.mark.slow
def test_seventy_billion_weights_in_4_bits() -> None:
    """Four pairs of 512 + 2 x 256 tokens at once, and 32 in the step."""
    pytest.importorskip("peft")
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64,
        vocab_size=128_256, num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    method, forests = Method("bf16-mixed", lora_r=16, quantize="4bit"), typical(32, 128_256).forests(4096)
    for memory, most in (("small", 44e9), ("least", 8e9)):
        placement = placement_of(memory, is_adapted=True)
        assert placement is not None
        assert placed_footprint(config, method, placement, forests)[0].total <= most


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "memory", "most", "host_most"),
    [("bf16", "small", 19e9, 110e9), ("bf16", "least", 4.6e9, 92e9), ("bf16-mixed", "small", 20e9, 150e9)],
)
def test_eight_billion_weights(precision: str, memory: str, most: float, host_most: float) -> None:
    """Four pairs of 512 + 2 x 256 tokens at once, and 32 in the step."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        vocab_size=128_256, num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    placement, forests = placement_of(memory), typical(32, 128_256).forests(4096)
    assert placement is not None
    device, host = placed_footprint(config, Method(precision), placement, forests)
    assert device.total <= most and host.total <= host_most
