"""What a run changes so that its steps fit."""

import pytest
import torch

from dpo_cache.lm.memory.recompute import Recomputation, activation_bytes
from dpo_cache.lm.model.adapter import add_adapter, lora_config
from dpo_cache.training.step_memory import StepMemory
from tests.conftest import make_llama


@pytest.mark.parametrize(
    ("precision", "modes"), [("fp32", ["cheap", "full"]), ("bf16-mixed", ["cheap", "selective", "full"])]
)
def test_memory_that_runs_out_takes_the_next_mode_that_keeps_less(precision: str, modes: list[str]) -> None:
    remarks: list[str] = []
    model = make_llama()
    step_memory = StepMemory(model, Recomputation(model), None, "auto", remarks.append, precision=precision)
    seen = [step_memory.mode]
    while step_memory.mode != "full" and len(seen) < 10:
        step_memory.save_more(torch.OutOfMemoryError())
        seen.append(step_memory.mode)
    assert seen == modes and len(remarks) == len(modes) - 1


def test_adapters_are_not_taken_for_wide_layers() -> None:
    plain, model = make_llama(), make_llama()
    add_adapter(model, lora_config(4, None, "all-linear"), seed=0)
    most = activation_bytes(plain, 100, "cheap")
    assert most < activation_bytes(model, 100, "cheap") < 1.3 * most


def test_the_message_of_mps_is_passed_on() -> None:
    remarks: list[str] = []
    model = make_llama()
    step_memory = StepMemory(model, Recomputation(model), 1000, "none", remarks.append)
    step_memory._device = torch.device("mps")
    step_memory.save_more(RuntimeError("MPS backend is tired\nand more"))
    assert step_memory.micro_tokens == 500 and remarks[0].startswith(
        "MPS backend is tired; the step is repeated"
    )
