"""Operations and transfers of a step, by hand."""

import pytest
import torch

from dpo_cache.options.placement import placement_of
from dpo_cache.planning.parts import Method
from dpo_cache.planning.placed import measure_model
from dpo_cache.planning.timing import (
    count_operations,
    forward_operations,
    measure_tflops,
    passes_of,
    step_operations,
    transfers_of,
)
from dpo_cache.planning.workload import typical
from tests.conftest import make_llama

HIDDEN, INNER, VOCABULARY, LAYERS = 32, 48, 264, 2
LAYER = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2 + 3 * HIDDEN * INNER  # two of four heads have keys


def test_operations_of_a_forward_pass() -> None:
    found = count_operations(make_llama())
    assert found.per_token == 2 * LAYERS * LAYER
    assert found.per_target == 2 * VOCABULARY * HIDDEN
    assert found.per_context == 4 * HIDDEN * LAYERS
    assert forward_operations(found, 10, 4, 3) == 10 * (found.per_token + 3 * found.per_context) + (
        4 * found.per_target
    )


def test_operations_of_a_step() -> None:
    found, workload = count_operations(make_llama()), typical(2, VOCABULARY)
    forward = forward_operations(found, 2 * 1024, 2 * 512, 384)
    assert step_operations(found, workload, 2, passes=3) == 3 * forward
    assert passes_of(is_adapted=False, recomputes_layers=False) == 3
    assert passes_of(is_adapted=True, recomputes_layers=False) == 2
    assert passes_of(is_adapted=False, recomputes_layers=True) == 4


def test_only_the_experts_that_a_token_uses_count() -> None:
    model = make_llama()
    model.config.num_local_experts, model.config.num_experts_per_tok = 8, 2
    whole = count_operations(model).per_token
    model.model.layers[0].mlp.experts = torch.nn.Linear(10, 80, bias=False)
    assert count_operations(model).per_token == whole + 2 * 800 / 4


@pytest.mark.parametrize("memory", ["small", "least"])
def test_weights_go_twice_gradients_come_back_and_an_update_passes_through(memory: str) -> None:
    sizes = measure_model(make_llama().config, Method("fp32"))
    placement = placement_of(memory)
    assert placement is not None
    parameters = LAYERS * (LAYER + 2 * HIDDEN) + 2 * VOCABULARY * HIDDEN + HIDDEN
    assert sizes.trained == 4 * parameters
    head, layers = 4 * VOCABULARY * HIDDEN, 4 * LAYERS * (LAYER + 2 * HIDDEN)
    found = transfers_of(sizes, placement, 1000, tokens=10, seconds_per_token=1e-3)
    assert found.up == 1000 + head + (2 if memory == "least" else 1) * layers
    assert found.down == 1000 + 4 * parameters
    assert found.update_up == 2 * 4 * parameters + sizes.optimizer
    assert found.update_down == 4 * parameters + sizes.optimizer
    assert found.pass_s(25) == max(found.up, found.down) / 25e9
    fixed = max(found.up, found.down) - 1000
    # so many tokens take as long to compute as everything takes to pass
    for name, speed in (("PCIe 4", 25e9), ("PCIe 5", 50e9)):
        tokens = found.hidden_from_tokens[name]
        assert tokens is not None
        assert tokens == pytest.approx(fixed / speed / (1e-3 - 100 / speed), abs=0.5)


def test_inputs_that_pass_slower_than_they_are_computed_are_never_hidden() -> None:
    sizes, placement = measure_model(make_llama().config, Method("fp32")), placement_of("small")
    assert placement is not None
    found = transfers_of(sizes, placement, 10**9, tokens=10, seconds_per_token=1e-3)
    assert found.hidden_from_tokens == {"PCIe 4": None, "PCIe 5": None}


def test_the_speed_of_this_machine_is_measured() -> None:
    assert measure_tflops(torch.device("cpu")) > 0
